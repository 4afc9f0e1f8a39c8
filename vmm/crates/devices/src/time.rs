//! Virtual time, the only clock a device knows.
//!
//! It moves by [`Input::Time`](crate::Input::Time) alone and never backwards. Conversions to the 8254's ticks round so
//! that "the count has reached `n`" and "the time of tick `n` has come" are the same statement. Nothing here reads a clock.

use serde::{Deserialize, Serialize};

/// Nanoseconds since the VM's birth. 64 bits last for 584 years.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct VirtualTime(pub u64);

/// Nanoseconds in a second.
pub(crate) const NS_PER_S: u64 = 1_000_000_000;

/// Input frequency of the 8254 in a PC: 14.318180 MHz / 12.
pub(crate) const PIT_HZ: u64 = 1_193_182;

impl VirtualTime {
    /// This time plus `ns`, held at the end of time instead of wrapping.
    pub(crate) fn plus_ns(self, ns: u64) -> VirtualTime {
        VirtualTime(self.0.saturating_add(ns))
    }

    /// Whole 8254 ticks that have passed since `start`.
    pub(crate) fn pit_ticks_since(self, start: VirtualTime) -> u64 {
        let ns = u128::from(self.0.saturating_sub(start.0));
        let ticks = ns * u128::from(PIT_HZ) / u128::from(NS_PER_S);
        u64::try_from(ticks)
            .expect("PIT_HZ is below NS_PER_S, so there are fewer ticks than nanoseconds")
    }

    /// The first moment at which `ticks` whole 8254 ticks have passed since `self`.
    pub(crate) fn after_pit_ticks(self, ticks: u64) -> VirtualTime {
        let ns = (u128::from(ticks) * u128::from(NS_PER_S)).div_ceil(u128::from(PIT_HZ));
        self.plus_ns(u64::try_from(ns).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_tick_is_the_first_at_which_it_is_counted() {
        let start = VirtualTime(12_345);
        for ticks in [1, 2, 3, 4773, 65_536, 1_193_182, 5_000_000_000] {
            let at = start.after_pit_ticks(ticks);
            assert_eq!(at.pit_ticks_since(start), ticks);
            assert_eq!(VirtualTime(at.0 - 1).pit_ticks_since(start), ticks - 1);
        }
    }

    #[test]
    fn a_second_has_the_input_frequency_in_ticks_without_drift() {
        let hour = VirtualTime(3600 * NS_PER_S);
        assert_eq!(hour.pit_ticks_since(VirtualTime(0)), 3600 * PIT_HZ);
    }

    #[test]
    fn the_end_of_time_saturates() {
        assert_eq!(
            VirtualTime(u64::MAX - 1).after_pit_ticks(u64::MAX),
            VirtualTime(u64::MAX)
        );
    }
}
