//! The simulator's command line: see `--help` and docs/testing.md.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use ft::canary::Canary;
use serde_json::json;
use simulator::campaign::{Campaign, plant, rerun, run_guarded};
use simulator::plan::Plan;
use simulator::shrink::shrink;

/// Runs the fault-tolerance protocol in simulated worlds full of trouble, and judges what comes of it.
#[derive(Debug, Parser)]
struct Args {
    /// Run this many seeds.
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Run this seed only, and say how it went.
    #[arg(long)]
    seed: Option<u64>,
    /// With --seed: print what happened.
    #[arg(long, requires = "seed")]
    trace: bool,
    /// With --seed: look for the least trouble that still fails, and print that.
    #[arg(long, requires = "seed")]
    shrink: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Threads; all cores unless given.
    #[arg(long)]
    threads: Option<usize>,
    /// Stop after this many failing seeds.
    #[arg(long, default_value_t = 10)]
    max_failures: usize,
    /// Switch this planted bug on (a build with `--features canaries`).
    #[arg(long)]
    canary: Option<String>,
    /// Switch each planted bug on in turn, and say in how many seeds it is found.
    #[arg(long)]
    canaries: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let canary = match args.canary.as_deref().map(by_name) {
        None => None,
        Some(Some(canary)) => Some(canary),
        Some(None) => {
            let names: Vec<_> = Canary::ALL.iter().map(|canary| canary.name()).collect();
            eprintln!(
                "there is no such planted bug; there are: {}",
                names.join(" ")
            );
            return ExitCode::from(2);
        }
    };
    let planted = canary.or(args.canaries.then_some(Canary::ReleaseBeforeAck));
    if !plant(planted) {
        eprintln!("this build has no planted bugs: build it with --features canaries");
        return ExitCode::from(2);
    }
    // A failed assertion is caught and reported with its seed.
    std::panic::set_hook(Box::new(|_| {}));
    if args.canaries {
        return all_canaries(&args);
    }
    match args.seed {
        Some(seed) => one(&args, seed, canary),
        None => many(&args, canary),
    }
}

fn by_name(name: &str) -> Option<Canary> {
    Canary::ALL.into_iter().find(|canary| canary.name() == name)
}

fn one(args: &Args, seed: u64, canary: Option<Canary>) -> ExitCode {
    let mut plan = Plan::new(seed);
    if args.shrink {
        plan = shrink(&plan);
        println!("{:#?}", plan.options);
        println!("muted: {:?} from {}", plan.muted, plan.muted_from);
    }
    if args.trace || args.shrink {
        for fault in &plan.faults {
            println!("planned at {} ms: {:?}", fault.at_us / 1_000, fault.kind);
        }
    }
    let outcome = run_guarded(&plan, args.trace || args.shrink);
    let failed = match outcome {
        Err(panic) => Some(format!("panic: {panic}")),
        Ok(outcome) => {
            print!("{}", outcome.trace.text());
            println!(
                "seed {seed}: {} happenings, {} ms simulated, {:?}",
                outcome.events,
                outcome.simulated_ns / 1_000_000,
                outcome.seen
            );
            let violation = outcome.violation;
            violation.map(|v| format!("{} at {} us: {}", v.kind, v.at / 1_000, v.what))
        }
    };
    match failed {
        None => ExitCode::SUCCESS,
        Some(what) => {
            println!(
                "seed {seed} VIOLATION {what}\nagain: {}",
                rerun(seed, canary)
            );
            ExitCode::FAILURE
        }
    }
}

fn campaign(args: &Args, canary: Option<Canary>, max_failures: usize) -> Campaign {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    Campaign {
        from: args.from,
        seeds: args.seeds,
        threads: args.threads.unwrap_or(cores),
        max_failures,
        canary,
    }
}

fn many(args: &Args, canary: Option<Canary>) -> ExitCode {
    let began = Instant::now();
    let told = std::sync::atomic::AtomicU64::new(0);
    let report = campaign(args, canary, args.max_failures).run(&|seeds, failures| {
        for failure in failures {
            eprintln!(
                "seed {} {}: {}\n  {}",
                failure.seed, failure.kind, failure.what, failure.rerun
            );
        }
        let step = seeds / 20_000;
        if told.swap(step, std::sync::atomic::Ordering::Relaxed) < step {
            eprintln!("{seeds} seeds in {:.0} s", began.elapsed().as_secs_f64());
        }
    });
    let seconds = began.elapsed().as_secs_f64();
    let rate = report.seeds as f64 / seconds;
    if args.json {
        let json = json!({
            "simulator": "seeds",
            "from": args.from,
            "seeds": report.seeds,
            "seconds": seconds,
            "seeds_per_s": rate,
            "events": report.events,
            "simulated_s": report.simulated_s,
            "seen": report.seen,
            "violations": report.failures.len(),
            "failures": report.failures,
        });
        println!("{json}");
    } else {
        println!(
            "{} seeds in {seconds:.1} s, {rate:.0}/s, {} failed; {:?}",
            report.seeds,
            report.failures.len(),
            report.seen
        );
    }
    if report.failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn all_canaries(args: &Args) -> ExitCode {
    let mut missed = 0;
    let mut found = Vec::new();
    for canary in Canary::ALL {
        let report = campaign(args, Some(canary), 1).run(&|_, _| {});
        let first = report.failures.first();
        missed += u64::from(first.is_none());
        let (seeds, kind) = match first {
            Some(failure) => (Some(failure.seed - args.from + 1), failure.kind.clone()),
            None => (None, String::new()),
        };
        if !args.json {
            let seeds = seeds.map_or("not found".to_owned(), |seeds| format!("{seeds} seeds"));
            println!("{:<26} {seeds:>12}  {kind}", canary.name());
        }
        found.push(json!({ "canary": canary.name(), "seeds": seeds, "kind": kind }));
    }
    if args.json {
        println!(
            "{}",
            json!({ "simulator": "canaries", "canaries": found, "missed": missed })
        );
    }
    if missed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
