//! Which appends are shown: those at multiples of a distance, the same in every process.

use core::sync::atomic::{AtomicU64, Ordering};

/// Distance between sampled appends, unless another is set: rare enough for a log of a million appends
/// a second, dense enough for one of a thousand.
pub const DEFAULT_DISTANCE: u64 = 64;
/// Environment variable with another distance; programs that are started hand it on.
pub const DISTANCE_VARIABLE: &str = "POLLUX_SAMPLE_ONE_IN";

/// Distance minus one; the distance is a power of two.
static MASK: AtomicU64 = AtomicU64::new(DEFAULT_DISTANCE - 1);

/// Shows one append in `distance`, rounded up to a power of two. All processes of a pair should be told
/// the same; those that show more are thinned out when they are joined.
pub fn sample_one_in(distance: u64) {
    let distance = distance
        .max(1)
        .checked_next_power_of_two()
        .unwrap_or(1 << 63);
    MASK.store(distance - 1, Ordering::Relaxed);
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

/// Whether one of the positions `from..upto` is sampled.
#[inline(always)]
pub fn sampled(from: u64, upto: u64) -> bool {
    contains_multiple(from, upto, MASK.load(Ordering::Relaxed))
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
