//! Seeds: those that once failed, some thousands that nobody has run before, and what a run is worth.

use std::time::{SystemTime, UNIX_EPOCH};

use simulator::campaign::{Campaign, Report};
use simulator::plan::Plan;
use simulator::sim::run;

fn campaign(from: u64, seeds: u64) -> Report {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let campaign = Campaign {
        from,
        seeds,
        threads,
        max_failures: 5,
        canary: None,
    };
    campaign.run(&|_, _| {})
}

fn assert_none(report: &Report) {
    let lines: Vec<_> = report
        .failures
        .iter()
        .map(|failure| {
            format!(
                "seed {} {}: {}\n    {}",
                failure.seed, failure.kind, failure.what, failure.rerun
            )
        })
        .collect();
    assert!(lines.is_empty(), "promises broken:\n{}", lines.join("\n"));
}

/// Fresh seeds, unless `POLLUX_FRESH_SEEDS` says how many.
const FRESH: u64 = 3_000;

/// Another set at every run: what it finds need not be of the change that is tested, but it is to be mended.
#[test]
fn fresh_seeds_break_no_promise() {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let from = since.as_millis() as u64 * 1_000;
    let asked = std::env::var("POLLUX_FRESH_SEEDS").ok();
    let seeds = asked.map_or(FRESH, |text| text.parse().expect("a number of seeds"));
    println!("{seeds} fresh seeds from {from}");
    assert_none(&campaign(from, seeds));
}

/// A world in which nothing happens would pass, too: these must happen, and often.
#[test]
fn the_first_seeds_are_full_of_what_they_are_for() {
    let report = campaign(0, 6_000);
    assert_none(&report);
    let seen = report.seen;
    let often = [
        ("failovers", seen.failovers, 400),
        ("backups lost", seen.alone, 2_000),
        ("protections", seen.protected, 4_000),
        ("cold starts", seen.cold_starts, 2_000),
        ("answers", seen.answers, 100_000),
        ("quarantines", seen.quarantined, 60),
        ("folds", seen.folded, 50),
        ("late writes", seen.late_writes, 800),
        ("deltas", seen.deltas, 10_000),
        ("divergences", seen.divergences, 5),
        ("switch-overs", seen.switch_overs, 60),
        ("power-offs", seen.power_offs, 60),
        ("renewals", seen.renewals, 40),
    ];
    for (what, count, least) in often {
        assert!(
            count >= least,
            "only {count} {what} in {} seeds",
            report.seeds
        );
    }
}

/// `seeds.txt`: a number, and after `#` what it found.
#[test]
fn seeds_that_once_failed_do_not_fail_again() {
    let text = include_str!("../seeds.txt");
    for line in text.lines() {
        let number = line.split('#').next().unwrap_or("").trim();
        if number.is_empty() {
            continue;
        }
        let seed = number
            .parse()
            .expect("a line of seeds.txt begins with a seed");
        assert_none(&campaign(seed, 1));
    }
}

#[test]
fn a_seed_gives_the_same_trace_to_the_byte() {
    for seed in [1, 17, 42] {
        let first = run(&Plan::new(seed), true);
        let second = run(&Plan::new(seed), true);
        assert!(first.trace.text().lines().count() > 100);
        assert_eq!(first.trace.text(), second.trace.text(), "seed {seed}");
        let silent = run(&Plan::new(seed), false);
        assert_eq!(silent.events, first.events, "the trace changes nothing");
    }
}
