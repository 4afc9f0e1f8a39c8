//! A failing seed with as little trouble as still fails: leaves out faults, faults at milestones and
//! options, one after the other, as long as the same promise is broken.

use crate::campaign::run_guarded;
use crate::plan::{Fault, Options, Plan};

/// Runs at the most.
const MAX_RUNS: usize = 400;

/// Which promise a plan breaks.
#[must_use]
pub fn breaks(plan: &Plan) -> Option<String> {
    match run_guarded(plan, false) {
        Err(_) => Some("panic".to_owned()),
        Ok(outcome) => outcome.violation.map(|violation| violation.kind.to_owned()),
    }
}

/// The plan with as little as still breaks the same promise.
#[must_use]
pub fn shrink(plan: &Plan) -> Plan {
    let Some(kind) = breaks(plan) else {
        return plan.clone();
    };
    let mut best = plan.clone();
    let mut runs = 0;
    let still = |candidate: &Plan, runs: &mut usize| {
        *runs += 1;
        *runs <= MAX_RUNS && breaks(candidate).as_ref() == Some(&kind)
    };
    loop {
        let before = best.clone();
        shrink_faults(&mut best, &mut |plan| still(plan, &mut runs));
        shrink_triggers(&mut best, &mut |plan| still(plan, &mut runs));
        for simpler in CALMER {
            let mut candidate = best.clone();
            simpler(&mut candidate.options);
            if candidate != best && still(&candidate, &mut runs) {
                best = candidate;
            }
        }
        if best == before || runs >= MAX_RUNS {
            return best;
        }
    }
}

fn shrink_faults(best: &mut Plan, still: &mut dyn FnMut(&Plan) -> bool) {
    let mut index = best.faults.len();
    while index > 0 {
        index -= 1;
        let mut faults: Vec<Fault> = best.faults.clone();
        faults.remove(index);
        let candidate = Plan {
            faults,
            ..best.clone()
        };
        if still(&candidate) {
            *best = candidate;
        }
    }
}

fn shrink_triggers(best: &mut Plan, still: &mut dyn FnMut(&Plan) -> bool) {
    let fired = |plan: &Plan| {
        run_guarded(plan, false).map_or_else(|_| Vec::new(), |outcome| outcome.triggers)
    };
    let triggers = fired(best);
    let none = Plan {
        muted_from: 0,
        ..best.clone()
    };
    if triggers.is_empty() || still(&none) {
        if !triggers.is_empty() {
            *best = none;
        }
        return;
    }
    for number in triggers.into_iter().rev() {
        let mut candidate = best.clone();
        candidate.muted.push(number);
        if still(&candidate) {
            *best = candidate;
        }
    }
}

type Calmer = fn(&mut Options);

/// Options, each set to what makes the least trouble.
const CALMER: [Calmer; 19] = [
    |options| options.hosts = 2,
    |options| options.drift_ppm = 0,
    |options| options.clients = 1,
    |options| options.jitter_us = 0,
    |options| options.beat_loss = 0,
    |options| options.beat_twice = 0,
    |options| options.message_loss = 0,
    |options| options.kick = 0,
    |options| options.big_delta = 0,
    |options| options.stall = 0,
    |options| options.late_write = 0,
    |options| options.dir_error = 0,
    |options| options.dir_done_error = 0,
    |options| options.stale_us = 0,
    |options| options.transfer_chunks = 1,
    |options| options.trigger = 0,
    |options| options.relapse = 0,
    |options| options.trouble_ms = options.trouble_ms / 2 + 100,
    |options| options.gate_count = 4096,
];
