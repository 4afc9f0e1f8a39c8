//! How long to spin before sleeping: a share of CPU, spent while an `Output` waits.
//!
//! A bucket fills with the share of elapsed time and empties while spinning. One wait spins at most
//! the configured time. Time comes in from outside.

use crate::config_space::Tuning;

/// The most that the bucket holds, in ns of spinning.
const BUCKET_NS: i64 = 20_000_000;

/// The budget.
#[derive(Debug, Default)]
pub(super) struct SpinBudget {
    /// Spinning that is left, in ns; below zero where the last look came late.
    tokens_ns: i64,
    filled_at: u64,
    /// Start of the present wait, in ns, where it spins.
    started: Option<u64>,
    /// When the data thread last slept, in ns.
    began: u64,
    last: u64,
}

impl SpinBudget {
    /// Whether to spin on at `now`; starts a spin if none is under way.
    pub(super) fn may_spin(&mut self, tuning: &Tuning, now: u64) -> bool {
        if tuning.spin_us == 0 || tuning.spin_permille == 0 {
            return false;
        }
        let elapsed = now.saturating_sub(self.filled_at);
        self.filled_at = now;
        let earned = elapsed * u64::from(tuning.spin_permille) / 1000;
        self.tokens_ns = self
            .tokens_ns
            .saturating_add_unsigned(earned)
            .min(BUCKET_NS);
        if self.started.is_some() {
            self.tokens_ns = self
                .tokens_ns
                .saturating_sub_unsigned(now.saturating_sub(self.last));
        }
        self.last = now;
        if self.started.is_none() {
            self.began = now;
        }
        let started = *self.started.get_or_insert(now);
        let unlimited = tuning.spin_permille >= 1000;
        (unlimited || self.tokens_ns > 0) && now - started < u64::from(tuning.spin_us) * 1000
    }

    /// Something came: what is waited for from now on may be waited for as long again.
    pub(super) fn renew(&mut self, now: u64) {
        if let Some(started) = &mut self.started {
            *started = now;
        }
    }

    /// The data thread goes to sleep: the present spin is over. Returns its length in ns.
    pub(super) fn stop(&mut self, now: u64) -> Option<u64> {
        self.started.take()?;
        Some(now.saturating_sub(self.began))
    }

    /// Whether a spin is under way.
    pub(super) fn is_spinning(&self) -> bool {
        self.started.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuning(spin_us: u32, spin_permille: u32) -> Tuning {
        Tuning {
            spin_us,
            spin_permille,
            ..Tuning::default()
        }
    }

    #[test]
    fn one_spin_ends_after_its_time() {
        let mut budget = SpinBudget::default();
        let tuning = tuning(50, 1000);
        assert!(budget.may_spin(&tuning, 1_000_000));
        assert!(budget.may_spin(&tuning, 1_049_999));
        assert!(!budget.may_spin(&tuning, 1_050_000));
        assert_eq!(budget.stop(1_050_000), Some(50_000));
        assert!(budget.may_spin(&tuning, 1_060_000));
    }

    #[test]
    fn what_comes_while_spinning_gives_the_next_wait_its_whole_time() {
        let mut budget = SpinBudget::default();
        let tuning = tuning(50, 1000);
        assert!(budget.may_spin(&tuning, 1_000_000));
        budget.renew(1_040_000);
        assert!(budget.may_spin(&tuning, 1_089_999));
        assert!(!budget.may_spin(&tuning, 1_090_000));
        assert_eq!(budget.stop(1_090_000), Some(90_000));
    }

    #[test]
    fn spinning_takes_no_more_than_its_share() {
        let mut budget = SpinBudget::default();
        let tuning = tuning(1000, 100);
        let (mut now, mut spun) = (0u64, 0u64);
        while now < 10_000_000_000 {
            now += 10_000;
            if !budget.may_spin(&tuning, now) {
                spun += budget.stop(now).unwrap_or(0);
                now += 100_000;
            }
        }
        let share = spun as f64 / now as f64;
        assert!((0.08..0.12).contains(&share), "{share}");
    }

    #[test]
    fn no_spin_time_means_no_spin() {
        let mut budget = SpinBudget::default();
        assert!(!budget.may_spin(&tuning(0, 1000), 5));
        assert!(!budget.may_spin(&tuning(10, 0), 5));
    }
}
