//! Many seeds on all cores.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use ft::canary::Canary;
use serde::Serialize;

use crate::plan::Plan;
use crate::sim::{Outcome, Seen, run};

/// Seeds that a thread takes at a time.
const BATCH: u64 = 64;

/// A seed that failed.
#[derive(Debug, Clone, Serialize, PartialEq, Eq)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// Which promise.
    pub kind: String,
    /// What was seen.
    pub what: String,
    /// Runs it again.
    pub rerun: String,
}

/// What a campaign found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Seeds that were run.
    pub seeds: u64,
    /// Happenings in all of them.
    pub events: u64,
    /// Simulated seconds.
    pub simulated_s: f64,
    /// What happened in all of them.
    pub seen: Seen,
    /// Those that failed, by their number.
    pub failures: Vec<Failure>,
}

/// What a campaign tells while it runs, one thread at a time: how many seeds are done, and those of
/// the last batch that failed.
pub type Progress<'a> = dyn Fn(u64, &[Failure]) + Sync + 'a;

/// What a campaign runs.
#[derive(Debug, Clone, Copy)]
pub struct Campaign {
    /// The first seed.
    pub from: u64,
    /// How many.
    pub seeds: u64,
    /// Threads.
    pub threads: usize,
    /// Failures after which it stops.
    pub max_failures: usize,
    /// The planted bug that is switched on.
    pub canary: Option<Canary>,
}

/// The command that runs a seed again.
#[must_use]
pub fn rerun(seed: u64, canary: Option<Canary>) -> String {
    let (features, canary) = match canary {
        Some(canary) => (
            " --features canaries",
            format!(" --canary {}", canary.name()),
        ),
        None => ("", String::new()),
    };
    format!("cargo run --release -p simulator{features} -- --seed {seed}{canary} --trace")
}

/// Runs one plan; an assertion that fails in the protocol is a violation, too.
///
/// # Errors
/// The words of the panic.
pub fn run_guarded(plan: &Plan, trace: bool) -> Result<Outcome, String> {
    let run = AssertUnwindSafe(|| run(plan, trace));
    catch_unwind(run).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        text.unwrap_or_else(|| "a panic without words".to_owned())
    })
}

/// Switches a planted bug on in this thread; false where this build has none.
#[must_use]
pub fn plant(canary: Option<Canary>) -> bool {
    #[cfg(feature = "canaries")]
    ft::canary::set(canary);
    cfg!(feature = "canaries") || canary.is_none()
}

impl Campaign {
    /// Runs it.
    #[must_use]
    pub fn run(&self, progress: &Progress<'_>) -> Report {
        let next = AtomicU64::new(self.from);
        let stop = AtomicBool::new(false);
        let report = Mutex::new(Report::default());
        std::thread::scope(|scope| {
            for _ in 0..self.threads.max(1) {
                scope.spawn(|| {
                    assert!(
                        plant(self.canary),
                        "a build with the feature `canaries` is asked for"
                    );
                    self.work(&next, &stop, &report, progress);
                });
            }
        });
        let mut report = report.into_inner().unwrap_or_else(PoisonError::into_inner);
        report.failures.sort_by_key(|failure| failure.seed);
        report
    }

    fn work(
        &self,
        next: &AtomicU64,
        stop: &AtomicBool,
        report: &Mutex<Report>,
        progress: &Progress<'_>,
    ) {
        let end = self.from + self.seeds;
        loop {
            let first = next.fetch_add(BATCH, Ordering::Relaxed);
            if first >= end || stop.load(Ordering::Relaxed) {
                return;
            }
            let mut part = Report::default();
            for seed in first..(first + BATCH).min(end) {
                part.add(seed, run_guarded(&Plan::new(seed), false), self.canary);
                if !part.failures.is_empty() && self.max_failures <= 1 {
                    break;
                }
            }
            let mut all = report.lock().unwrap_or_else(PoisonError::into_inner);
            progress(all.seeds + part.seeds, &part.failures);
            all.merge(part);
            if all.failures.len() >= self.max_failures {
                stop.store(true, Ordering::Relaxed);
            }
        }
    }
}

impl Report {
    fn add(&mut self, seed: u64, outcome: Result<Outcome, String>, canary: Option<Canary>) {
        self.seeds += 1;
        let (kind, what) = match outcome {
            Err(what) => ("panic".to_owned(), what),
            Ok(outcome) => {
                self.events += outcome.events;
                self.simulated_s += outcome.simulated_ns as f64 / 1e9;
                self.seen = self.seen.plus(&outcome.seen);
                match outcome.violation {
                    None => return,
                    Some(violation) => (violation.kind.to_owned(), violation.what),
                }
            }
        };
        let rerun = rerun(seed, canary);
        self.failures.push(Failure {
            seed,
            kind,
            what,
            rerun,
        });
    }

    fn merge(&mut self, other: Self) {
        self.seeds += other.seeds;
        self.events += other.events;
        self.simulated_s += other.simulated_s;
        self.seen = self.seen.plus(&other.seen);
        self.failures.extend(other.failures);
    }
}

impl Seen {
    /// Both together.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            failovers: self.failovers + other.failovers,
            alone: self.alone + other.alone,
            protected: self.protected + other.protected,
            cold_starts: self.cold_starts + other.cold_starts,
            answers: self.answers + other.answers,
            quarantined: self.quarantined + other.quarantined,
            folded: self.folded + other.folded,
            late_writes: self.late_writes + other.late_writes,
            deltas: self.deltas + other.deltas,
            divergences: self.divergences + other.divergences,
            switch_overs: self.switch_overs + other.switch_overs,
            power_offs: self.power_offs + other.power_offs,
            renewals: self.renewals + other.renewals,
        }
    }
}
