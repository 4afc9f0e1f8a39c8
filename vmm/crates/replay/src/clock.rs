//! Virtual time from the host's clock: never back, never in a jump.
//!
//! While the VM runs, virtual time follows the host's monotonic clock. A gap longer than
//! [`MAX_STEP_NS`] (the VM was stopped, its host was suspended, another host took over) moves it by that
//! step only; the rest is caught up at [`CATCH_UP_PERCENT`] per cent above real speed, so that a guest
//! sees a clock that runs a little fast rather than a burst of ticks. Pure: the caller reads the
//! host's clock.

use devices::VirtualTime;

/// The most that virtual time moves between two samples, in ns.
pub(crate) const MAX_STEP_NS: u64 = 100_000_000;
/// How much faster than real time it runs while it catches up, in per cent.
pub(crate) const CATCH_UP_PERCENT: u64 = 10;

/// Turns samples of the host's clock into virtual time.
#[derive(Debug, Clone)]
pub struct VirtualClock {
    virtual_ns: u64,
    host_ns: u64,
    /// How far virtual time is behind where it ought to be, in ns.
    debt_ns: u64,
}

impl VirtualClock {
    /// A clock that stands at `now` when the host's stands at `host_ns`, and ought to stand
    /// `behind_ns` later.
    #[must_use]
    pub fn new(now: VirtualTime, host_ns: u64, behind_ns: u64) -> Self {
        Self {
            virtual_ns: now.0,
            host_ns,
            debt_ns: behind_ns,
        }
    }

    /// Virtual time when the host's monotonic clock shows `host_ns`.
    pub fn sample(&mut self, host_ns: u64) -> VirtualTime {
        let passed = host_ns.saturating_sub(self.host_ns);
        self.host_ns = self.host_ns.max(host_ns);
        let step = passed.min(MAX_STEP_NS);
        self.debt_ns += passed - step;
        let extra = (step * CATCH_UP_PERCENT / 100).min(self.debt_ns);
        self.debt_ns -= extra;
        self.virtual_ns += step + extra;
        VirtualTime(self.virtual_ns)
    }

    /// Host time until virtual time reaches `target`, in ns, at the present speed.
    #[must_use]
    pub fn host_ns_until(&self, target: VirtualTime) -> u64 {
        let ahead = target.0.saturating_sub(self.virtual_ns);
        if self.debt_ns == 0 {
            ahead
        } else {
            ahead * 100 / (100 + CATCH_UP_PERCENT)
        }
    }

    /// The host's clock when virtual time ought to reach `target`.
    #[must_use]
    pub fn host_deadline(&self, target: VirtualTime) -> u64 {
        self.host_ns + self.host_ns_until(target)
    }

    /// Adds to what has to be caught up, in ns.
    pub fn add_debt(&mut self, ns: u64) {
        self.debt_ns += ns;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_the_host_without_a_gap() {
        let mut clock = VirtualClock::new(VirtualTime(500), 1_000, 0);
        assert_eq!(clock.sample(1_700), VirtualTime(1_200));
        assert_eq!(clock.sample(1_700), VirtualTime(1_200));
        assert_eq!(clock.sample(1_600), VirtualTime(1_200), "never back");
    }

    #[test]
    fn a_long_gap_is_caught_up_slowly_and_wholly() {
        let mut clock = VirtualClock::new(VirtualTime(0), 0, 0);
        let second = 1_000_000_000;
        let mut last = clock.sample(5 * second).0;
        assert_eq!(last, MAX_STEP_NS + MAX_STEP_NS / 10);
        let mut host = 5 * second;
        for _ in 0..6_000 {
            host += second / 100;
            let now = clock.sample(host).0;
            assert!(now - last <= second / 100 * (100 + CATCH_UP_PERCENT) / 100);
            last = now;
        }
        assert_eq!(last, host, "caught up");
    }
}
