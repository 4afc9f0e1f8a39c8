//! The clock of everything that is measured here: CLOCK_MONOTONIC in nanoseconds, the same in every
//! process of the machine, so that times of different programs can be laid side by side.

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds of CLOCK_MONOTONIC.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub(crate) struct Moment(pub(crate) u64);

impl Moment {
    /// Before everything.
    pub(crate) const START: Self = Self(0);
    /// After everything: the time of what never happened.
    pub(crate) const NEVER: Self = Self(u64::MAX);

    /// Now.
    pub(crate) fn now() -> Self {
        let time = clock_gettime(ClockId::Monotonic);
        let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
        let rest = u64::try_from(time.tv_nsec).unwrap_or(0);
        Self(seconds * 1_000_000_000 + rest)
    }

    /// Nanoseconds from `earlier` to this; 0 if it is not earlier.
    pub(crate) fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// This and some time.
    #[must_use]
    pub(crate) fn plus(self, time: std::time::Duration) -> Self {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(nanoseconds))
    }

    /// Seconds from `start` to this, for people.
    pub(crate) fn seconds_since(self, start: Self) -> f64 {
        self.since(start) as f64 / 1e9
    }
}
