//! The output gate of this VM: the protocol's gate over effects, fed by the channel's
//! acknowledgements.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::Duration;

use devices::Effect;
use format::{Seq, SessionId};
use ft::{ClockGap, GateLimits, GateMode, OutputGate, Time};
use vhost_ftlog::frontend::Acks;

use crate::vm::host_ns;

/// How often a gate that holds runs at least, as part of its gap limit.
const TICKS_IN_GAP: u32 = 6;

/// Waits kept for the quantiles.
const MAX_WAITS: usize = 512;

/// What the gate holds and has held.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct GateStats {
    /// Effects held now.
    pub held: u64,
    /// How long the oldest one has been held, in ns.
    pub oldest_ns: u64,
    /// Effects released so far.
    pub released: u64,
    /// Effects that waited for a position below this are released.
    pub released_upto: Seq,
    /// How long effects were held lately, p50 and p99 in us: the wait for acknowledgements.
    pub held_us: Option<(f64, f64)>,
}

/// An effect in the gate.
struct Waiting {
    effect: Effect,
    /// Positions below this have to be acknowledged, in the log of this number.
    needs: Seq,
    log: u64,
    /// When it came, in ns.
    since: u64,
}

/// The gate.
pub(super) struct Gate {
    gate: OutputGate<Waiting>,
    tick: Duration,
    acks: Option<(SessionId, Acks)>,
    released: u64,
    released_upto: Seq,
    /// How many logs have been watched: positions are of one of them.
    log: u64,
    /// Position of the newest effect that came.
    newest: Seq,
    /// How long the newest effects were held, in ns.
    waits: VecDeque<u64>,
}

fn now() -> Time {
    Time(host_ns())
}

impl Gate {
    /// A gate that shuts itself when it did not run for `gap`; for as long as the protocol does by default
    /// if nothing is said.
    pub(super) fn new(mode: GateMode, gap: Option<Duration>) -> Self {
        let default = GateLimits::default();
        let limits = GateLimits {
            gap: gap.unwrap_or(default.gap),
            ..default
        };
        let mut gate = OutputGate::new(limits);
        gate.set_mode(now(), mode);
        Self {
            gate,
            tick: limits.gap / TICKS_IN_GAP,
            acks: None,
            released: 0,
            released_upto: Seq(0),
            log: 0,
            newest: Seq(0),
            waits: VecDeque::new(),
        }
    }

    /// Sets the mode; returns the position after the newest append of which an effect may have been
    /// released unheld.
    pub(super) fn set_mode(&mut self, mode: GateMode) -> Seq {
        self.gate.set_mode(now(), mode);
        self.released_upto
    }

    /// How often it has to run while it holds.
    pub(super) fn tick(&self) -> Duration {
        self.tick
    }

    /// Takes acknowledgements of `session` from `acks` from now on. What has come before is of earlier logs:
    /// this session's log says nothing of it.
    pub(super) fn watch(&mut self, session: SessionId, acks: Acks) {
        self.acks = Some((session, acks));
        self.released_upto = Seq(0);
        self.log += 1;
        self.newest = Seq(0);
    }

    pub(super) fn unwatch(&mut self) {
        self.acks = None;
    }

    /// The descriptor that signals acknowledgements.
    pub(super) fn signal(&self) -> Option<RawFd> {
        self.acks.as_ref().map(|(_, acks)| acks.as_fd().as_raw_fd())
    }

    /// Takes the signals of acknowledgements that have come.
    pub(super) fn clear_signal(&self) {
        if let Some((_, acks)) = &self.acks
            && let Err(error) = acks.clear()
        {
            tracing::warn!(%error, "signals of acknowledgements");
        }
    }

    pub(super) fn hold(&mut self, effect: Effect, needs: Option<Seq>) {
        // Positions grow within a session; an effect of no log waits for those before it only.
        let needs = needs.unwrap_or(self.newest);
        self.newest = needs;
        let bytes = effect_bytes(&effect);
        let waiting = Waiting {
            effect,
            needs,
            log: self.log,
            since: host_ns(),
        };
        let _ = self.gate.push(now(), needs, bytes, waiting);
    }

    /// The next effect that may leave.
    ///
    /// # Errors
    /// The gate did not run for too long and has shut itself.
    pub(super) fn release(&mut self) -> Result<Option<Effect>, ClockGap> {
        if self.gate.is_empty() {
            return self.gate.tick(now()).map(|()| None);
        }
        if let Some((session, acks)) = &self.acks
            && let Ok(acked) = acks.acked()
        {
            self.gate.acknowledge(*session, acked);
        }
        let Some(waiting) = self.gate.pop(now())? else {
            return Ok(None);
        };
        let Waiting {
            effect,
            needs,
            log,
            since,
        } = waiting;
        if self.waits.len() == MAX_WAITS {
            self.waits.pop_front();
        }
        self.waits.push_back(host_ns().saturating_sub(since));
        if let (Some((session, _)), Some(entry)) = (&self.acks, needs.0.checked_sub(1))
            && log == self.log
        {
            usdt::released(session.number(), entry, needs.0);
        }
        self.released += 1;
        if log == self.log {
            self.released_upto = self.released_upto.max(needs);
        }
        Ok(Some(effect))
    }

    /// Asks for a signal when the oldest effect may leave; true where it may already.
    pub(super) fn arm(&self) -> bool {
        match (self.gate.mode(), self.gate.waits_for(), &self.acks) {
            (GateMode::Holding(_), Some(needs), Some((_, acks))) => {
                let _ = acks.clear();
                acks.arm(needs).unwrap_or(false)
            }
            _ => false,
        }
    }

    pub(super) fn is_shut(&self) -> bool {
        self.gate.mode() == GateMode::Shut
    }

    pub(super) fn holds(&self) -> bool {
        matches!(self.gate.mode(), GateMode::Holding(_))
    }

    /// Drops what is held: the loser of an arbitration puts nothing out.
    /// Returns how many effects and bytes that were.
    pub(super) fn discard(&mut self) -> (usize, usize) {
        let bytes = self.gate.bytes();
        (self.gate.discard().len(), bytes)
    }

    pub(super) fn stats(&self) -> GateStats {
        let oldest = self.gate.oldest(now()).unwrap_or_default();
        GateStats {
            held: self.gate.len() as u64,
            oldest_ns: oldest.as_nanos() as u64,
            released: self.released,
            released_upto: self.released_upto,
            held_us: self.held_us(),
        }
    }

    fn held_us(&self) -> Option<(f64, f64)> {
        let mut waits: Vec<u64> = self.waits.iter().copied().collect();
        waits.sort_unstable();
        let at = |part: usize| waits.get((waits.len() * part / 100).min(waits.len() - 1));
        let last = waits.last()?;
        Some((
            *at(50).unwrap_or(last) as f64 / 1e3,
            *at(99).unwrap_or(last) as f64 / 1e3,
        ))
    }
}

/// Bytes that count against the gate's limit.
pub(super) fn effect_bytes(effect: &Effect) -> usize {
    match effect {
        Effect::NetTx(frame) => frame.len(),
        Effect::DiskWrite { data, .. } => data.len(),
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame() -> Effect {
        Effect::NetTx(vec![0; 60])
    }

    #[test]
    fn what_an_earlier_log_was_needed_for_is_not_released_of_this_one() {
        let mut gate = Gate::new(GateMode::Open, None);
        gate.hold(frame(), Some(Seq(1000)));
        // As `watch` does it, without a channel.
        (gate.released_upto, gate.log, gate.newest) = (Seq(0), gate.log + 1, Seq(0));
        assert!(gate.release().unwrap().is_some());
        assert_eq!(gate.stats().released_upto, Seq(0));
        gate.hold(frame(), Some(Seq(3)));
        assert_eq!(gate.stats().released_upto, Seq(0));
        assert!(gate.release().unwrap().is_some());
        assert_eq!(gate.stats().released_upto, Seq(3));
    }

    #[test]
    fn a_gate_runs_several_times_within_the_peers_time_out() {
        let gate = Gate::new(GateMode::Shut, Some(Duration::from_millis(60)));
        assert_eq!(gate.tick(), Duration::from_millis(10));
    }
}
