//! Which appends are shown: those at multiples of a distance, a power of two.
//!
//! The distance is the same in every process where it was set. Else each process begins with
//! [`DEFAULT_DISTANCE`] and doubles it while it shows more than a thousand events a second, so that
//! listening costs a fast log no more than a slow one. Multiples of the greater distance are multiples of
//! the smaller: what the coarsest process shows has been shown by all of them.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use rustix::time::{ClockId, clock_gettime};

/// Least distance between sampled appends, unless another is set: dense enough for a log of a thousand
/// appends a second.
pub const DEFAULT_DISTANCE: u64 = 64;
/// Environment variable with another distance, which then holds; programs that are started hand it on.
pub const DISTANCE_VARIABLE: &str = "POLLUX_SAMPLE_ONE_IN";

/// How long events are counted before more appends may be shown again, in ns.
const WINDOW_NS: u64 = 100_000_000;
/// Events of a process in that time from which on it shows fewer appends.
const MOST: u64 = 100;
/// Events in that time below which it shows more.
const FEWEST: u64 = 20;
/// The greatest distance, minus one, that a process chooses by itself.
const MASK_LIMIT: u64 = (1 << 20) - 1;

/// The distance, and what it is chosen by. Threads may miss each other's counts: that moves the choice
/// by a little.
struct Pace {
    /// Distance minus one.
    mask: AtomicU64,
    least_mask: AtomicU64,
    most: AtomicU64,
    since_ns: AtomicU64,
    shown: AtomicU64,
}

static PACE: Pace = Pace::new();

impl Pace {
    const fn new() -> Self {
        Self {
            mask: AtomicU64::new(DEFAULT_DISTANCE - 1),
            least_mask: AtomicU64::new(DEFAULT_DISTANCE - 1),
            most: AtomicU64::new(MOST),
            since_ns: AtomicU64::new(0),
            shown: AtomicU64::new(0),
        }
    }

    fn fix(&self, distance: u64) {
        let distance = distance
            .max(1)
            .checked_next_power_of_two()
            .unwrap_or(1 << 63);
        self.most.store(u64::MAX, Relaxed);
        self.least_mask.store(distance - 1, Relaxed);
        self.mask.store(distance - 1, Relaxed);
    }

    /// One more event is shown at this time.
    fn shows(&self, now_ns: u64) {
        let shown = self.shown.fetch_add(1, Relaxed) + 1;
        let elapsed = now_ns.saturating_sub(self.since_ns.load(Relaxed));
        let mut mask = self.mask.load(Relaxed);
        if elapsed >= WINDOW_NS {
            let least = self.least_mask.load(Relaxed);
            let mut rate = shown.saturating_mul(WINDOW_NS) / elapsed;
            while rate < FEWEST && mask > least {
                mask >>= 1;
                rate = 2 * rate + 1;
            }
        } else if shown >= self.most.load(Relaxed) {
            mask = (2 * mask + 1).min(MASK_LIMIT);
        } else {
            return;
        }
        self.mask.store(mask, Relaxed);
        self.since_ns.store(now_ns, Relaxed);
        self.shown.store(0, Relaxed);
    }
}

/// Shows one append in `distance`, rounded up to a power of two, however many that are. All processes of
/// a pair should be told the same; those that show more are thinned out when they are joined.
pub fn sample_one_in(distance: u64) {
    PACE.fix(distance);
}

/// The same with the distance in [`DISTANCE_VARIABLE`]. Does nothing where that is no number.
pub fn sample_as_environment_says() {
    if let Some(distance) = distance_of_environment() {
        sample_one_in(distance);
    }
}

/// The distance in [`DISTANCE_VARIABLE`], if it is a number.
pub fn distance_of_environment() -> Option<u64> {
    std::env::var(DISTANCE_VARIABLE).ok()?.trim().parse().ok()
}

/// An event is shown: called where somebody listens only. Gives the time of it, in ns of CLOCK_MONOTONIC.
#[cold]
#[inline(never)]
pub fn shows() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let now_ns = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
    PACE.shows(now_ns);
    now_ns
}

/// Whether one of the positions `from..upto` is sampled.
#[inline(always)]
pub fn sampled(from: u64, upto: u64) -> bool {
    contains_multiple(from, upto, PACE.mask.load(Relaxed))
}

/// Whether `from..upto` contains a multiple of `mask + 1`, a power of two.
#[inline(always)]
const fn contains_multiple(from: u64, upto: u64, mask: u64) -> bool {
    match from.checked_add(mask) {
        Some(beyond) => (beyond & !mask) < upto,
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn distance_after(pace: &Pace, from_ns: u64, every_ns: u64, for_ns: u64) -> u64 {
        // One event for each position that is sampled, of a log with one append in `every_ns`.
        let mut now = from_ns;
        while now < from_ns + for_ns {
            pace.shows(now);
            now += every_ns * (pace.mask.load(Relaxed) + 1);
        }
        pace.mask.load(Relaxed) + 1
    }

    #[test]
    fn a_slow_log_is_shown_densely_and_a_fast_one_at_a_bounded_rate() {
        let pace = Pace::new();
        let second = 1_000_000_000;
        assert_eq!(distance_after(&pace, 0, 1_000_000, 10 * second), 64);
        // 4 million appends a second: 200 to 1,000 events.
        let fast = distance_after(&pace, 10 * second, 250, 2 * second);
        assert!((4_096..=16_384).contains(&fast), "{fast}");
        let slow = distance_after(&pace, 12 * second, 1_000_000, 60 * second);
        assert_eq!(slow, 64);
    }

    #[test]
    fn a_distance_that_was_set_holds() {
        let pace = Pace::new();
        pace.fix(5);
        assert_eq!(distance_after(&pace, 0, 10, 1_000_000_000), 8);
    }

    #[test]
    fn a_range_is_sampled_if_and_only_if_it_holds_a_multiple() {
        for distance in [1_u64, 2, 8, 64] {
            for from in 0..200 {
                for upto in from..from + 70 {
                    let truth = (from..upto).any(|position| position % distance == 0);
                    assert_eq!(
                        contains_multiple(from, upto, distance - 1),
                        truth,
                        "{from}..{upto}"
                    );
                }
            }
        }
        assert!(!contains_multiple(u64::MAX, u64::MAX, 7));
        assert!(!contains_multiple(u64::MAX - 1, u64::MAX, 7));
    }
}
