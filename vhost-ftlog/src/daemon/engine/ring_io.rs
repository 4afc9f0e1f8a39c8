//! What the data thread asks of the kernel: a submission and completion interface as small as its
//! needs, so that a simulated kernel can stand in for io_uring.
//!
//! Operations are queued by [`Ring::push`], carried out by [`Ring::enter`] and answered through
//! [`Ring::next`]. Memory that an operation names must stay valid and otherwise unused until it is
//! answered: that is the caller's promise.

#![allow(unsafe_code)] // The interface names memory by address.

use std::io;
use std::os::fd::BorrowedFd;

/// A place in the table of registered files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum Slot {
    /// Kicks of the log queue.
    LogKick,
    /// Kicks of the delivery queue.
    DeliveryKick,
    /// Kicks of the event queue.
    EventKick,
    /// Commands from the other threads.
    Doorbell,
    /// The connection.
    Socket,
    /// Calls of the log queue.
    LogCall,
    /// Calls of the delivery queue.
    DeliveryCall,
    /// Calls of the event queue.
    EventCall,
}

/// How many slots there are.
pub const SLOTS: u32 = 8;

/// `struct __kernel_timespec` of linux/time_types.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct KernelTime {
    /// Whole seconds.
    pub seconds: i64,
    /// Nanoseconds of the rest.
    pub nanoseconds: i64,
}

/// One operation.
#[derive(Debug, Clone, Copy)]
pub enum Op {
    /// Wait for signals of an eventfd, again and again: one answer for those that came together. Its count is
    /// left as it is.
    WatchEvent {
        /// Which.
        slot: Slot,
    },
    /// Send a whole message on the connection, from many buffers.
    SendMessage {
        /// The buffers.
        message: *const libc::msghdr,
    },
    /// Send these bytes on the connection.
    Send {
        /// The first.
        bytes: *const u8,
        /// How many.
        len: u32,
    },
    /// Receive what is there on the connection, waiting for at least one byte.
    Receive {
        /// Where to.
        bytes: *mut u8,
        /// At most how many.
        len: u32,
    },
    /// Receive again and again into the provided stretches, in their order, until they are used up.
    ReceiveProvided,
    /// Wait until a shared word changes or is woken.
    WaitWord {
        /// The word.
        word: *const u32,
        /// Do not wait unless it has this value.
        value: u32,
    },
    /// Wait for a time.
    Timer {
        /// How long.
        after: *const KernelTime,
    },
    /// Cancel the operation of this token.
    Cancel {
        /// Its token.
        token: u64,
    },
}

/// The answer to an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// The operation's token.
    pub token: u64,
    /// What a system call would return; a negated error number.
    pub result: i32,
    /// More answers to the same operation will come.
    pub more: bool,
}

/// How long [`Ring::enter`] may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Not at all.
    No,
    /// Until an answer is there. Costs less than a wait with a limit, which sets and clears a timer.
    ForAnswer,
    /// Until an answer is there, at most this long, in nanoseconds.
    AtMost(u64),
}

/// A kernel, real or simulated.
pub trait Ring {
    /// Puts a file into a slot, or empties it.
    ///
    /// # Errors
    /// What the kernel says.
    fn set_file(&mut self, slot: Slot, file: Option<BorrowedFd<'_>>) -> io::Result<()>;

    /// Adds one to an eventfd at once, without waiting. Not an operation: the kernel hands writes to
    /// eventfds to a worker thread, which takes longer than all the rest of an acknowledgement.
    fn signal(&mut self, slot: Slot, event: BorrowedFd<'_>);

    /// Queues an operation. A short send may be carried out at once, and have its answer before the next
    /// [`Ring::enter`].
    ///
    /// # Safety
    /// The memory that it names stays valid until it is answered, and nobody reads what it writes
    /// or writes what it reads meanwhile, except the other side of shared memory.
    unsafe fn push(&mut self, op: Op, token: u64);

    /// Hands the queued operations over and waits.
    ///
    /// # Errors
    /// What the kernel says; a timeout or a signal is none.
    fn enter(&mut self, wait: Wait) -> io::Result<()>;

    /// Whether [`Ring::enter`] has something to do that needs no waiting.
    fn has_work(&mut self) -> bool;

    /// Whether [`Ring::next`] has an answer, without entering.
    fn has_answer(&mut self) -> bool;

    /// The next answer.
    fn next(&mut self) -> Option<Completion>;

    /// Whether [`Op::ReceiveProvided`] works.
    fn can_provide(&self) -> bool;

    /// Appends a stretch of memory for [`Op::ReceiveProvided`]; false where no more fit now.
    ///
    /// # Safety
    /// As for [`Ring::push`], until [`Ring::withdraw`].
    unsafe fn provide(&mut self, bytes: *mut u8, len: u32) -> bool;

    /// Forgets all provided stretches. No [`Op::ReceiveProvided`] may be under way.
    ///
    /// # Errors
    /// What the kernel says.
    fn withdraw(&mut self) -> io::Result<()>;

    /// Whether [`Op::WaitWord`] works.
    fn can_wait_word(&self) -> bool;

    /// System calls made, for the metrics.
    fn enters(&self) -> u64;
}
