//! Seeing what is replicated: the used ring is the acknowledgement (R8).

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use format::Seq;

use super::Error;
use super::session::SessionMemory;
use crate::daemon::life::monotonic_ns;

/// A view of the acknowledgements of a session. Reading makes no system call.
#[derive(Debug, Clone)]
pub struct Acks {
    memory: Arc<SessionMemory>,
}

impl Acks {
    pub(super) fn new(memory: Arc<SessionMemory>) -> Self {
        Self { memory }
    }

    /// Everything below this is replicated, in the sense of the acknowledgement mode.
    ///
    /// # Errors
    /// [`Error::Ring`] where the daemon broke the ring.
    #[inline]
    pub fn acked(&self) -> Result<Seq, Error> {
        let acked = self.memory.used()?.1;
        self.saw(acked);
        Ok(acked)
    }

    /// The trace point of what is seen for the first time, and the daemon's measurement of it.
    #[inline]
    fn saw(&self, acked: Seq) {
        let seen = &self.memory.seen;
        if acked.0 > seen.load(Ordering::Relaxed) {
            let before = seen.fetch_max(acked.0, Ordering::Relaxed);
            if acked.0 > before {
                let sight = &self.memory.control().sight;
                sight.seen_ns.store(monotonic_ns(), Ordering::Relaxed);
                sight.seen.store(acked.0, Ordering::Release);
                usdt::seen(self.memory.number, before, acked.0);
            }
        }
    }

    /// What the replica has received and what it has replayed, whatever the mode, as last heard.
    #[must_use]
    pub fn progress(&self) -> (Seq, Seq) {
        let words = &self.memory.control().sender;
        (
            Seq(words.received.load(Ordering::Relaxed)),
            Seq(words.replayed.load(Ordering::Relaxed)),
        )
    }

    /// The daemon's progress word: it grows while the data thread runs.
    #[must_use]
    pub fn daemon_progress(&self) -> u64 {
        self.memory
            .control()
            .sender
            .progress
            .load(Ordering::Relaxed)
    }

    /// Asks for a signal on [`Acks::as_fd`] once everything below `upto` is acknowledged; true where
    /// it already is. One request stands at a time: the last one, of whatever clone. Ask for the
    /// oldest gated output.
    ///
    /// # Errors
    /// [`Error::Ring`] where the daemon broke the ring.
    #[inline]
    pub fn arm(&self, upto: Seq) -> Result<bool, Error> {
        let position = upto.0.wrapping_sub(self.memory.first.0);
        if position == 0 {
            return Ok(true);
        }
        let (used, acked) = self.memory.used()?;
        if used >= position {
            self.saw(acked);
            return Ok(true);
        }
        Ok(self.memory.log.arm(position - 1)?)
    }

    /// Takes the signals that are there.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn clear(&self) -> Result<(), Error> {
        self.memory.log_events.call.clear()
    }

    /// Waits until everything below `upto` is acknowledged: spins for `spin`, then sleeps. False
    /// after `limit`. Not for two threads at once.
    ///
    /// # Errors
    /// [`Error::Ring`] where the daemon broke the ring, [`Error::Io`].
    pub fn wait(&self, upto: Seq, spin: Duration, limit: Option<Duration>) -> Result<bool, Error> {
        let start = monotonic_ns();
        if !spin.is_zero() {
            let spin_ns = spin.as_nanos() as u64;
            loop {
                if self.acked()? >= upto {
                    return Ok(true);
                }
                if monotonic_ns() - start >= spin_ns {
                    break;
                }
                std::thread::yield_now();
            }
        }
        loop {
            if self.arm(upto)? {
                return Ok(true);
            }
            let left = match limit {
                None => None,
                Some(limit) => {
                    let passed = Duration::from_nanos(monotonic_ns() - start);
                    match limit.checked_sub(passed) {
                        Some(left) if !left.is_zero() => Some(left),
                        _ => return Ok(false),
                    }
                }
            };
            self.memory.log_events.call.wait(left)?;
        }
    }
}

impl AsFd for Acks {
    /// Readable when what [`Acks::arm`] asked for is acknowledged.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.log_events.call.as_fd()
    }
}
