//! When the dirty log is cleared at a numbered exit, so that the next delta is small.
//!
//! A delta holds every page written since the log was last cleared, on both sides or between exits; only
//! the latter differ on a replica. Clearing often keeps the former few, but each cleared page costs a
//! program a fault when it is written again. So: often while deltas come and are large, seldom while
//! none comes. Pure: the caller clears.

use devices::VirtualTime;

/// Least time between two clearings, in ns of virtual time.
const MIN_NS: u64 = 15_000_000;
/// Most of it: what bounds the first delta after a time without any.
const MAX_NS: u64 = 250_000_000;
/// A delta of more pages than this is large.
const LARGE_PAGES: u64 = 24;

/// When the dirty log was cleared, and when it is to be next.
#[derive(Debug, Clone)]
pub(crate) struct DirtyClearing {
    at: VirtualTime,
    interval_ns: u64,
    delta_since: bool,
}

impl DirtyClearing {
    pub(crate) fn new(now: VirtualTime) -> Self {
        Self {
            at: now,
            interval_ns: MAX_NS,
            delta_since: false,
        }
    }

    /// Whether it is time to clear the log.
    pub(crate) fn is_due(&self, now: VirtualTime) -> bool {
        now.0.saturating_sub(self.at.0) >= self.interval_ns
    }

    /// It was cleared without a delta.
    pub(crate) fn cleared(&mut self, now: VirtualTime) {
        if !self.delta_since {
            self.interval_ns = (self.interval_ns * 2).min(MAX_NS);
        }
        self.delta_since = false;
        self.at = now;
    }

    /// A delta of so many pages has cleared it.
    pub(crate) fn delta(&mut self, now: VirtualTime, pages: u64) {
        if pages > LARGE_PAGES {
            self.interval_ns = (self.interval_ns / 4).max(MIN_NS);
        }
        self.delta_since = true;
        self.at = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_deltas_make_clearing_frequent_and_their_absence_seldom_again() {
        let mut clearing = DirtyClearing::new(VirtualTime(0));
        assert!(!clearing.is_due(VirtualTime(MAX_NS - 1)));
        assert!(clearing.is_due(VirtualTime(MAX_NS)));
        for _ in 0..3 {
            clearing.delta(VirtualTime(0), LARGE_PAGES + 1);
        }
        assert!(clearing.is_due(VirtualTime(MIN_NS)));
        clearing.cleared(VirtualTime(0));
        assert!(clearing.is_due(VirtualTime(MIN_NS)), "one delta came since");
        for _ in 0..5 {
            clearing.cleared(VirtualTime(0));
        }
        assert!(!clearing.is_due(VirtualTime(MAX_NS - 1)));
    }

    #[test]
    fn small_deltas_leave_the_interval() {
        let mut clearing = DirtyClearing::new(VirtualTime(0));
        clearing.delta(VirtualTime(0), LARGE_PAGES);
        assert!(!clearing.is_due(VirtualTime(MAX_NS - 1)));
    }
}
