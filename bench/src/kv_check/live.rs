//! What others may know of a check while it runs: counts, long gaps, and a way to end it.
#![allow(dead_code)] // parts of it are for benchmarks to come

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::monotonic::Moment;

/// A time in which a connection waited and got no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Gap {
    /// Which connection.
    pub(crate) connection: u16,
    /// The answer before, or the request if none was on its way then.
    pub(crate) from: Moment,
    /// The answer that ended it.
    pub(crate) to: Moment,
}

impl Gap {
    /// How long it was.
    pub(crate) fn nanoseconds(&self) -> u64 {
        self.to.since(self.from)
    }
}

/// A time in which no answer came on any connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Silence {
    /// The answer before.
    pub(crate) from: Moment,
    /// The answer that ended it.
    pub(crate) to: Moment,
}

impl Silence {
    /// How long it was.
    pub(crate) fn nanoseconds(&self) -> u64 {
        self.to.since(self.from)
    }
}

/// Silences from this length on are noted, in nanoseconds.
pub(crate) const NOTED_SILENCE_NS: u64 = 1_000_000;
/// Gaps from this length on are noted, in nanoseconds.
pub(crate) const NOTED_NS: u64 = 20_000_000;
/// Gaps kept until someone takes them; the oldest go first.
pub(crate) const GAPS_KEPT: usize = 1 << 16;

/// See the module. Counts only grow.
#[derive(Debug)]
pub(crate) struct Live {
    answers: AtomicU64,
    /// Of each connection: `NEVER` once it is broken, as nothing is waited for on it.
    last_answers: Box<[AtomicU64]>,
    broken: AtomicU64,
    lost: AtomicU64,
    contradictory: AtomicU64,
    stop: AtomicBool,
    abort: AtomicBool,
    rest: AtomicBool,
    gaps: Mutex<VecDeque<Gap>>,
    silences: Mutex<Silences>,
}

/// The silences of all connections together.
#[derive(Debug, Default)]
struct Silences {
    last_answer: Option<Moment>,
    noted: VecDeque<Silence>,
}

impl Live {
    /// Of a check with so many connections.
    pub(crate) fn new(connections: u16) -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            answers: zero(),
            last_answers: (0..connections).map(|_| zero()).collect(),
            broken: zero(),
            lost: zero(),
            contradictory: zero(),
            stop: AtomicBool::new(false),
            abort: AtomicBool::new(false),
            rest: AtomicBool::new(false),
            gaps: Mutex::default(),
            silences: Mutex::default(),
        }
    }

    /// Answers so far.
    pub(crate) fn answers(&self) -> u64 {
        self.answers.load(Ordering::Relaxed)
    }

    /// When that connection got its last answer which has waited longest since: every connection that is
    /// not broken has got one since then.
    pub(crate) fn all_answered(&self) -> Moment {
        let last = self
            .last_answers
            .iter()
            .map(|at| at.load(Ordering::Relaxed));
        Moment(last.min().unwrap_or(0))
    }

    /// Connections that broke so far.
    pub(crate) fn broken(&self) -> u64 {
        self.broken.load(Ordering::Relaxed)
    }

    /// Lost and contradictory, in what has been checked so far.
    pub(crate) fn findings(&self) -> (u64, u64) {
        let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
        (load(&self.lost), load(&self.contradictory))
    }

    /// Ends the check before its time: answers on their way are waited for, and all is checked.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Ends the check at once, without a result.
    pub(crate) fn abort(&self) {
        self.abort.store(true, Ordering::Relaxed);
    }

    /// Has nothing new asked, or asks again: connections stay as they are.
    pub(crate) fn rest(&self, on: bool) {
        self.rest.store(on, Ordering::Relaxed);
    }

    /// Takes the noted gaps that have ended so far, in the order of their ends.
    pub(crate) fn take_gaps(&self) -> Vec<Gap> {
        let mut gaps = self.gaps.lock().unwrap_or_else(PoisonError::into_inner);
        gaps.drain(..).collect()
    }

    /// Takes the noted silences that have ended so far, in their order.
    pub(crate) fn take_silences(&self) -> Vec<Silence> {
        let mut silences = self.silences.lock().unwrap_or_else(PoisonError::into_inner);
        silences.noted.drain(..).collect()
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    pub(super) fn is_resting(&self) -> bool {
        self.rest.load(Ordering::Relaxed)
    }

    pub(super) fn is_aborted(&self) -> bool {
        self.abort.load(Ordering::Relaxed)
    }

    /// An answer came, and ended this gap.
    pub(super) fn answer(&self, gap: Gap) {
        self.answers.fetch_add(1, Ordering::Relaxed);
        if let Some(last) = self.last_answers.get(usize::from(gap.connection)) {
            last.store(gap.to.0, Ordering::Relaxed);
        }
        self.end_silence(gap.to);
        if gap.nanoseconds() >= NOTED_NS {
            let mut gaps = self.gaps.lock().unwrap_or_else(PoisonError::into_inner);
            if gaps.len() == GAPS_KEPT {
                gaps.pop_front();
            }
            gaps.push_back(gap);
        }
    }

    fn end_silence(&self, to: Moment) {
        let mut silences = self.silences.lock().unwrap_or_else(PoisonError::into_inner);
        let from = silences.last_answer.replace(to).unwrap_or(to);
        let silence = Silence { from, to };
        if silence.nanoseconds() >= NOTED_SILENCE_NS {
            if silences.noted.len() == GAPS_KEPT {
                silences.noted.pop_front();
            }
            silences.noted.push_back(silence);
        }
    }

    pub(super) fn break_one(&self, connection: u16) {
        self.broken.fetch_add(1, Ordering::Relaxed);
        if let Some(last) = self.last_answers.get(usize::from(connection)) {
            last.store(Moment::NEVER.0, Ordering::Relaxed);
        }
    }

    pub(super) fn find(&self, (lost, contradictory): (u64, u64)) {
        self.lost.store(lost, Ordering::Relaxed);
        self.contradictory.store(contradictory, Ordering::Relaxed);
    }
}

impl std::fmt::Display for Live {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (lost, contradictory) = self.findings();
        write!(
            f,
            "{} answers, {lost} lost, {contradictory} contradictory, {} connections broken",
            self.answers(),
            self.broken()
        )
    }
}
