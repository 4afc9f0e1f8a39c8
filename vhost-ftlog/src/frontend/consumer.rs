//! Reading what is delivered: whole, checked frames, in place.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use format::{FrameHeader, HEADER_LEN, Seq};
use ring::COMMIT_NEVER;

use super::Error;
use super::session::SessionMemory;
use crate::daemon::life::monotonic_ns;

/// A delivered frame, borrowed from the delivery ring.
#[derive(Debug, Clone, Copy)]
pub struct Delivered<'a> {
    /// Its header; a frame with the flag `END` closes the log.
    pub header: FrameHeader,
    /// Its appends, back to back.
    pub body: &'a [u8],
    /// Where the frame begins, as an ever-growing position in bytes.
    pub position: u64,
}

/// Reads the frames that are committed, without the daemon: they stay readable when it is dead.
#[derive(Debug)]
pub struct LogConsumer {
    memory: Arc<SessionMemory>,
    read: u64,
    released: u64,
    kicked_for: u64,
}

/// Tells how far replay is, also while a frame of its [`LogConsumer`] is looked at.
#[derive(Debug)]
pub struct ReplayProgress {
    memory: Arc<SessionMemory>,
    kicked_for: u64,
}

impl ReplayProgress {
    /// Says that everything below `upto` is replayed; carried to the primary with the next
    /// acknowledgement, or at once in the mode `Replayed`.
    pub fn report(&mut self, upto: Seq) {
        let control = self.memory.control();
        control.consumer.replayed.store(upto.0, Ordering::Release);
        fence(Ordering::SeqCst);
        let wanted = control.delivery.replay_kick_at.load(Ordering::Relaxed);
        if wanted <= upto.0 && wanted != self.kicked_for {
            self.kicked_for = wanted;
            self.memory.delivery_events.kick.signal();
        }
    }

    /// Has the daemon acknowledge what [`ReplayProgress::report`] said by now, whatever the mode, so that a
    /// primary that waits for its backup sees it move. One system call: for a few calls each 10 ms, not for
    /// every frame.
    pub fn announce(&self) {
        self.memory.delivery_events.kick.signal();
    }
}

impl LogConsumer {
    pub(super) fn new(memory: Arc<SessionMemory>) -> Self {
        Self {
            memory,
            read: 0,
            released: 0,
            kicked_for: COMMIT_NEVER,
        }
    }

    /// What is committed: bytes, and the next append.
    #[must_use]
    pub fn committed(&self) -> (u64, Seq) {
        let point = self.memory.control().delivery.commits.read();
        (point.cursor, Seq(point.seq))
    }

    /// Bytes that are committed and not read.
    #[must_use]
    pub fn backlog(&self) -> u64 {
        self.committed().0.saturating_sub(self.read)
    }

    /// The next frame, if one is committed. It stays valid until [`LogConsumer::release`] lets go of
    /// it. The daemon has checked it; the header is checked again, since memory is cheap to lose
    /// trust in.
    ///
    /// # Errors
    /// [`Error::Format`] or [`Error::State`] where the daemon is broken.
    pub fn next_frame(&mut self) -> Result<Option<Delivered<'_>>, Error> {
        let (cursor, _) = self.committed();
        let there = cursor.wrapping_sub(self.read);
        if there == 0 {
            return Ok(None);
        }
        if there > self.memory.delivery.len() as u64 || there < HEADER_LEN as u64 {
            return Err(Error::State("the commit cursor is out of range"));
        }
        let position = self.read;
        let header = FrameHeader::decode(self.bytes(position, HEADER_LEN))?;
        let len = header.frame_len() as u64;
        if len > there {
            return Err(Error::State("a committed frame is not whole"));
        }
        self.read += len;
        let body = self.bytes(position + HEADER_LEN as u64, header.body_len as usize);
        Ok(Some(Delivered {
            header,
            body,
            position,
        }))
    }

    #[allow(unsafe_code)] // A slice of the delivery ring.
    fn bytes(&self, position: u64, len: usize) -> &[u8] {
        // SAFETY: committed and not released, so a correct daemon does not write it.
        unsafe { self.memory.delivery.slice(position, len) }
    }

    /// Lets go of all frames that were read: their space can be filled again. Wakes the daemon only
    /// where it waits for space.
    pub fn release(&mut self) {
        if self.read == self.released {
            return;
        }
        self.released = self.read;
        let control = self.memory.control();
        control
            .consumer
            .consumed
            .store(self.read, Ordering::Release);
        fence(Ordering::SeqCst);
        let wanted = control.delivery.kick_at.load(Ordering::Relaxed);
        if wanted <= self.read && wanted != self.kicked_for {
            self.kicked_for = wanted;
            self.memory.delivery_events.kick.signal();
        }
    }

    /// Lets go of all frames that begin before `position`, as [`LogConsumer::release`] does for all.
    /// For a reader that keeps some of what it read.
    ///
    /// # Errors
    /// [`Error::State`] where it was not read or is already released.
    pub fn release_before(&mut self, position: u64) -> Result<(), Error> {
        if !(self.released..=self.read).contains(&position) {
            return Err(Error::State("release of what was not read"));
        }
        let read = std::mem::replace(&mut self.read, position);
        self.release();
        self.read = read;
        Ok(())
    }

    /// What tells how far replay of this log is. One is enough.
    #[must_use]
    pub fn replay_progress(&self) -> ReplayProgress {
        ReplayProgress {
            memory: Arc::clone(&self.memory),
            kicked_for: COMMIT_NEVER,
        }
    }

    /// Asks for a signal on [`LogConsumer::as_fd`] when another frame is committed; true where one
    /// already is.
    #[must_use]
    pub fn arm(&self) -> bool {
        let control = self.memory.control();
        control
            .consumer
            .call_at
            .store(self.read + 1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if self.backlog() > 0 {
            control
                .consumer
                .call_at
                .store(COMMIT_NEVER, Ordering::Relaxed);
            return true;
        }
        false
    }

    /// Takes the signals that are there.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn clear(&self) -> Result<(), Error> {
        self.memory.delivery_events.call.clear()
    }

    /// Waits until another frame is committed: spins for `spin`, then sleeps. False after `limit`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn wait(&self, spin: Duration, limit: Option<Duration>) -> Result<bool, Error> {
        let start = monotonic_ns();
        let spin_ns = spin.as_nanos() as u64;
        loop {
            if self.backlog() > 0 {
                return Ok(true);
            }
            if monotonic_ns() - start >= spin_ns {
                break;
            }
            std::thread::yield_now();
        }
        if self.arm() {
            return Ok(true);
        }
        self.memory.delivery_events.call.wait(limit)?;
        self.memory
            .control()
            .consumer
            .call_at
            .store(COMMIT_NEVER, Ordering::Relaxed);
        Ok(self.backlog() > 0)
    }

    /// Ticks the VMM's progress word, which heartbeats carry.
    pub fn tick_progress(&self) {
        self.memory
            .control()
            .producer
            .progress
            .fetch_add(1, Ordering::Relaxed);
    }
}

impl AsFd for LogConsumer {
    /// Readable when what [`LogConsumer::arm`] asked for is committed.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.delivery_events.call.as_fd()
    }
}
