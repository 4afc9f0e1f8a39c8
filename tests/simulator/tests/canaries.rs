//! Planted bugs: the simulator finds every one of them. Built with the feature `canaries` only.

use ft::canary::Canary;
use simulator::campaign::{Campaign, plant};
use simulator::plan::Plan;
use simulator::shrink::{breaks, shrink};

/// Seeds in which each must be found.
const SEEDS: u64 = 10_000;

#[test]
fn every_planted_bug_is_found() {
    std::panic::set_hook(Box::new(|_| {}));
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut missed = Vec::new();
    for canary in Canary::ALL {
        let campaign = Campaign {
            from: 0,
            seeds: SEEDS,
            threads,
            max_failures: 1,
            canary: Some(canary),
        };
        let report = campaign.run(&|_, _| {});
        match report.failures.first() {
            Some(first) => println!(
                "{:<26} {:>6} seeds  {}",
                canary.name(),
                first.seed + 1,
                first.kind
            ),
            None => missed.push(canary.name()),
        }
    }
    assert!(
        missed.is_empty(),
        "not found within {SEEDS} seeds each: {missed:?}"
    );
}

#[test]
fn a_failing_seed_shrinks_to_one_with_less_trouble_that_breaks_the_same_promise() {
    assert!(plant(Some(Canary::ExistsIsLost)));
    let failing = (0..2_000)
        .map(Plan::new)
        .find(|plan| breaks(plan).is_some());
    let failing = failing.expect("it is found in a few seeds");
    let small = shrink(&failing);
    assert_eq!(breaks(&small), breaks(&failing));
    assert!(small.faults.len() <= failing.faults.len());
    assert!(small != failing, "there was nothing to leave out");
}
