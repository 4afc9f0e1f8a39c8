//! The output gate: effects wait here, in order, until the log that leads to them is acknowledged.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use devices::Effect;
use format::Seq;

/// How far the log is acknowledged, shared between who learns it and who waits for it.
#[derive(Debug, Clone, Default)]
pub struct Acks {
    next: Arc<AtomicU64>,
}

impl Acks {
    /// The next append that is not acknowledged.
    #[must_use]
    pub fn next(&self) -> Seq {
        Seq(self.next.load(Ordering::Acquire))
    }

    /// Everything below `next` is acknowledged. Never goes back.
    pub fn raise(&self, next: Seq) {
        self.next.fetch_max(next.0, Ordering::AcqRel);
    }

    /// Nothing waits any more: the VM is on its own by right.
    pub fn open(&self) {
        self.next.store(u64::MAX, Ordering::Release);
    }

    /// A new session begins: its first append waits.
    pub fn restart(&self) {
        self.next.store(0, Ordering::Release);
    }
}

/// What the gate holds and has held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GateStats {
    /// Effects held now.
    pub held: u64,
    /// How long the oldest one has been held, in ns.
    pub oldest_ns: u64,
    /// Effects released so far.
    pub released: u64,
}

/// The gate.
#[derive(Debug)]
pub(super) struct Gate {
    acks: Acks,
    held: VecDeque<(Seq, Instant, Effect)>,
    released: u64,
}

impl Gate {
    pub(super) fn new(acks: Acks) -> Self {
        Self {
            acks,
            held: VecDeque::new(),
            released: 0,
        }
    }

    /// Holds an effect until everything below `after` is acknowledged; `None` waits only for what is
    /// held already.
    pub(super) fn hold(&mut self, effect: Effect, after: Option<Seq>) {
        self.held
            .push_back((after.unwrap_or(Seq(0)), now(), effect));
    }

    /// The next effect that may leave.
    pub(super) fn release(&mut self) -> Option<Effect> {
        let (after, _, _) = self.held.front()?;
        if *after > self.acks.next() {
            return None;
        }
        self.released += 1;
        self.held.pop_front().map(|(_, _, effect)| effect)
    }

    /// Drops what is held: the loser of an arbitration puts nothing out.
    pub(super) fn discard(&mut self) -> usize {
        let held = self.held.len();
        self.held.clear();
        held
    }

    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    pub(super) fn stats(&self) -> GateStats {
        let oldest = self
            .held
            .front()
            .map_or(0, |(_, since, _)| since.elapsed().as_nanos() as u64);
        GateStats {
            held: self.held.len() as u64,
            oldest_ns: oldest,
            released: self.released,
        }
    }
}

fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tx(byte: u8) -> Effect {
        Effect::ConsoleTx(byte)
    }

    #[test]
    fn effects_leave_in_order_and_only_after_their_acknowledgement() {
        let acks = Acks::default();
        let mut gate = Gate::new(acks.clone());
        gate.hold(tx(1), Some(Seq(5)));
        gate.hold(tx(2), None);
        gate.hold(tx(3), Some(Seq(9)));
        assert_eq!(gate.release(), None);
        acks.raise(Seq(5));
        acks.raise(Seq(4));
        assert_eq!(gate.release(), Some(tx(1)));
        assert_eq!(gate.release(), Some(tx(2)));
        assert_eq!(gate.release(), None);
        assert_eq!(gate.discard(), 1);
        acks.open();
        assert_eq!(gate.release(), None);
    }
}
