//! Lag control (R17): keeps the backup's execution close behind the primary's, by short holds at the
//! primary's exits.
//!
//! Owner: the vCPU thread. The lag `L` is the primary's run time that the backup has yet to replay
//! ([`Lag::run`](crate::Lag)). The share of time that the primary may run is
//! ```text
//!   r(L) = 1                       for L ≤ target
//!          1 − (L − target)/span   for target < L < target + span
//!          0                       for L ≥ target + span   (hard stop)
//! ```
//! With `c` the speed of replay, `dL/dt = r(L(t − d)) − c`, where `d` is the age of the measurement.
//! The law is proportional, without memory of errors, of slope `1/span`; a linear equation
//! `x' = −k·x(t − d)` does not oscillate while `k·d ≤ 1/e`, here `d ≤ span/e`. The equilibrium is
//! `L = target + (1 − c)·span`: below the hard stop for every backup that moves at all. The price is
//! that a slower backup settles at a larger lag; nothing winds up, so nothing swings back.
//!
//! The hard stop bounds the lag absolutely, to `target + span` and what runs between two exits; code
//! without exits is to be kicked after [`LagControl::kick_after`].

use std::time::Duration;

use crate::canary::{self, Canary};
use crate::time::nanos;

/// What the control aims at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LagLimits {
    /// Lag below which the primary runs freely.
    pub target: Duration,
    /// Range above `target` over which the primary slows to a stop. At least `e` times the age of
    /// the measurement, or the lag may swing.
    pub span: Duration,
    /// The longest single hold; what is owed beyond is held at the next exits.
    pub longest_hold: Duration,
}

impl Default for LagLimits {
    fn default() -> Self {
        Self {
            target: Duration::from_millis(20),
            span: Duration::from_millis(80),
            longest_hold: Duration::from_millis(2),
        }
    }
}

/// What the vCPU does at this exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// Runs on.
    Run,
    /// Waits this long, then runs on.
    Hold(Duration),
    /// Waits until a lower lag is measured.
    Stop,
}

/// Turns measured lag into holds.
#[derive(Debug)]
pub struct LagControl {
    limits: LagLimits,
    lag: Duration,
    owed_ns: u64,
}

impl LagControl {
    /// A control that has measured no lag yet.
    #[must_use]
    pub fn new(limits: LagLimits) -> Self {
        Self {
            limits,
            lag: Duration::ZERO,
            owed_ns: 0,
        }
    }

    /// Other limits, from now on.
    pub fn set_limits(&mut self, limits: LagLimits) {
        self.limits = limits;
        self.owed_ns = 0;
    }

    /// The newest measurement.
    pub fn measured(&mut self, lag: Duration) {
        self.lag = lag;
    }

    /// The share of time that the primary may run at the lag measured last, in parts per million.
    #[must_use]
    pub fn share_ppm(&self) -> u32 {
        const WHOLE: u64 = 1_000_000;
        if canary::on(Canary::LagUnlimited) {
            return WHOLE as u32;
        }
        let over = nanos(self.lag.saturating_sub(self.limits.target));
        let span = nanos(self.limits.span).max(1);
        let off = u128::from(over) * u128::from(WHOLE) / u128::from(span);
        WHOLE.saturating_sub(u64::try_from(off).unwrap_or(WHOLE)) as u32
    }

    /// What to do at an exit before which the vCPU ran for `ran`.
    pub fn at_exit(&mut self, ran: Duration) -> Pace {
        let share = u64::from(self.share_ppm());
        if share == 0 {
            self.owed_ns = 0;
            return Pace::Stop;
        }
        let owed = u128::from(nanos(ran)) * u128::from(1_000_000 - share) / u128::from(share);
        // More than one span is never owed: the hard stop takes over before that.
        let most = nanos(self.limits.span);
        self.owed_ns = self
            .owed_ns
            .saturating_add(u64::try_from(owed).unwrap_or(most))
            .min(most);
        let hold = self.owed_ns.min(nanos(self.limits.longest_hold));
        self.owed_ns -= hold;
        if hold == 0 {
            Pace::Run
        } else {
            Pace::Hold(Duration::from_nanos(hold))
        }
    }

    /// Guest code that has run this long without an exit is to be kicked, so that the control acts.
    #[must_use]
    pub fn kick_after(&self) -> Duration {
        self.limits.span / 8
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    const STEP_NS: u64 = 100_000;
    const EXIT_NS: u64 = 200_000;

    /// Runs primary and backup for `ms`; the backup's speed in percent is `speed(ms)`, the
    /// measurement is `delay_ms` old. Returns the lag in ns at every step.
    fn response(delay_ms: u64, ms: u64, speed: impl Fn(u64) -> u64) -> Vec<u64> {
        let mut control = LagControl::new(LagLimits::default());
        let mut delayed: VecDeque<u64> = VecDeque::new();
        let (mut lag, mut held, mut since_exit) = (0u64, 0u64, 0u64);
        let mut stopped = false;
        let mut out = Vec::new();
        for step in 0..ms * 1_000_000 / STEP_NS {
            delayed.push_back(lag);
            if delayed.len() as u64 > delay_ms * 1_000_000 / STEP_NS {
                let seen = delayed.pop_front().unwrap();
                control.measured(Duration::from_nanos(seen));
            }
            if stopped {
                stopped = control.share_ppm() == 0;
            }
            if held >= STEP_NS {
                held -= STEP_NS;
            } else if !stopped {
                lag += STEP_NS - held;
                since_exit += STEP_NS - held;
                held = 0;
                if since_exit >= EXIT_NS {
                    match control.at_exit(Duration::from_nanos(since_exit)) {
                        Pace::Run => {}
                        Pace::Hold(hold) => held = hold.as_nanos() as u64,
                        Pace::Stop => stopped = true,
                    }
                    since_exit = 0;
                }
            }
            lag = lag.saturating_sub(STEP_NS * speed(step * STEP_NS / 1_000_000) / 100);
            out.push(lag);
        }
        out
    }

    /// The lag averaged over 10 ms, so that single holds do not count as swings.
    fn smooth(lag: &[u64]) -> Vec<u64> {
        lag.chunks(100)
            .map(|part| part.iter().sum::<u64>() / part.len() as u64)
            .collect()
    }

    /// The step response as a table: a backup that replayed as fast as the primary ran has `percent` of
    /// its speed from 0 ms on. `cargo test -p ft step_response -- --nocapture` prints it.
    fn print_step_response(delay_ms: u64) {
        const SPEEDS: [u64; 4] = [10, 50, 80, 95];
        println!("lag in ms, measured {delay_ms} ms late; speed of replay {SPEEDS:?} %");
        let lags = SPEEDS.map(|percent| smooth(&response(delay_ms, 1000, |_| percent)));
        for at in [0, 2, 4, 6, 8, 10, 15, 20, 30, 50, 99] {
            let row: Vec<_> = lags.iter().map(|lag| lag[at] / 1_000_000).collect();
            println!("{:>4} ms  {row:>3?}", 10 * at);
        }
    }

    #[test]
    fn step_response_settles_without_overshoot_or_oscillation() {
        print_step_response(5);
        print_step_response(29);
        // 80 ms / e = 29 ms: delays up to there must not swing.
        for delay_ms in [0, 5, 15, 29] {
            for percent in [10, 30, 50, 80, 95] {
                let lag = smooth(&response(delay_ms, 4000, |_| percent));
                let settled = 20_000_000 + 800_000 * (100 - percent);
                let slack = 3_000_000;
                for (index, pair) in lag.windows(2).enumerate() {
                    assert!(
                        pair[1] + slack >= pair[0],
                        "delay {delay_ms} speed {percent}: falls at {index}: {pair:?}"
                    );
                    assert!(
                        pair[1] <= settled + slack,
                        "delay {delay_ms} speed {percent}: overshoots at {index}: {pair:?}"
                    );
                }
                let end = *lag.last().unwrap();
                assert!(
                    end.abs_diff(settled) < slack,
                    "delay {delay_ms} speed {percent}: {end} is not {settled}"
                );
            }
        }
    }

    #[test]
    fn a_backup_that_stops_stops_the_primary_at_the_hard_limit_and_recovery_is_monotone() {
        let lag = response(5, 3000, |ms| if ms < 1000 { 0 } else { 200 });
        let most = *lag.iter().max().unwrap();
        // What runs during the delay of the measurement comes on top, at a share near zero.
        assert!(most <= 100_000_000 + 5_000_000, "{most}");
        let after = smooth(&lag)[101..].to_vec();
        for pair in after.windows(2) {
            assert!(pair[1] <= pair[0] + 3_000_000, "{pair:?}");
        }
        assert!(*after.last().unwrap() < 20_000_000);
    }

    #[test]
    fn a_backup_that_keeps_up_costs_nothing() {
        let mut control = LagControl::new(LagLimits::default());
        control.measured(Duration::from_millis(20));
        for _ in 0..1000 {
            assert_eq!(control.at_exit(Duration::from_millis(1)), Pace::Run);
        }
    }

    #[test]
    fn one_hold_is_bounded_and_the_rest_is_owed() {
        let mut control = LagControl::new(LagLimits::default());
        control.measured(Duration::from_millis(60));
        assert_eq!(
            control.at_exit(Duration::from_millis(10)),
            Pace::Hold(Duration::from_millis(2))
        );
        let rest: Duration = (0..10)
            .map(|_| match control.at_exit(Duration::ZERO) {
                Pace::Hold(hold) => hold,
                _ => Duration::ZERO,
            })
            .sum();
        assert_eq!(rest, Duration::from_millis(8));
    }
}
