//! What the backup has acknowledged, and how far it is behind.
//!
//! Owner: the VMM's side of the channel, one tracker for each session. Always true: both
//! positions only grow; the marks kept are bounded, so that lag is exact to within the spacing of the marks.

use std::collections::VecDeque;
use std::time::Duration;

use format::{AckRecord, ExitNumber, Seq};

use crate::time::Time;

/// The most marks kept. When they are full every other one is dropped.
pub const MAX_MARKS: usize = 1024;

/// Where the primary was when an append was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// The position after the append.
    pub next: Seq,
    /// The exit at which it was made.
    pub exit: ExitNumber,
    /// How long the vCPU had run then, holds not counted.
    pub ran: Duration,
    /// When.
    pub at: Time,
}

/// How far the backup is behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Lag {
    /// Appends not yet replayed.
    pub appends: u64,
    /// Exits of the primary since the oldest append that is not yet replayed.
    pub exits: u64,
    /// vCPU time of the primary since then: what the backup has yet to run.
    pub run: Duration,
    /// Age of that append.
    pub age: Duration,
}

/// Follows one session's acknowledgements.
#[derive(Debug)]
pub struct AckTracker {
    last: Mark,
    record: AckRecord,
    unreplayed: VecDeque<Mark>,
    stalled_since: Option<Time>,
    replay_stalled_since: Option<Time>,
}

impl AckTracker {
    /// A session that begins with an empty log where the primary is at `start` (its `next` is 0).
    #[must_use]
    pub fn new(start: Mark) -> Self {
        Self {
            last: start,
            record: AckRecord::default(),
            unreplayed: VecDeque::new(),
            stalled_since: None,
            replay_stalled_since: None,
        }
    }

    /// Appends were made up to `mark`.
    pub fn appended(&mut self, mark: Mark) {
        if mark.next <= self.last.next {
            self.last = Mark {
                next: self.last.next,
                ..mark
            };
            return;
        }
        self.stalled_since.get_or_insert(mark.at);
        self.replay_stalled_since.get_or_insert(mark.at);
        self.last = mark;
        if self.unreplayed.len() == MAX_MARKS {
            // Keeping the older mark of each pair states the lag too high, never too low.
            let mut index = 0;
            self.unreplayed.retain(|_| {
                index += 1;
                index % 2 == 1
            });
        }
        self.unreplayed.push_back(mark);
    }

    /// An acknowledgement came. Older or impossible ones change nothing; returns whether it told
    /// something new.
    pub fn acked(&mut self, now: Time, record: AckRecord) -> bool {
        let sane = record.received <= self.last.next && record.replayed <= record.received;
        let news = record.received > self.record.received || record.replayed > self.record.replayed;
        if !sane || !news {
            return false;
        }
        if record.replayed > self.record.replayed {
            self.record.replayed = record.replayed;
            self.replay_stalled_since = (self.record.replayed < self.last.next).then_some(now);
        }
        if record.received > self.record.received {
            self.record.received = record.received;
            self.stalled_since = (self.record.received < self.last.next).then_some(now);
        }
        while self
            .unreplayed
            .front()
            .is_some_and(|mark| mark.next <= self.record.replayed)
        {
            self.unreplayed.pop_front();
        }
        true
    }

    /// The newest acknowledgement.
    #[must_use]
    pub fn record(&self) -> AckRecord {
        self.record
    }

    /// The position after the last append.
    #[must_use]
    pub fn next(&self) -> Seq {
        self.last.next
    }

    /// Since when an acknowledgement has been owed without any progress.
    #[must_use]
    pub fn stalled_since(&self) -> Option<Time> {
        self.stalled_since
    }

    /// Since when replay has been behind without any progress. Pacing holds a guest whose backup does not
    /// replay: then nothing is appended, no acknowledgement is owed, and only this tells.
    #[must_use]
    pub fn replay_stalled_since(&self) -> Option<Time> {
        self.replay_stalled_since
    }

    /// How far replay is behind, at the last [`AckTracker::appended`].
    #[must_use]
    pub fn lag(&self) -> Lag {
        let Some(oldest) = self.unreplayed.front() else {
            return Lag::default();
        };
        Lag {
            appends: self.last.next.0 - self.record.replayed.0,
            exits: self.last.exit.0.saturating_sub(oldest.exit.0),
            run: self.last.ran.saturating_sub(oldest.ran),
            age: self.last.at.since(oldest.at),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(next: u64) -> Mark {
        Mark {
            next: Seq(next),
            exit: ExitNumber(10 * next),
            ran: Duration::from_micros(100 * next),
            at: Time(1000 * next),
        }
    }

    fn record(received: u64, replayed: u64) -> AckRecord {
        AckRecord {
            received: Seq(received),
            replayed: Seq(replayed),
        }
    }

    #[test]
    fn an_acknowledgement_is_owed_from_the_first_append_and_progress_resets_the_wait() {
        let mut acks = AckTracker::new(mark(0));
        assert_eq!(acks.stalled_since(), None);
        acks.appended(mark(1));
        acks.appended(mark(3));
        assert_eq!(acks.stalled_since(), Some(Time(1000)));
        assert!(acks.acked(Time(5000), record(2, 0)));
        assert_eq!(acks.stalled_since(), Some(Time(5000)));
        assert!(acks.acked(Time(6000), record(3, 0)));
        assert_eq!(acks.stalled_since(), None);
    }

    #[test]
    fn replay_that_is_behind_and_does_not_move_shows_although_all_is_received() {
        let mut acks = AckTracker::new(mark(0));
        acks.appended(mark(3));
        assert!(acks.acked(Time(5000), record(3, 0)));
        assert_eq!(acks.replay_stalled_since(), Some(Time(3000)));
        assert!(acks.acked(Time(6000), record(3, 2)));
        assert_eq!(acks.replay_stalled_since(), Some(Time(6000)));
        assert!(acks.acked(Time(7000), record(3, 3)));
        assert_eq!(acks.replay_stalled_since(), None);
    }

    #[test]
    fn impossible_and_old_acknowledgements_change_nothing() {
        let mut acks = AckTracker::new(mark(0));
        acks.appended(mark(3));
        assert!(!acks.acked(Time(1), record(4, 0)));
        assert!(!acks.acked(Time(1), record(2, 3)));
        assert!(acks.acked(Time(1), record(2, 2)));
        assert!(!acks.acked(Time(1), record(1, 1)));
        assert_eq!(acks.record(), record(2, 2));
    }

    #[test]
    fn lag_counts_from_the_oldest_append_that_is_not_replayed() {
        let mut acks = AckTracker::new(mark(0));
        for next in 1..=10 {
            acks.appended(mark(next));
        }
        acks.acked(Time(0), record(10, 4));
        let lag = acks.lag();
        assert_eq!((lag.appends, lag.exits), (6, 50));
        assert_eq!(lag.run, Duration::from_micros(500));
        acks.acked(Time(0), record(10, 10));
        assert_eq!(acks.lag(), Lag::default());
    }

    #[test]
    fn marks_are_bounded_and_thinning_never_hides_lag() {
        let mut acks = AckTracker::new(mark(0));
        for next in 1..=10_000 {
            acks.appended(mark(next));
            assert!(acks.unreplayed.len() <= MAX_MARKS);
        }
        assert_eq!(acks.lag().exits, 10 * 9_999);
    }
}
