//! The output gate: effects on the world wait here until the log up to their `Output` is
//! acknowledged (R11).
//!
//! Owner: whoever releases effects, normally the VMM's I/O thread. The protocol tells it its mode by
//! [`Action::Gate`](crate::Action::Gate) and nothing else opens it.
//! ```text
//!        ┌────── Open ◄─────┐          Shut: nothing passes (before the first epoch is won,
//!        ▼                  │                and from the loss of the backup on)
//!     Holding(session) ──► Shut        Open: everything passes (unprotected)
//! ```
//! Always true: effects leave in the order in which they came; in `Holding` none leaves before an
//! acknowledgement *of that session* covers it; a gate that notices that it did not run for longer
//! than its gap limit shuts itself before it releases anything.
//!
//! It does not know what an effect is, and it does no I/O.

use std::collections::VecDeque;
use std::time::Duration;

use format::{Seq, SessionId};

use crate::canary::{self, Canary};
use crate::time::Time;

/// What passes a gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateMode {
    /// Nothing.
    Shut,
    /// Everything, at once.
    Open,
    /// What this session has acknowledged.
    Holding(SessionId),
}

/// When a gate asks for the vCPU to stop. What one exit makes may come on top.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GateLimits {
    /// Effects held.
    pub count: usize,
    /// Bytes held.
    pub bytes: usize,
    /// The gate arbitrates first when it did not run for longer than this: the peer's time-out.
    pub gap: Duration,
}

impl Default for GateLimits {
    fn default() -> Self {
        Self {
            count: 4096,
            bytes: 16 << 20,
            gap: Duration::from_millis(200),
        }
    }
}

/// The gate did not run for `gap`: it is shut until the protocol has made sure of its epoch. Pass
/// [`Event::GateGap`](crate::Event::GateGap) on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockGap {
    /// How long it did not run.
    pub gap: Duration,
}

#[derive(Debug)]
struct Held<T> {
    needs: Seq,
    bytes: usize,
    since: Time,
    effect: T,
}

/// Holds effects in order. `T` is whatever the owner releases: a frame, a disk write.
#[derive(Debug)]
pub struct OutputGate<T> {
    mode: GateMode,
    limits: GateLimits,
    held: VecDeque<Held<T>>,
    bytes: usize,
    acked: (Option<SessionId>, Seq),
    ran_at: Option<Time>,
}

impl<T> OutputGate<T> {
    /// A shut gate.
    #[must_use]
    pub fn new(limits: GateLimits) -> Self {
        Self {
            mode: GateMode::Shut,
            limits,
            held: VecDeque::new(),
            bytes: 0,
            acked: (None, Seq(0)),
            ran_at: None,
        }
    }

    /// Sets the mode. What another session acknowledged is forgotten. What an open gate has not got rid of
    /// yet when it begins to hold may go out all the same: positions of an earlier log mean nothing in
    /// this one, and the standby has what was made before before it may compete (R15).
    pub fn set_mode(&mut self, now: Time, mode: GateMode) {
        if let GateMode::Holding(session) = mode
            && self.acked.0 != Some(session)
        {
            if self.mode == GateMode::Open {
                for held in &mut self.held {
                    held.needs = Seq(0);
                }
            }
            let kept = canary::on(Canary::AcksOutliveTheirSession);
            self.acked = (Some(session), if kept { self.acked.1 } else { Seq(0) });
        }
        self.mode = mode;
        self.ran_at = Some(now);
    }

    /// The mode.
    #[must_use]
    pub fn mode(&self) -> GateMode {
        self.mode
    }

    /// Takes an effect of `bytes` bytes whose `Output` is covered once everything below `needs` is
    /// acknowledged. Returns whether the vCPU must stop until [`OutputGate::is_full`] is false.
    pub fn push(&mut self, now: Time, needs: Seq, bytes: usize, effect: T) -> bool {
        assert!(
            self.held.back().is_none_or(|last| last.needs <= needs)
                || !matches!(self.mode, GateMode::Holding(_)),
            "effects come in the order of the log"
        );
        self.bytes += bytes;
        self.held.push_back(Held {
            needs,
            bytes,
            since: now,
            effect,
        });
        self.is_full()
    }

    /// Whether the vCPU must stop.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.held.len() >= self.limits.count || self.bytes >= self.limits.bytes
    }

    /// Everything below `next` of `session` is acknowledged. Counts only for the session that the
    /// gate holds for, or held for last.
    pub fn acknowledge(&mut self, session: SessionId, next: Seq) {
        if self.acked.0 == Some(session) {
            self.acked.1 = self.acked.1.max(next);
        }
    }

    /// To be called at least four times in the gap limit, so that only real pauses count as gaps.
    ///
    /// # Errors
    /// [`ClockGap`]: the gate is now shut.
    pub fn tick(&mut self, now: Time) -> Result<(), ClockGap> {
        let gap = self.ran_at.map_or(Duration::ZERO, |ran| now.since(ran));
        self.ran_at = Some(now);
        if matches!(self.mode, GateMode::Holding(_)) && gap > self.limits.gap {
            self.mode = GateMode::Shut;
            return Err(ClockGap { gap });
        }
        Ok(())
    }

    /// The next effect that may go out, if any.
    ///
    /// # Errors
    /// [`ClockGap`]: nothing may go out, the gate is now shut.
    pub fn pop(&mut self, now: Time) -> Result<Option<T>, ClockGap> {
        self.tick(now)?;
        let pass = match (self.mode, self.held.front()) {
            (_, None) | (GateMode::Shut, _) => false,
            (GateMode::Open, Some(_)) => true,
            (GateMode::Holding(_), Some(held)) => {
                held.needs <= self.acked.1 || canary::on(Canary::ReleaseBeforeAck)
            }
        };
        if !pass {
            return Ok(None);
        }
        let held = self.take();
        Ok(held.map(|held| held.effect))
    }

    /// Takes everything out without releasing it: the effects of one that lost its epoch.
    pub fn discard(&mut self) -> Vec<T> {
        self.bytes = 0;
        self.held.drain(..).map(|held| held.effect).collect()
    }

    /// Effects held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether nothing is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// How long the oldest effect has been held.
    #[must_use]
    pub fn oldest(&self, now: Time) -> Option<Duration> {
        self.held.front().map(|held| now.since(held.since))
    }

    /// The acknowledgement that the oldest effect waits for: what the channel should wake up for.
    #[must_use]
    pub fn waits_for(&self) -> Option<Seq> {
        self.held.front().map(|held| held.needs)
    }

    fn take(&mut self) -> Option<Held<T>> {
        let held = if canary::on(Canary::ReleaseOutOfOrder) && self.mode != GateMode::Open {
            let last = self
                .held
                .iter()
                .rposition(|held| held.needs <= self.acked.1);
            last.and_then(|index| self.held.remove(index))
        } else {
            self.held.pop_front()
        };
        self.bytes -= held.as_ref().map_or(0, |held| held.bytes);
        held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SESSION: SessionId = SessionId([1; 16]);
    const MS: u64 = 1_000_000;

    fn holding() -> OutputGate<u32> {
        let mut gate = OutputGate::new(GateLimits {
            count: 3,
            bytes: 100,
            gap: Duration::from_millis(50),
        });
        gate.set_mode(Time(0), GateMode::Holding(SESSION));
        gate
    }

    #[test]
    fn an_effect_waits_for_its_acknowledgement_and_order_holds() {
        let mut gate = holding();
        gate.push(Time(0), Seq(5), 1, 50);
        gate.push(Time(0), Seq(7), 1, 70);
        assert_eq!(gate.pop(Time(1)), Ok(None));
        gate.acknowledge(SESSION, Seq(4));
        assert_eq!(gate.pop(Time(1)), Ok(None));
        assert_eq!(gate.waits_for(), Some(Seq(5)));
        gate.acknowledge(SESSION, Seq(6));
        assert_eq!(gate.pop(Time(1)), Ok(Some(50)));
        assert_eq!(gate.pop(Time(1)), Ok(None));
        gate.acknowledge(SESSION, Seq(7));
        assert_eq!(gate.pop(Time(1)), Ok(Some(70)));
        assert_eq!((gate.len(), gate.bytes()), (0, 0));
    }

    #[test]
    fn an_acknowledgement_of_another_session_counts_for_nothing() {
        let mut gate = holding();
        gate.push(Time(0), Seq(5), 1, 50);
        gate.acknowledge(SessionId([2; 16]), Seq(9));
        assert_eq!(gate.pop(Time(1)), Ok(None));
        gate.acknowledge(SESSION, Seq(9));
        gate.set_mode(Time(1), GateMode::Shut);
        gate.set_mode(Time(1), GateMode::Holding(SessionId([3; 16])));
        assert_eq!(gate.pop(Time(1)), Ok(None));
    }

    #[test]
    fn the_vcpu_stops_at_either_limit_and_goes_on_below_it() {
        let mut gate = holding();
        assert!(!gate.push(Time(0), Seq(1), 10, 1));
        assert!(gate.push(Time(0), Seq(2), 90, 2), "bytes");
        gate.acknowledge(SESSION, Seq(1));
        assert_eq!(gate.pop(Time(1)), Ok(Some(1)));
        assert!(!gate.is_full());
        assert!(!gate.push(Time(0), Seq(3), 1, 3));
        assert!(gate.push(Time(0), Seq(4), 1, 4), "count");
    }

    #[test]
    fn a_gate_that_did_not_run_shuts_before_it_releases() {
        let mut gate = holding();
        gate.push(Time(0), Seq(1), 1, 1);
        gate.acknowledge(SESSION, Seq(1));
        let gap = Duration::from_millis(51);
        assert_eq!(gate.pop(Time(51 * MS)), Err(ClockGap { gap }));
        assert_eq!(gate.pop(Time(51 * MS)), Ok(None));
        gate.set_mode(Time(60 * MS), GateMode::Open);
        assert_eq!(gate.pop(Time(200 * MS)), Ok(Some(1)), "no peer, no gap");
    }

    #[test]
    fn a_gate_that_ticks_counts_no_gap() {
        let mut gate = holding();
        gate.push(Time(0), Seq(1), 1, 1);
        for ms in (0..1000).step_by(40) {
            assert_eq!(gate.tick(Time(ms * MS)), Ok(()));
        }
        gate.acknowledge(SESSION, Seq(1));
        assert_eq!(gate.pop(Time(1000 * MS)), Ok(Some(1)));
    }

    #[test]
    fn what_an_open_gate_still_has_does_not_wait_for_the_session_that_begins() {
        let mut gate = holding();
        gate.push(Time(0), Seq(90), 1, 90);
        gate.set_mode(Time(1), GateMode::Shut);
        gate.set_mode(Time(2), GateMode::Open);
        gate.set_mode(Time(3), GateMode::Holding(SessionId([2; 16])));
        gate.push(Time(4), Seq(1), 1, 1);
        assert_eq!(gate.pop(Time(4)), Ok(Some(90)));
        assert_eq!(gate.pop(Time(4)), Ok(None));
        // One that was shut keeps what it has until it is open.
        gate.set_mode(Time(5), GateMode::Shut);
        gate.set_mode(Time(6), GateMode::Holding(SessionId([3; 16])));
        assert_eq!(gate.pop(Time(6)), Ok(None));
    }

    #[test]
    fn a_shut_gate_keeps_what_it_holds_until_it_is_discarded() {
        let mut gate = holding();
        gate.push(Time(0), Seq(1), 1, 1);
        gate.set_mode(Time(1), GateMode::Shut);
        gate.acknowledge(SESSION, Seq(1));
        assert_eq!(gate.pop(Time(1)), Ok(None));
        assert_eq!(gate.discard(), vec![1]);
        assert_eq!(gate.bytes(), 0);
    }
}
