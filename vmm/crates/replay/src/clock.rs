//! Virtual time from the host's clock: never back, never in a jump.
//!
//! While the VM runs, virtual time follows the host's monotonic clock. A gap longer than
//! [`MAX_STEP_NS`] (the VM was stopped, its host was suspended, another host took over) moves it by that
//! step only; the rest is a debt, which is paid by running faster than real time: so fast that it is paid
//! within [`PAID_WITHIN_NS`], but by [`FASTEST_PERCENT`] per cent at the most, so that a guest sees a clock
//! that runs fast for a while rather than a burst of ticks. Timers and the counter speed up alike: to the
//! guest its processor is slower meanwhile. The speed changes only where a debt grows or ends, so that
//! deadlines between hold. Pure: the caller reads the host's clock.

use devices::VirtualTime;

/// The most that virtual time moves between two samples, in ns, before what is caught up.
pub(crate) const MAX_STEP_NS: u64 = 100_000_000;
/// A debt is paid within so much real time, unless it is larger than this.
pub(crate) const PAID_WITHIN_NS: u64 = 2_000_000_000;
/// How much faster than real time the clock runs at the most while it catches up, in per cent.
pub(crate) const FASTEST_PERCENT: u64 = 100;
/// The same at the least.
pub(crate) const SLOWEST_PERCENT: u64 = 10;

/// Turns samples of the host's clock into virtual time.
#[derive(Debug, Clone)]
pub struct VirtualClock {
    virtual_ns: u64,
    host_ns: u64,
    /// How far virtual time is behind where it ought to be, in ns.
    debt_ns: u64,
    /// How much faster than real time it runs while there is a debt, in per cent.
    percent: u64,
}

impl VirtualClock {
    /// A clock that stands at `now` when the host's stands at `host_ns`, and ought to stand
    /// `behind_ns` later.
    #[must_use]
    pub fn new(now: VirtualTime, host_ns: u64, behind_ns: u64) -> Self {
        let mut clock = Self {
            virtual_ns: now.0,
            host_ns,
            debt_ns: 0,
            percent: 0,
        };
        clock.owe(behind_ns);
        clock
    }

    fn owe(&mut self, ns: u64) {
        if ns == 0 {
            return;
        }
        self.debt_ns += ns;
        let wanted = self.debt_ns.saturating_mul(100).div_ceil(PAID_WITHIN_NS);
        self.percent = self
            .percent
            .max(wanted.clamp(SLOWEST_PERCENT, FASTEST_PERCENT));
    }

    /// Virtual time when the host's monotonic clock shows `host_ns`.
    pub fn sample(&mut self, host_ns: u64) -> VirtualTime {
        let passed = host_ns.saturating_sub(self.host_ns);
        self.host_ns = self.host_ns.max(host_ns);
        let step = passed.min(MAX_STEP_NS);
        self.owe(passed - step);
        let extra = (step * self.percent / 100).min(self.debt_ns);
        self.debt_ns -= extra;
        if self.debt_ns == 0 {
            self.percent = 0;
        }
        self.virtual_ns += step + extra;
        VirtualTime(self.virtual_ns)
    }

    /// Host time until virtual time reaches `target`, in ns, at the present speed.
    #[must_use]
    pub fn host_ns_until(&self, target: VirtualTime) -> u64 {
        let ahead = target.0.saturating_sub(self.virtual_ns);
        let fast = ahead.saturating_mul(100).div_ceil(100 + self.percent);
        // What is left of the debt may be less than that speed would pay on the way.
        fast.max(ahead.saturating_sub(self.debt_ns))
    }

    /// The host's clock when virtual time ought to reach `target`.
    #[must_use]
    pub fn host_deadline(&self, target: VirtualTime) -> u64 {
        self.host_ns + self.host_ns_until(target)
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

    const SECOND: u64 = 1_000_000_000;

    /// Samples every 10 ms until the clock shows what the host's does. Returns the host time that it took and the
    /// largest step.
    fn catch_up(clock: &mut VirtualClock, from: u64) -> (u64, u64) {
        let (mut host, mut last, mut most) = (from, clock.sample(from).0, 0);
        while last < host {
            host += SECOND / 100;
            let now = clock.sample(host).0;
            most = most.max(now - last);
            last = now;
        }
        assert_eq!(last, host, "and no further");
        (host - from, most)
    }

    #[test]
    fn a_gap_is_caught_up_within_two_seconds() {
        for gap in [SECOND / 2, SECOND, 2 * SECOND] {
            let mut clock = VirtualClock::new(VirtualTime(0), 0, 0);
            let (took, most) = catch_up(&mut clock, gap);
            assert!(took <= PAID_WITHIN_NS, "{took}");
            assert!(most <= SECOND / 100 * (100 + FASTEST_PERCENT) / 100);
        }
    }

    #[test]
    fn a_small_gap_is_caught_up_slowly_and_a_large_one_at_twice_real_speed() {
        let mut clock = VirtualClock::new(VirtualTime(0), 0, 0);
        let (_, most) = catch_up(&mut clock, MAX_STEP_NS + SECOND / 20);
        assert_eq!(most, SECOND / 100 * (100 + SLOWEST_PERCENT) / 100);
        let mut clock = VirtualClock::new(VirtualTime(0), 0, 60 * SECOND);
        assert_eq!(clock.sample(MAX_STEP_NS).0, 2 * MAX_STEP_NS);
        assert_eq!(clock.sample(10 * SECOND).0, 4 * MAX_STEP_NS, "no jump");
    }

    #[test]
    fn a_clock_that_has_caught_up_follows_the_host_again() {
        let mut clock = VirtualClock::new(VirtualTime(0), SECOND, SECOND);
        let (took, _) = catch_up(&mut clock, SECOND);
        let now = SECOND + took;
        assert_eq!(clock.sample(now + 500), VirtualTime(now + 500));
        assert_eq!(clock.host_deadline(VirtualTime(now + 900)), now + 900);
    }

    #[test]
    fn failures_every_four_seconds_with_pauses_of_a_second_and_more_do_not_add_up() {
        let (mut host, mut clock) = (0, VirtualClock::new(VirtualTime(0), 0, 0));
        for _ in 0..28 {
            // Another host goes on from the last logged value, and knows how far it is behind.
            host += 3 * SECOND / 2;
            let now = clock.sample(host - 3 * SECOND / 2);
            clock = VirtualClock::new(now, host, host - now.0);
            for _ in 0..400 {
                host += SECOND / 100;
                clock.sample(host);
            }
        }
        assert_eq!(clock.sample(host), VirtualTime(host));
    }

    #[test]
    fn a_deadline_is_met_by_the_sample_taken_there_and_not_before() {
        for behind in [0, 30_000, SECOND / 3, 5 * SECOND] {
            let mut clock = VirtualClock::new(VirtualTime(7), 1_000, behind);
            let target = VirtualTime(4_000_007);
            let deadline = clock.host_deadline(target);
            assert!(clock.clone().sample(deadline - 2) < target, "{behind}");
            assert!(clock.sample(deadline) >= target, "{behind}");
        }
    }
}
