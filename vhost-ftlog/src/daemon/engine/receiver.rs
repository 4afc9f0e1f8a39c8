//! The receiving side: bytes into the delivery ring, frames checked in place, committed, then
//! acknowledged (R9).
//!
//! ```text
//!   consumed        committed            written        consumed + ring
//!    |  the VMM reads  |  not yet whole   |  free          |
//! ```
//!
//! All are ever-growing positions in the delivery ring. What is not committed when a connection ends
//! is overwritten by the next one. Owned by the data thread.
#![allow(unsafe_code)] // Reads what the kernel wrote into the ring.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use format::{AckRecord, Epoch, FrameFlags, FrameHeader, HEADER_LEN, Seq, SessionId, TRAILER_LEN};
use ring::{COMMIT_NEVER, CommitPoint, DoubleMapping, Error};

use super::stats::Stats;
use crate::config_space::AckMode;
use crate::daemon::memory::DeviceMemory;

/// What the peer sent is not what a correct peer sends.
#[derive(Debug, thiserror::Error)]
pub(super) enum BadFrame {
    /// It does not decode.
    #[error(transparent)]
    Format(#[from] format::Error),
    /// A frame of another session or epoch.
    #[error("a frame of another session or epoch")]
    Session,
    /// A gap or a repetition.
    #[error("append {found} came where {expected} was due")]
    Sequence {
        /// What was due.
        expected: u64,
        /// What came.
        found: u64,
    },
}

/// What newly received bytes led to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Progress {
    /// Frames were committed.
    pub committed: bool,
    /// The peer's log has ended.
    pub ended: bool,
}

/// A frame whose header is checked and whose body is not yet whole.
struct Partial {
    header: FrameHeader,
    /// Bytes of the body that the checksum covers.
    summed: usize,
    crc: u32,
}

/// The receiving side of a session.
pub(super) struct Receiver {
    ring: DoubleMapping,
    memory: Arc<DeviceMemory>,
    session: SessionId,
    epoch: Epoch,
    commit: CommitPoint,
    written: u64,
    consumed: u64,
    partial: Option<Partial>,
    acked: AckRecord,
    /// The request to be called that was last answered.
    called_at: u64,
}

impl Receiver {
    /// The receiving side over the delivery ring; it goes on from the commit point in the control page.
    ///
    /// # Errors
    /// [`Error::Broken`] where the VMM claims to have consumed what was never committed.
    pub(super) fn new(ring: DoubleMapping, memory: Arc<DeviceMemory>) -> Result<Self, Error> {
        let commit = memory.control().delivery.commits.read();
        let mut this = Self {
            ring,
            memory,
            session: SessionId::default(),
            epoch: Epoch::default(),
            commit,
            written: commit.cursor,
            consumed: 0,
            partial: None,
            acked: AckRecord::default(),
            called_at: COMMIT_NEVER,
        };
        this.look_at_consumed()?;
        Ok(this)
    }

    /// Names the session whose frames are accepted.
    pub(super) fn open(&mut self, session: SessionId, epoch: Epoch) {
        self.session = session;
        self.epoch = epoch;
    }

    /// The append that is expected next: the resume point.
    pub(super) fn next(&self) -> Seq {
        Seq(self.commit.seq)
    }

    /// What has been replayed, as far as it makes sense.
    pub(super) fn replayed(&self) -> Seq {
        let said = self
            .memory
            .control()
            .consumer
            .replayed
            .load(Ordering::Relaxed);
        Seq(said.min(self.commit.seq))
    }

    /// Bytes that the VMM has not consumed.
    pub(super) fn backlog(&self) -> u64 {
        self.commit.cursor - self.consumed
    }

    /// Begins with a new connection: what was not committed is forgotten.
    pub(super) fn resume(&mut self) {
        self.written = self.commit.cursor;
        self.partial = None;
        self.acked = AckRecord {
            received: self.next(),
            replayed: Seq(0),
        };
    }

    /// Looks how much the VMM has consumed. True where space became free.
    ///
    /// # Errors
    /// [`Error::Broken`] where it goes back or beyond what is committed.
    pub(super) fn look_at_consumed(&mut self) -> Result<bool, Error> {
        let consumed = self
            .memory
            .control()
            .consumer
            .consumed
            .load(Ordering::Acquire);
        if !(self.consumed..=self.commit.cursor).contains(&consumed)
            || self.commit.cursor - consumed > self.ring.len() as u64
        {
            return Err(Error::Broken("consumed outside of what is committed"));
        }
        let moved = consumed > self.consumed;
        self.consumed = consumed;
        Ok(moved)
    }

    /// Where the next byte is written, as an ever-growing position.
    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// The free bytes from a position on, which is at or after `written`.
    pub(super) fn free_from(&self, position: u64) -> u64 {
        self.consumed + self.ring.len() as u64 - position
    }

    /// The address of a position.
    pub(super) fn address(&self, position: u64) -> *mut u8 {
        self.ring.at(position)
    }

    /// Asks the VMM for a kick once it has consumed up to `position`; true where it already has.
    ///
    /// # Errors
    /// As [`Receiver::look_at_consumed`].
    pub(super) fn ask_kick(&mut self, position: u64) -> Result<bool, Error> {
        let word = &self.memory.control().delivery.kick_at;
        word.store(position, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.look_at_consumed()?;
        Ok(self.consumed >= position)
    }

    /// Asks the VMM for no kicks about space.
    pub(super) fn ask_no_kick(&self) {
        let word = &self.memory.control().delivery.kick_at;
        word.store(COMMIT_NEVER, Ordering::Relaxed);
    }

    /// Whether frames keep an `Output` of the peer waiting for what the VMM replays: asks for a kick
    /// at the next append replayed. True where one already is.
    pub(super) fn ask_replay_kick(&self, mode: AckMode) -> bool {
        let word = &self.memory.control().delivery.replay_kick_at;
        if mode == AckMode::Received {
            word.store(COMMIT_NEVER, Ordering::Relaxed);
            return false;
        }
        word.store(self.acked.replayed.0 + 1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.replayed() > self.acked.replayed
    }

    /// Takes `len` bytes that were received at [`Receiver::written`] and commits what is whole.
    ///
    /// # Errors
    /// [`BadFrame`] on anything that a correct peer does not send; the connection must be dropped.
    pub(super) fn received(&mut self, len: usize, stats: &mut Stats) -> Result<Progress, BadFrame> {
        self.written += len as u64;
        let mut progress = Progress::default();
        while let Some(end) = self.check_one(stats)? {
            progress.ended |= end;
            progress.committed = true;
        }
        Ok(progress)
    }

    /// Checks as much of one frame as is there; commits it if it is whole. Says whether it was `END`.
    fn check_one(&mut self, stats: &mut Stats) -> Result<Option<bool>, BadFrame> {
        let start = self.commit.cursor;
        let there = (self.written - start) as usize;
        if self.partial.is_none() {
            if there < HEADER_LEN {
                return Ok(None);
            }
            let mut header = [0; HEADER_LEN];
            header.copy_from_slice(self.bytes(start, HEADER_LEN));
            let header = FrameHeader::decode(&header)?;
            self.expect(&header)?;
            self.partial = Some(Partial {
                header,
                summed: 0,
                crc: 0,
            });
        }
        let Some(mut partial) = self.partial.take() else {
            return Ok(None);
        };
        let body_len = partial.header.body_len as usize;
        let body_there = (there - HEADER_LEN).min(body_len);
        if body_there > partial.summed {
            let from = start + (HEADER_LEN + partial.summed) as u64;
            let fresh = self.bytes(from, body_there - partial.summed);
            partial.crc = format::crc32c_append(partial.crc, fresh);
            partial.summed = body_there;
        }
        let frame_len = partial.header.frame_len();
        if there < frame_len {
            self.partial = Some(partial);
            return Ok(None);
        }
        let (first, next) = (partial.header.first.0, partial.header.next().0);
        usdt::received(self.session.number(), first, next);
        let trailer = self.bytes(start + (HEADER_LEN + body_len) as u64, TRAILER_LEN);
        let expected = u32::from_le_bytes(*trailer.first_chunk().expect("the trailer has 4 bytes"));
        if partial.crc != expected {
            return Err(BadFrame::Format(format::Error::Checksum {
                what: "frame body",
                expected,
                found: partial.crc,
            }));
        }
        self.commit_frame(&partial.header, stats);
        Ok(Some(partial.header.flags.contains(FrameFlags::END)))
    }

    fn expect(&self, header: &FrameHeader) -> Result<(), BadFrame> {
        if header.session != self.session || header.epoch != self.epoch {
            return Err(BadFrame::Session);
        }
        if header.flags.contains(FrameFlags::META) {
            return Err(BadFrame::Format(format::Error::Field(
                "frame header: META outside of a file",
            )));
        }
        if header.first.0 != self.commit.seq {
            return Err(BadFrame::Sequence {
                expected: self.commit.seq,
                found: header.first.0,
            });
        }
        Ok(())
    }

    /// The commit point (R9): from here on a live replayer sees the frame.
    fn commit_frame(&mut self, header: &FrameHeader, stats: &mut Stats) {
        self.commit = CommitPoint {
            cursor: self.commit.cursor + header.frame_len() as u64,
            seq: header.next().0,
        };
        self.memory.control().delivery.commits.commit(self.commit);
        usdt::committed(self.session.number(), header.first.0, header.next().0);
        stats.frame_in(header.count, header.body_len as usize);
    }

    /// Bytes of the ring that the kernel has written.
    fn bytes(&self, position: u64, len: usize) -> &[u8] {
        // SAFETY: the kernel has reported these bytes and writes only behind them; a VMM that
        // scribbles over them fails its own checksums.
        unsafe { self.ring.slice(position, len) }
    }

    /// The record to send, if it says anything new. None once the VMM is dead: what is committed then
    /// is no longer seen by a live replayer.
    pub(super) fn acknowledgement(&mut self) -> Option<AckRecord> {
        if self.memory.control().owner.is_dead() {
            return None;
        }
        let record = AckRecord {
            received: self.next(),
            replayed: self.replayed(),
        };
        if record == self.acked {
            return None;
        }
        self.acked = record;
        Some(record)
    }

    /// Whether what is committed is not yet acknowledged.
    pub(super) fn owes_acknowledgement(&self) -> bool {
        self.acked.received.0 != self.commit.seq
    }

    /// Whether the VMM asked to be called for what is committed now and has not been.
    pub(super) fn wants_call(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let at = self
            .memory
            .control()
            .consumer
            .call_at
            .load(Ordering::Relaxed);
        if at == self.called_at || at > self.commit.cursor {
            return false;
        }
        self.called_at = at;
        true
    }
}
