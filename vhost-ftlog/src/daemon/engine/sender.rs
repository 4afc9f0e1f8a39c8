//! The sending side: log buffers out of the arena, used buffers back in as the peer acknowledges (R8).
//!
//! ```text
//!   used        received       sent        gathered      available
//!    |  acked ...  |  on the way |  in the frame |  published   |
//! ```
//!
//! All are positions of the log queue and only grow, except that a new connection sets `sent` and
//! `gathered` back to what the peer expects next. The sequence number of a position is the position
//! plus a constant. Owned by the data thread.
#![allow(unsafe_code)] // Hands addresses in the arena to the kernel.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use format::{AckRecord, Epoch, FrameFlags, FrameHeader, MAX_APPEND_LEN, Seq, SessionId};
use ring::{Device, Error, MappedVring};

use super::frame::{FRAME_BYTES, OutFrame};
use super::stats::{AckTimes, Stats};
use crate::config_space::{AckMode, Tuning};
use crate::daemon::memory::DeviceMemory;

/// Whether the VMM's log has ended for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// It has not.
    No,
    /// It has; the `END` frame has yet to be sent.
    Due,
    /// The `END` frame is in flight or sent.
    Sent,
}

/// What an acknowledgement changed.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Acked {
    /// The VMM asked to be called.
    pub call: bool,
    /// The VMM waits for space: wake the futex.
    pub wake_space: bool,
}

/// An acknowledgement that no correct peer sends.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BadAck;

/// The sending side of a session.
pub(super) struct Sender {
    queue: Device<MappedVring>,
    memory: Arc<DeviceMemory>,
    /// Sequence number minus position.
    offset: u64,
    session: SessionId,
    epoch: Epoch,
    received: u64,
    replayed: u64,
    sent: u64,
    gathered: u64,
    frame: Box<OutFrame>,
    /// The next append does not fit in the frame.
    full: bool,
    flight: Box<OutFrame>,
    in_flight: bool,
    /// When the first append of the frame was seen, in ns.
    since: u64,
    /// When the last full batch left, in ns, as long as batches are full: the next is looked for when its time
    /// has come, or a frame is full. A kick for each append or batch would take the CPU from a producer that shares
    /// it, again and again.
    streaming: Option<u64>,
    /// When the peer last acknowledged something, or when the first frame left after all was, in ns.
    quiet_since: u64,
    /// How long the peer was quiet before its last acknowledgement, in ns.
    quiet_for: u64,
    flush: u64,
    end: End,
    times: AckTimes,
}

impl Sender {
    /// The sending side over the log queue. `base_seq` is the sequence number of the first append
    /// that is not used.
    pub(super) fn new(queue: Device<MappedVring>, memory: Arc<DeviceMemory>) -> Self {
        let used = queue.used();
        let base_seq = memory.control().producer.base_seq.load(Ordering::Acquire);
        Self {
            queue,
            memory,
            offset: base_seq.wrapping_sub(used),
            session: SessionId::default(),
            epoch: Epoch::default(),
            received: used,
            replayed: used,
            sent: used,
            gathered: used,
            frame: OutFrame::new(),
            full: false,
            flight: OutFrame::new(),
            in_flight: false,
            since: 0,
            streaming: None,
            quiet_since: 0,
            quiet_for: u64::MAX,
            flush: 0,
            end: End::No,
            times: AckTimes::default(),
        }
    }

    /// Names the session that the frames belong to.
    pub(super) fn open(&mut self, session: SessionId, epoch: Epoch) {
        self.session = session;
        self.epoch = epoch;
    }

    fn seq(&self, position: u64) -> u64 {
        position.wrapping_add(self.offset)
    }

    /// Everything below this is acknowledged to the VMM.
    pub(super) fn used_seq(&self) -> Seq {
        Seq(self.seq(self.queue.used()))
    }

    /// The used index, for GET_VRING_BASE.
    pub(super) fn base(&self) -> u16 {
        self.queue.used() as u16
    }

    /// What the peer's replica has received and replayed.
    pub(super) fn progress(&self) -> (Seq, Seq) {
        (Seq(self.seq(self.received)), Seq(self.seq(self.replayed)))
    }

    /// Appends that are not acknowledged.
    pub(super) fn depth(&self) -> u64 {
        self.queue.seen() - self.queue.used()
    }

    /// Checks that a replica which expects `next` can be served.
    ///
    /// # Errors
    /// [`BadAck`] where it lacks what it has acknowledged, or has what was never sent.
    pub(super) fn can_resume(&mut self, next: Seq) -> Result<(), BadAck> {
        let available = self.queue.available().map_err(|_| BadAck)?;
        let position = next.0.wrapping_sub(self.offset);
        if (self.received..=available).contains(&position) {
            Ok(())
        } else {
            Err(BadAck)
        }
    }

    /// Goes on from what the peer expects next, over a new connection.
    pub(super) fn resume(&mut self, next: Seq) {
        let position = next.0.wrapping_sub(self.offset);
        self.sent = position;
        self.gathered = position;
        self.received = position;
        self.frame.clear();
        self.full = false;
        self.streaming = None;
        self.quiet_for = u64::MAX;
        self.in_flight = false;
        if self.end == End::Sent {
            self.end = End::Due;
        }
        self.times.clear();
    }

    /// The VMM is dead: what it published goes out, then `END`.
    pub(super) fn finish(&mut self) {
        if self.end == End::No {
            self.end = End::Due;
        }
    }

    /// Whether everything that was published is acknowledged.
    pub(super) fn is_drained(&mut self) -> bool {
        self.queue
            .available()
            .is_ok_and(|available| self.queue.used() == available)
    }

    /// Whether everything is sent and `END` after it.
    pub(super) fn is_finished(&self) -> bool {
        self.end == End::Sent && !self.in_flight
    }

    /// Whether an `Output` waits for an acknowledgement.
    pub(super) fn output_waits(&self) -> bool {
        self.flush > self.seq(self.queue.used()) && self.flush <= self.seq(self.queue.seen())
    }

    /// Gathers what is published into the frame; says how many appends that were.
    ///
    /// # Errors
    /// [`Error::Broken`] where the VMM broke the rules of the ring.
    pub(super) fn gather(&mut self, now: u64) -> Result<u64, Error> {
        let available = self.queue.available()?;
        if self.gathered == available || self.full {
            return Ok(0);
        }
        let before = self.gathered;
        if self.frame.count() == 0 {
            self.since = self.streaming.unwrap_or(now);
        }
        while self.gathered < available {
            let desc = self.queue.desc(self.gathered)?;
            let len = desc.len as usize;
            if len == 0 || len > MAX_APPEND_LEN {
                return Err(Error::Broken("append is empty or too long"));
            }
            let at = self
                .memory
                .of_guest(desc.addr, desc.len)
                .and_then(|offset| self.memory.mapping().bytes_at(offset, len))
                .ok_or(Error::Broken("append outside of the memory"))?;
            if !self.frame.fits(at, len) {
                self.full = true;
                break;
            }
            // SAFETY: the mapping lives as long as the memory that self holds, and a frame is sent or
            // cleared, and the kernel done with it, before self goes.
            unsafe { self.frame.push(at, len) };
            self.gathered += 1;
        }
        Ok(self.gathered - before)
    }

    /// When the gathered batch is to be sent, or a batch to be looked for, at the latest, in ns; `None`
    /// where nothing is gathered and nothing expected.
    pub(super) fn deadline(&self, tuning: &Tuning) -> Option<u64> {
        let since = match self.frame.count() {
            0 => self.streaming?,
            _ => self.since,
        };
        Some(since + batch_ns(tuning))
    }

    /// When to look again although nothing has come, in ns. While frames are on the way to a peer that answers
    /// promptly its acknowledgement is the clock, and a batch whose time comes meanwhile leaves with it, or with
    /// the tick where the peer falls silent: a sleep with a limit sets and clears a timer, which takes longer than
    /// all else that a batch costs where a hypervisor has to be asked for it.
    pub(super) fn timer(&self, tuning: &Tuning, now: u64) -> Option<u64> {
        if self.in_flight || (self.sent > self.received && self.is_prompt(tuning, now)) {
            return None;
        }
        self.deadline(tuning)
    }

    /// Whether the peer answered the last time, and can still answer now, within twice the time of a batch.
    fn is_prompt(&self, tuning: &Tuning, now: u64) -> bool {
        let quiet = now.saturating_sub(self.quiet_since);
        self.quiet_for.max(quiet) <= 2 * batch_ns(tuning)
    }

    fn is_due(&self, tuning: &Tuning, now: u64, hurry: bool) -> bool {
        if self.frame.count() == 0 {
            return false;
        }
        hurry
            || self.full
            || self.end != End::No
            || self.flush > self.seq(self.sent)
            || self.frame.len() >= tuning.batch_bytes as usize
            || self
                .deadline(tuning)
                .is_some_and(|deadline| now >= deadline)
    }

    /// The next message to send, if one is due and none is in flight. `hurry`: wait for no batch.
    pub(super) fn next_message(
        &mut self,
        tuning: &Tuning,
        now: u64,
        hurry: bool,
        stats: &mut Stats,
    ) -> Option<*const libc::msghdr> {
        if self.in_flight {
            return None;
        }
        let mut flags = FrameFlags::NONE;
        if !self.is_due(tuning, now, hurry) {
            if self.end != End::Due || self.frame.count() > 0 {
                return None;
            }
            flags = FrameFlags::END;
            self.end = End::Sent;
        }
        let header = FrameHeader {
            flags,
            session: self.session,
            epoch: self.epoch,
            first: Seq(self.seq(self.sent)),
            count: 0,
            body_len: 0,
            stamp_ns: now,
        };
        if self.sent == self.received {
            self.quiet_since = now;
        }
        std::mem::swap(&mut self.frame, &mut self.flight);
        self.frame.clear();
        self.full = false;
        self.in_flight = true;
        let is_full = self.flight.len() >= tuning.batch_bytes as usize;
        self.streaming = is_full.then_some(now);
        stats.frame_out(self.flight.count(), self.flight.len());
        let flush_ns = self
            .memory
            .control()
            .producer
            .flush_ns
            .load(Ordering::Relaxed);
        self.times.departs(
            self.flush,
            self.seq(self.sent),
            self.seq(self.gathered),
            flush_ns,
            now,
        );
        Some(self.flight.seal(header))
    }

    /// The kernel has taken `sent` bytes of the message in flight: the rest of it, if there is any.
    pub(super) fn sent(&mut self, sent: usize, now: u64) -> Option<*const libc::msghdr> {
        let rest = self.flight.advance(sent);
        if rest.is_none() {
            let before = self.sent;
            self.sent += u64::from(self.flight.count());
            usdt::sent(self.session.number(), self.seq(before), self.seq(self.sent));
            self.in_flight = false;
            self.times.sent(self.seq(self.sent), now);
        }
        rest
    }

    /// The connection is gone, and the kernel has let go of the message.
    pub(super) fn disconnected(&mut self) {
        self.in_flight = false;
    }

    /// Takes an acknowledgement of the peer.
    ///
    /// # Errors
    /// [`BadAck`] where it goes back, or covers what was never sent.
    pub(super) fn acknowledge(
        &mut self,
        record: AckRecord,
        mode: AckMode,
        now: u64,
        stats: &mut Stats,
    ) -> Result<Acked, BadAck> {
        let received = record.received.0.wrapping_sub(self.offset);
        let in_kernel = if self.in_flight {
            u64::from(self.flight.count())
        } else {
            0
        };
        // A peer can be quicker than the completion of the send.
        if !(self.received..=self.sent + in_kernel).contains(&received) {
            return Err(BadAck);
        }
        if received > self.received {
            self.quiet_for = now.saturating_sub(self.quiet_since);
            self.quiet_since = now;
        }
        self.received = received;
        let replayed = record.replayed.0.wrapping_sub(self.offset);
        if (self.replayed..=received).contains(&replayed) {
            self.replayed = replayed;
        }
        Ok(self.give_back(mode, now, stats))
    }

    /// Returns to the VMM what the mode counts as acknowledged.
    pub(super) fn give_back(&mut self, mode: AckMode, now: u64, stats: &mut Stats) -> Acked {
        self.look_at_sight(stats);
        let control = self.memory.control();
        let words = &control.sender;
        words
            .received
            .store(self.seq(self.received), Ordering::Relaxed);
        words
            .replayed
            .store(self.seq(self.replayed), Ordering::Relaxed);
        let upto = match mode {
            AckMode::Received => self.received,
            AckMode::Replayed => self.replayed,
        };
        if upto <= self.queue.used() {
            return Acked::default();
        }
        usdt::acknowledged(
            self.session.number(),
            self.seq(self.queue.used()),
            self.seq(upto),
        );
        self.times.acknowledged(self.seq(upto), now, stats);
        let call = self.queue.use_up_to(upto, 0);
        let wake_space = control.producer.space_wanted.load(Ordering::Relaxed) <= self.seq(upto);
        Acked { call, wake_space }
    }

    /// Looks what the VMM has seen of what it was told.
    pub(super) fn look_at_sight(&mut self, stats: &mut Stats) {
        let sight = &self.memory.control().sight;
        let seen = sight.seen.load(Ordering::Acquire);
        let seen_ns = sight.seen_ns.load(Ordering::Relaxed);
        self.times.seen(seen, seen_ns, stats);
    }

    /// Looks at the flush request.
    #[inline]
    pub(super) fn look_at_flush(&mut self) {
        self.flush = self.memory.control().producer.flush.load(Ordering::Acquire);
    }

    /// Prepares for sleep: asks for a kick where one is needed, and says whether something new has
    /// come meanwhile, in which case the daemon must not sleep.
    ///
    /// # Errors
    /// [`Error::Broken`] where the VMM broke the rules of the ring.
    pub(super) fn fall_asleep(
        &mut self,
        tuning: &Tuning,
        now: u64,
        is_sending: bool,
    ) -> Result<bool, Error> {
        if !is_sending || self.in_flight || self.full {
            // Nothing could be sent: the completion or the connection wakes us.
            self.queue.ask_no_kick();
            return Ok(false);
        }
        let flush = self.memory.control().doorbell().fall_asleep();
        if flush != self.flush && flush > self.seq(self.sent) {
            return Ok(true);
        }
        let is_over = self.deadline(tuning).is_some_and(|at| now >= at);
        if self.frame.count() == 0 && is_over {
            self.streaming = None;
        }
        let ahead = self.kick_after(tuning);
        self.queue.ask_kick(self.gathered + ahead)
    }

    /// How many more appends may come before the one that the daemon wants to know of: none while it has no batch
    /// whose time runs, else about as many as leave the next to fill the batch, or the frame where batches come
    /// one after the other.
    fn kick_after(&self, tuning: &Tuning) -> u64 {
        let streams = self.streaming.is_some();
        let like = if streams { &self.flight } else { &self.frame };
        let Some(mean) = like.len().checked_div(like.count() as usize) else {
            return 0;
        };
        let fit = |target: usize| (target.saturating_sub(self.frame.len()) / mean.max(1)) as u64;
        let more = if streams {
            fit(FRAME_BYTES).saturating_sub(1)
        } else {
            fit(FRAME_BYTES.min(tuning.batch_bytes as usize))
        };
        let room = self.queue.used() + u64::from(self.queue.size()) - self.gathered;
        more.min(room / 2)
    }

    /// The daemon looks by itself again.
    pub(super) fn wake(&self) {
        self.memory.control().doorbell().wake();
        self.queue.ask_no_kick();
    }
}

fn batch_ns(tuning: &Tuning) -> u64 {
    u64::from(tuning.batch_us) * 1000
}
