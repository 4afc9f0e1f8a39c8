//! Whether the answers that clients got can be those of one copy of the data.
//!
//! A history is the operations on one key: when each was called, when it was answered, and what was
//! said. It is **linearizable** (Herlihy and Wing, 1990) if the operations can be put in one order that
//! gives the same answers and in which nothing that was answered before another was called comes after
//! it. Keys are independent of each other, so each is checked on its own; linearizability is local.
//!
//! Since every value is written once, this needs no search: [`register`] is exact in O(n log n), and so
//! is [`sequence`] for counters and logs, whose answers tell the order. An operation that was never
//! answered may have happened at any time after its call, or never.
//!
//! Findings are counted as *lost* (an acknowledged write that a later answer does not know and that is
//! never seen again) or *contradictory* (every other answer that no order explains).
#![allow(dead_code)] // parts of it are for benchmarks to come

pub(crate) mod register;
pub(crate) mod sequence;

use crate::monotonic::Moment;

/// When an operation was called and answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    /// Before the request was sent.
    pub(crate) call: Moment,
    /// After the answer had come; [`Moment::NEVER`] if none did.
    pub(crate) answer: Moment,
}

impl Span {
    /// Whether this was over before the other began.
    pub(crate) fn precedes(self, other: Self) -> bool {
        self.answer < other.call
    }

    /// Whether an answer came.
    pub(crate) fn is_answered(self) -> bool {
        self.answer != Moment::NEVER
    }
}

/// A value or token that is written only once: who wrote it, and how many it had written before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct WriteId {
    /// Number of the connection.
    pub(crate) connection: u16,
    /// Number of the write on that connection.
    pub(crate) sequence: u32,
}

impl std::fmt::Display for WriteId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:04x}.{:08x}", self.connection, self.sequence)
    }
}

/// Length of a [`WriteId`] as text.
pub(crate) const WRITE_ID_LENGTH: usize = 13;

impl std::str::FromStr for WriteId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let id = text.split_once('.').and_then(|(connection, sequence)| {
            Some(Self {
                connection: u16::from_str_radix(connection, 16).ok()?,
                sequence: u32::from_str_radix(sequence, 16).ok()?,
            })
        });
        // Only what `Display` prints: a value that was changed on the way is not to pass for another.
        id.filter(|id| id.to_string() == text).ok_or(())
    }
}

/// Findings that are described in words; all are counted.
pub(crate) const DESCRIBED: usize = 8;

/// What the check of a history found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Acknowledged writes that are gone.
    pub(crate) lost: u64,
    /// Answers that contradict others.
    pub(crate) contradictory: u64,
    /// The first findings in words.
    pub(crate) described: Vec<String>,
}

impl Verdict {
    /// Whether nothing was found.
    pub(crate) fn is_clean(&self) -> bool {
        self.lost == 0 && self.contradictory == 0
    }

    /// Counts a lost write.
    pub(crate) fn lose(&mut self, describe: impl FnOnce() -> String) {
        self.lost += 1;
        self.describe(describe);
    }

    /// Counts a contradictory answer.
    pub(crate) fn contradict(&mut self, describe: impl FnOnce() -> String) {
        self.contradictory += 1;
        self.describe(describe);
    }

    /// Adds the findings of another history.
    pub(crate) fn add(&mut self, other: Self) {
        self.lost += other.lost;
        self.contradictory += other.contradictory;
        let room = DESCRIBED.saturating_sub(self.described.len());
        self.described
            .extend(other.described.into_iter().take(room));
    }

    fn describe(&mut self, describe: impl FnOnce() -> String) {
        if self.described.len() < DESCRIBED {
            self.described.push(describe());
        }
    }
}

#[cfg(test)]
mod tests;
