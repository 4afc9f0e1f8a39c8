//! Which operations are under way, and the memory that they use.
//!
//! Each kind of operation is under way at most once, so its kind is its token. Quiescing cancels a
//! set of kinds and waits until the kernel has let go of their memory; what else completes meanwhile
//! is kept for later.
#![allow(unsafe_code)] // Hands addresses of its own words to the kernel.

use std::cell::UnsafeCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use format::ACK_LEN;

use super::ring_io::{Completion, KernelTime, Op, Ring, SLOTS, Slot, Wait};

/// A kind of operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Token {
    /// Commands of other threads.
    Doorbell = 1,
    /// Kicks, by queue.
    LogKick,
    /// Kicks of the delivery queue.
    DeliveryKick,
    /// Kicks of the event queue.
    EventKick,
    /// The death of the VMM.
    Owner,
    /// A frame going out.
    SendFrame,
    /// Frames coming in.
    ReceiveLog,
    /// An acknowledgement record going out.
    SendAck,
    /// Acknowledgement records coming in.
    ReceiveAck,
    /// The time to tick.
    Tick,
    /// Cancellations.
    Cancel,
}

const ALL: [Token; 11] = [
    Token::Doorbell,
    Token::LogKick,
    Token::DeliveryKick,
    Token::EventKick,
    Token::Owner,
    Token::SendFrame,
    Token::ReceiveLog,
    Token::SendAck,
    Token::ReceiveAck,
    Token::Tick,
    Token::Cancel,
];

impl Token {
    fn of(value: u64) -> Option<Self> {
        let index = usize::try_from(value).ok()?.checked_sub(1)?;
        ALL.get(index).copied()
    }

    const fn bit(self) -> u32 {
        1 << self as u32
    }
}

/// The operations on the connection.
pub(super) const ON_SOCKET: [Token; 4] = [
    Token::SendFrame,
    Token::ReceiveLog,
    Token::SendAck,
    Token::ReceiveAck,
];

/// Bytes of the ring that acknowledgement records are received into: whole records, so that none goes
/// round its end.
pub(super) const ACK_BUFFER: usize = 128 * ACK_LEN;

/// Memory that operations use. It must not move or go while they are under way.
struct Words {
    tick: KernelTime,
    acks_in: UnsafeCell<[u8; ACK_BUFFER]>,
    ack_out: UnsafeCell<[u8; ACK_LEN]>,
}

/// A ring with its bookkeeping.
pub(super) struct Io<R> {
    ring: R,
    words: Box<Words>,
    files: [Option<OwnedFd>; SLOTS as usize],
    under_way: u32,
    deferred: VecDeque<Completion>,
}

/// How often the data thread wakes to tick its progress word, in ns, while there is a VMM.
const TICK_NS: i64 = 20_000_000;
/// The longest time that a cancellation is waited for at once, in ns.
const CANCEL_WAIT_NS: u64 = 100_000_000;

impl<R: Ring> Io<R> {
    /// Over this ring.
    pub(super) fn new(ring: R) -> Self {
        Self {
            ring,
            words: Box::new(Words {
                tick: KernelTime {
                    seconds: 0,
                    nanoseconds: TICK_NS,
                },
                acks_in: UnsafeCell::new([0; ACK_BUFFER]),
                ack_out: UnsafeCell::new([0; ACK_LEN]),
            }),
            files: std::array::from_fn(|_| None),
            under_way: 0,
            deferred: VecDeque::new(),
        }
    }

    /// The ring's answers to what it can do, and provided stretches.
    pub(super) fn ring(&mut self) -> &mut R {
        &mut self.ring
    }

    /// System calls made.
    pub(super) fn enters(&self) -> u64 {
        self.ring.enters()
    }

    /// Puts a file into its slot; it is closed when it is replaced. No operation on the slot may be
    /// under way.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn set_file(&mut self, slot: Slot, file: Option<OwnedFd>) -> io::Result<()> {
        self.ring.set_file(slot, file.as_ref().map(AsFd::as_fd))?;
        self.files[slot as usize] = file;
        Ok(())
    }

    /// Whether an operation of this kind is under way.
    #[inline]
    pub(super) fn is_under_way(&self, token: Token) -> bool {
        self.under_way & token.bit() != 0
    }

    /// Queues an operation of a kind that is not under way.
    ///
    /// # Safety
    /// As for [`Ring::push`].
    unsafe fn begin(&mut self, token: Token, op: Op) {
        assert!(
            !self.is_under_way(token),
            "one operation of a kind at a time"
        );
        self.under_way |= token.bit();
        // SAFETY: the caller's promise.
        unsafe { self.ring.push(op, token as u64) };
    }

    /// Waits for the signals of an eventfd, unless that is under way or the slot is empty.
    pub(super) fn watch_event(&mut self, token: Token, slot: Slot) {
        if self.is_under_way(token) || self.files[slot as usize].is_none() {
            return;
        }
        // SAFETY: the operation names no memory.
        unsafe { self.begin(token, Op::WatchEvent { slot }) };
    }

    /// Wakes this thread after the time of a tick, unless that is under way.
    pub(super) fn watch_tick(&mut self) {
        if !self.is_under_way(Token::Tick) {
            let after = &raw const self.words.tick;
            // SAFETY: the time lives in a box as long as self and never changes.
            unsafe { self.begin(Token::Tick, Op::Timer { after }) };
        }
    }

    /// Adds one to an eventfd, at once.
    pub(super) fn call(&mut self, slot: Slot) {
        if let Some(event) = &self.files[slot as usize] {
            self.ring.signal(slot, event.as_fd());
        }
    }

    /// Sends a message on the connection.
    ///
    /// # Safety
    /// The message and its buffers stay as they are until the operation has completed.
    pub(super) unsafe fn send_frame(&mut self, message: *const libc::msghdr) {
        // SAFETY: the caller's promise.
        unsafe { self.begin(Token::SendFrame, Op::SendMessage { message }) };
    }

    /// Sends a record on the connection.
    pub(super) fn send_ack(&mut self, record: [u8; ACK_LEN]) {
        assert!(!self.is_under_way(Token::SendAck), "one record at a time");
        let out = self.words.ack_out.get();
        // SAFETY: no operation uses the bytes now; they live in a box as long as self.
        unsafe {
            out.write(record);
            let bytes = out.cast::<u8>().cast_const();
            let len = ACK_LEN as u32;
            self.begin(Token::SendAck, Op::Send { bytes, len });
        }
    }

    /// The place of a position in the ring of received records.
    pub(super) fn acks_at(&self, position: u64) -> *mut u8 {
        let bytes = self.words.acks_in.get().cast::<u8>();
        // SAFETY: inside the buffer, which lives as long as self.
        unsafe { bytes.add(position as usize % ACK_BUFFER) }
    }

    /// The record at a position: the kernel has written it and does not write it again before its place
    /// is given to it anew.
    pub(super) fn ack(&self, position: u64) -> [u8; ACK_LEN] {
        assert!(position.is_multiple_of(ACK_LEN as u64), "records are whole");
        // SAFETY: inside the buffer, whose length is a multiple of a record's.
        unsafe { self.acks_at(position).cast::<[u8; ACK_LEN]>().read() }
    }

    /// Receives log bytes, or records, to an address.
    ///
    /// # Safety
    /// The memory stays mapped, and free of other use, until the operation has completed.
    pub(super) unsafe fn receive(&mut self, token: Token, bytes: *mut u8, len: u32) {
        // SAFETY: the caller's promise.
        unsafe { self.begin(token, Op::Receive { bytes, len }) };
    }

    /// Receives log bytes, or records, into the provided stretches.
    ///
    /// # Safety
    /// The provided memory stays mapped until the operation has completed.
    pub(super) unsafe fn receive_provided(&mut self, token: Token) {
        // SAFETY: the caller's promise.
        unsafe { self.begin(token, Op::ReceiveProvided) };
    }

    /// Waits for a change of a shared word.
    ///
    /// # Safety
    /// The word stays mapped until the operation has completed.
    pub(super) unsafe fn watch_word(&mut self, word: *const u32, value: u32) {
        // SAFETY: the caller's promise.
        unsafe { self.begin(Token::Owner, Op::WaitWord { word, value }) };
    }

    /// Hands over what is queued and waits for answers. No system call where answers are there already
    /// and nothing is queued.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn enter(&mut self, wait: Wait) -> io::Result<()> {
        let answered = self.has_answer();
        if answered && !self.ring.has_work() {
            return Ok(());
        }
        self.ring.enter(if answered { Wait::No } else { wait })
    }

    /// Whether entering now makes sense without waiting.
    #[inline]
    pub(super) fn has_work(&mut self) -> bool {
        self.ring.has_work()
    }

    /// Whether there is an answer.
    #[inline]
    pub(super) fn has_answer(&mut self) -> bool {
        !self.deferred.is_empty() || self.ring.has_answer()
    }

    /// The next completion.
    pub(super) fn next(&mut self) -> Option<(Token, Completion)> {
        loop {
            let completion = match self.deferred.pop_front() {
                Some(completion) => completion,
                None => {
                    let completion = self.ring.next()?;
                    self.note(completion);
                    completion
                }
            };
            match Token::of(completion.token) {
                Some(Token::Cancel) | None => {}
                Some(token) => return Some((token, completion)),
            }
        }
    }

    fn note(&mut self, completion: Completion) {
        if let Some(token) = Token::of(completion.token)
            && !completion.more
        {
            self.under_way &= !token.bit();
        }
    }

    /// Cancels the operations of these kinds and returns when the kernel has let go of them. Their
    /// completions are dropped.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn quiesce(&mut self, tokens: &[Token]) -> io::Result<()> {
        let mask = tokens.iter().fold(0, |mask, token| mask | token.bit());
        let ours = |completion: &Completion| {
            Token::of(completion.token).is_some_and(|token| token.bit() & mask != 0)
        };
        self.deferred.retain(|completion| !ours(completion));
        for token in tokens {
            if self.is_under_way(*token) {
                let cancel = Op::Cancel {
                    token: *token as u64,
                };
                // SAFETY: a cancellation names no memory.
                unsafe { self.ring.push(cancel, Token::Cancel as u64) };
            }
        }
        while self.under_way & mask != 0 {
            self.ring.enter(Wait::AtMost(CANCEL_WAIT_NS))?;
            while let Some(completion) = self.ring.next() {
                self.note(completion);
                if !ours(&completion) {
                    self.deferred.push_back(completion);
                }
            }
        }
        Ok(())
    }
}
