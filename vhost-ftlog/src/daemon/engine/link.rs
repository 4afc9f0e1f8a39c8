//! The connection of the session: frames and records over it, its beginning and its end.
#![allow(unsafe_code)] // Hands addresses in the arena to the kernel.

use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use format::{ACK_LEN, AckRecord, Seq};

use super::command::{Prepared, Report, SessionParamsOf};
use super::io::{ACK_BUFFER, ON_SOCKET, Token};
use super::receiver::Progress;
use super::ring_io::{Ring, Slot, Wait};
use super::sender::Acked;
use super::{Engine, Receiver};
use crate::config_space::{LinkState, Reach, Role, SessionParams, Status, Tuning};
use crate::gone;
use crate::handshake::{Purpose, Refusal};
use crate::notice::{LostReason, Notice};

/// At most this many bytes are received at once, so that their checksum is made while they are in
/// the cache.
const RECEIVE_BYTES: u64 = 256 << 10;
/// Length of a stretch that is provided to the kernel for the log, in bytes.
const STRETCH: u64 = 256 << 10;
/// The same for records.
const ACK_STRETCH: u64 = ACK_BUFFER as u64 / 4;

/// A connection.
pub(super) struct Link {
    socket: TcpStream,
    /// Bytes of records that were received, and those of them that were read.
    acks_written: u64,
    acks_read: u64,
    /// When frames last came, in ns.
    active_at: u64,
    /// End of what is provided to the kernel, where it takes provided stretches.
    provided: Option<u64>,
    /// The receiver has said that its VMM is dead; the link is closed when that is sent.
    closing: bool,
}

impl Link {
    /// Whether frames came so recently that it is worth spinning for the next.
    pub(super) fn is_recent(&self, now: u64, tuning: &Tuning) -> bool {
        now.saturating_sub(self.active_at) < u64::from(tuning.spin_us) * 1000
    }
}

impl<R: Ring> Engine<R> {
    /// Sends the next frame, if one is due.
    pub(super) fn send_frame(&mut self) {
        let hurry = self.draining;
        let Some(sender) = &mut self.sender else {
            return;
        };
        let message = sender.next_message(&self.tuning, self.now, hurry, &mut self.stats);
        let Some(message) = message else {
            return;
        };
        // SAFETY: the frame is in a box of the sender and does not change before its completion; the
        // sender and its memory go only after the connection is quiesced.
        unsafe { self.io.send_frame(message) };
    }

    pub(super) fn frame_sent(&mut self, result: i32) {
        let Some(link) = &self.link else {
            return;
        };
        let Ok(sent) = usize::try_from(result) else {
            // The receive that is under way ends too, after it has handed over the records that are
            // still there: what the peer acknowledged, or that its VMM is dead. Where the connection itself
            // is whole (no memory, say) the peer sees its end by this.
            let _ = link.socket.shutdown(Shutdown::Write);
            return;
        };
        let now = (self.config.clock)();
        let Some(sender) = &mut self.sender else {
            return;
        };
        if let Some(rest) = sender.sent(sent, now) {
            self.stats.counters.short_sends += 1;
            // SAFETY: as in `send_frame`.
            unsafe { self.io.send_frame(rest) };
        }
    }

    pub(super) fn acks_received(&mut self, result: i32) {
        let Some(link) = &mut self.link else {
            return;
        };
        match usize::try_from(result) {
            Ok(0) => return self.lose(LostReason::PeerClosed),
            Ok(len) => link.acks_written += len as u64,
            Err(_) if result == -libc::ENOBUFS => return,
            Err(_) => return self.lose(LostReason::Network),
        }
        self.now = (self.config.clock)();
        while let Some(link) = &mut self.link
            && link.acks_written - link.acks_read >= ACK_LEN as u64
        {
            let record = self.io.ack(link.acks_read);
            link.acks_read += ACK_LEN as u64;
            if !self.acknowledged(&record) {
                return self.lose(LostReason::Protocol);
            }
        }
    }

    /// One record. False where no correct peer sends it.
    fn acknowledged(&mut self, bytes: &[u8; ACK_LEN]) -> bool {
        let (Some(params), Some(sender)) = (self.params, &mut self.sender) else {
            return false;
        };
        if gone::is(bytes, params.session) {
            self.peer_vmm_died();
            return true;
        }
        self.stats.counters.acks_in += 1;
        let Ok(record) = AckRecord::decode(bytes, params.session) else {
            return false;
        };
        match sender.acknowledge(record, self.tuning.ack_mode, self.now, &mut self.stats) {
            Ok(acked) => {
                self.tell_vmm(acked);
                true
            }
            Err(_) => false,
        }
    }

    /// The backup's VMM is dead, its daemon says. Told once.
    pub(super) fn peer_vmm_died(&mut self) {
        if let Some(sender) = &self.sender
            && !self.peer_vmm_dead
        {
            let next = sender.used_seq();
            self.peer_vmm_dead = true;
            self.notify(Notice::PeerVmmDead { next });
        }
    }

    pub(super) fn tell_vmm(&mut self, acked: Acked) {
        if acked.call {
            self.stats.counters.calls += 1;
            self.io.call(Slot::LogCall);
        } else {
            self.stats.counters.calls_suppressed += 1;
        }
        if acked.wake_space
            && let Some(memory) = &self.memory
        {
            let word = &memory.control().sender.space;
            word.fetch_add(1, std::sync::atomic::Ordering::Release);
            let flags = rustix::thread::futex::Flags::empty();
            // A futex of our own mapping; there is nothing to do where waking fails.
            let _ = rustix::thread::futex::wake(word, flags, i32::MAX as u32);
        }
        if acked.call && self.config.yield_to_called {
            std::thread::yield_now();
            self.now = (self.config.clock)();
        }
    }

    /// Frames that came are checked, committed, then acknowledged, then told to the VMM.
    pub(super) fn log_received(&mut self, result: i32) {
        if self.link.is_none() {
            return;
        }
        let len = match usize::try_from(result) {
            Ok(0) => return self.lose(LostReason::PeerClosed),
            Ok(len) => len,
            Err(_) if result == -libc::ENOBUFS => return,
            Err(_) => return self.lose(LostReason::Network),
        };
        let Some(receiver) = &mut self.receiver else {
            return;
        };
        let progress = match receiver.received(len, &mut self.stats) {
            Ok(progress) => progress,
            Err(error) => {
                tracing::warn!(%error, "bad log from the peer");
                return self.lose(LostReason::Protocol);
            }
        };
        self.progressed(progress);
    }

    fn progressed(&mut self, progress: Progress) {
        if let Some(link) = &mut self.link {
            link.active_at = self.now;
        }
        if progress.ended
            && let Some(receiver) = &self.receiver
        {
            let next = receiver.next();
            self.notify(Notice::PeerVmmDead { next });
        }
    }

    /// Acknowledges what is committed, then calls the VMM.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn pump_delivery(&mut self) -> std::io::Result<()> {
        let Some(receiver) = &mut self.receiver else {
            return Ok(());
        };
        let mut acknowledged = false;
        let session = self.params.map(|params| params.session);
        if let (Some(session), Some(link)) = (session, &self.link)
            && !link.closing
            && !self.io.is_under_way(Token::SendAck)
            && let Some(record) = receiver.acknowledgement()
        {
            self.io.send_ack(record.encode(session));
            self.stats.counters.acks_out += 1;
            acknowledged = true;
        }
        if receiver.wants_call() {
            self.stats.counters.calls += 1;
            if acknowledged {
                // The acknowledgement leaves first: somebody waits for it on the other host.
                self.io.enter(Wait::No)?;
            }
            self.io.call(Slot::DeliveryCall);
        }
        Ok(())
    }

    pub(super) fn ack_sent(&mut self, result: i32) {
        let Some(link) = &self.link else {
            return;
        };
        if link.closing {
            self.told_gone = result == ACK_LEN as i32;
            self.lose(LostReason::PeerClosed);
        } else if result != ACK_LEN as i32 {
            self.lose(LostReason::Network);
        }
    }

    /// Keeps a receive under way on the connection.
    pub(super) fn arm_link(&mut self) {
        match self.role() {
            Some(Role::Sender) => self.arm_acks(),
            Some(Role::Receiver) => {
                if let Err(error) = self.arm_delivery() {
                    tracing::error!(%error, "the VMM broke the delivery ring");
                    self.broken();
                }
            }
            None => {}
        }
    }

    fn arm_acks(&mut self) {
        let Some(link) = &mut self.link else {
            return;
        };
        // What is not read yet is never written over.
        let end = link.acks_read + ACK_BUFFER as u64;
        if let Some(provided) = &mut link.provided {
            while *provided + ACK_STRETCH <= end {
                let at = self.io.acks_at(*provided);
                // SAFETY: the bytes live as long as the ring, and these are free.
                if !unsafe { self.io.ring().provide(at, ACK_STRETCH as u32) } {
                    break;
                }
                *provided += ACK_STRETCH;
            }
        }
        if self.io.is_under_way(Token::ReceiveAck) {
            return;
        }
        if link.provided.is_some() {
            // SAFETY: as above.
            unsafe { self.io.receive_provided(Token::ReceiveAck) };
        } else {
            let at = link.acks_written;
            let contiguous = ACK_BUFFER as u64 - at % ACK_BUFFER as u64;
            let len = contiguous.min(end - at);
            // SAFETY: as above.
            unsafe {
                let bytes = self.io.acks_at(at);
                self.io.receive(Token::ReceiveAck, bytes, len as u32);
            }
        }
    }

    fn arm_delivery(&mut self) -> Result<(), ring::Error> {
        let (Some(receiver), Some(link)) = (&mut self.receiver, &mut self.link) else {
            return Ok(());
        };
        receiver.look_at_consumed()?;
        if let Some(provided) = &mut link.provided {
            // SAFETY: the ring is mapped until the connection is quiesced, and the stretches are free.
            unsafe { provide(self.io.ring(), receiver, provided) };
            let provided = *provided;
            if self.io.is_under_way(Token::ReceiveLog) {
                return Ok(());
            }
            if provided > receiver.written() {
                receiver.ask_no_kick();
                // SAFETY: as above.
                unsafe { self.io.receive_provided(Token::ReceiveLog) };
                return Ok(());
            }
        } else {
            if self.io.is_under_way(Token::ReceiveLog) {
                return Ok(());
            }
            let written = receiver.written();
            let free = receiver.free_from(written);
            if free > 0 {
                receiver.ask_no_kick();
                let len = free.min(RECEIVE_BYTES) as u32;
                let bytes = receiver.address(written);
                // SAFETY: as above; `len` bytes behind `written` are free and contiguous.
                unsafe { self.io.receive(Token::ReceiveLog, bytes, len) };
                return Ok(());
            }
        }
        // Full: the window of the connection closes. A kick tells when a good part is free again.
        self.stats.counters.delivery_full += 1;
        let backlog = receiver.backlog();
        let wanted = receiver.written() - backlog.div_ceil(2);
        if receiver.ask_kick(wanted)? {
            self.again = true;
        }
        Ok(())
    }

    /// A peer asks for a connection of the session, or (`purpose` is `None`) this side wants to dial.
    pub(super) fn prepare(
        &mut self,
        purpose: Option<Purpose>,
        of: SessionParamsOf,
    ) -> Result<Prepared, Refusal> {
        let params = self
            .params
            .filter(|params| SessionParamsOf::from(params) == of && !self.finished)
            .ok_or(Refusal::NoSession)?;
        if params.role == Role::Receiver && self.vmm_dead {
            return Err(Refusal::VmmDead);
        }
        match purpose {
            None => {}
            Some(Purpose::Bulk(_)) => return Err(Refusal::NoBulk),
            Some(Purpose::Log { role, next }) => {
                if params.reach != Reach::Listen || role != params.role.other() {
                    return Err(Refusal::Role);
                }
                if let (Role::Sender, Some(sender)) = (params.role, &mut self.sender) {
                    sender.can_resume(next).map_err(|_| Refusal::StateLost)?;
                }
            }
        }
        if self.link.is_some() {
            self.drop_link(LostReason::Replaced);
        }
        self.generation += 1;
        let next = match params.role {
            Role::Sender => Seq(0),
            Role::Receiver => self.receiver.as_ref().map_or(Seq(0), Receiver::next),
        };
        Ok(Prepared {
            generation: self.generation,
            next,
        })
    }

    /// The prepared connection is up.
    pub(super) fn adopt(&mut self, generation: u64, socket: TcpStream, peer_next: Seq) {
        let Some(params) = self.params.filter(|_| generation == self.generation) else {
            return; // the session was closed, or a newer connection is on its way
        };
        if let Err(error) = self.begin_link(params, socket, peer_next) {
            tracing::warn!(%error, "a connection could not be used");
            self.notify(Notice::Lost(LostReason::Refused));
            self.report(Report::Lost);
        }
    }

    fn begin_link(
        &mut self,
        params: SessionParams,
        socket: TcpStream,
        peer_next: Seq,
    ) -> std::io::Result<()> {
        assert!(self.link.is_none(), "preparing ended the old connection");
        socket.set_read_timeout(None)?;
        socket.set_write_timeout(None)?;
        let resume = match (params.role, &mut self.sender, &mut self.receiver) {
            (Role::Sender, Some(sender), _) => {
                if sender.can_resume(peer_next).is_err() {
                    return Err(std::io::Error::other(
                        "the peer's replica has lost its state",
                    ));
                }
                sender.resume(peer_next);
                peer_next
            }
            (Role::Receiver, _, Some(receiver)) => {
                receiver.resume();
                receiver.next()
            }
            _ => return Err(std::io::Error::other("the queues are stopped")),
        };
        let file: OwnedFd = socket.as_fd().try_clone_to_owned()?;
        self.io.set_file(Slot::Socket, Some(file))?;
        let start = match (&self.receiver, params.role) {
            (Some(receiver), Role::Receiver) => receiver.written(),
            _ => 0,
        };
        let provided = self.io.ring().can_provide().then_some(start);
        self.link = Some(Link {
            socket,
            acks_written: 0,
            acks_read: 0,
            active_at: self.now,
            provided,
            closing: false,
        });
        self.stats.counters.connects += 1;
        if let Some(sender) = self.sender.as_mut().filter(|_| params.role == Role::Sender) {
            let acked = sender.give_back(self.tuning.ack_mode, self.now, &mut self.stats);
            self.tell_vmm(acked);
        }
        self.notify(Notice::Connected { resume });
        Ok(())
    }

    /// The connection failed: let go of it and have it made anew.
    pub(super) fn lose(&mut self, reason: LostReason) {
        if self.link.is_some() {
            self.drop_link(reason);
            self.report(Report::Lost);
        }
    }

    /// Lets go of the connection at once; what it had not sent is not sent any more.
    pub(super) fn drop_link(&mut self, reason: LostReason) {
        let Some(link) = self.link.take() else {
            return;
        };
        if matches!(reason, LostReason::Closed | LostReason::Replaced) {
            // An immediate reset: nothing in the socket's buffer leaves any more (R13). Where it does
            // not succeed the connection is already reset.
            let socket = socket2::SockRef::from(&link.socket);
            let _ = socket.set_linger(Some(Duration::ZERO));
            let _ = rustix::net::connect_unspec(&link.socket);
        }
        self.release_socket(&link);
        self.stats.counters.losses += 1;
        self.notify(Notice::Lost(reason));
    }

    fn release_socket(&mut self, link: &Link) {
        // Makes operations that wait for the network end; a failure means that it is gone.
        let _ = link.socket.shutdown(Shutdown::Both);
        let quiet = self.io.quiesce(&ON_SOCKET);
        let empty = self.io.set_file(Slot::Socket, None);
        let withdrawn = match link.provided {
            Some(_) => self.io.ring().withdraw(),
            None => Ok(()),
        };
        quiet
            .and(empty)
            .and(withdrawn)
            .expect("a ring that worked cancels its operations and updates its own tables");
        if let Some(sender) = &mut self.sender {
            sender.disconnected();
        }
    }

    /// At the end of the daemon: what is in the socket's buffer still goes out.
    pub(super) fn end_link_in_order(&mut self) {
        if let Some(link) = self.link.take() {
            self.release_socket(&link);
        }
    }

    /// Tells the sender's daemon that the VMM here is dead, and nothing after that.
    pub(super) fn say_gone(&mut self) {
        let Some(params) = self.params else {
            return;
        };
        if self.link.is_none() {
            return;
        }
        if self.io.quiesce(&[Token::SendAck]).is_err() {
            return self.lose(LostReason::Network);
        }
        if let Some(link) = &mut self.link {
            link.closing = true;
            self.io.send_ack(gone::encode(params.session));
        }
    }

    pub(super) fn status(&self) -> Status {
        let link = match (&self.params, &self.link) {
            (None, _) => LinkState::Closed,
            (Some(_), None) => LinkState::Connecting,
            (Some(_), Some(_)) => LinkState::Connected,
        };
        let (received, replayed) = match (&self.sender, &self.receiver, self.params) {
            (_, Some(receiver), Some(params)) if params.role == Role::Receiver => {
                (receiver.next(), receiver.replayed())
            }
            (Some(sender), _, _) => sender.progress(),
            _ => (Seq(0), Seq(0)),
        };
        Status {
            link,
            connects: self.stats.counters.connects as u32,
            received,
            replayed,
        }
    }
}

/// Provides free stretches of the delivery ring to the kernel.
///
/// # Safety
/// The ring stays mapped until the provided stretches are withdrawn.
unsafe fn provide<R: Ring>(ring: &mut R, receiver: &Receiver, provided: &mut u64) {
    loop {
        // Stretches end at multiples of their length, so that a full turn gives whole ones.
        let len = STRETCH - *provided % STRETCH;
        if receiver.free_from(*provided) < len {
            return;
        }
        // SAFETY: the caller's promise; the stretch is free.
        if !unsafe { ring.provide(receiver.address(*provided), len as u32) } {
            return;
        }
        *provided += len;
    }
}
