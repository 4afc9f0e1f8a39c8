//! [`Ring`] on io_uring.
//!
//! Deferred task work on one thread, registered files, incremental provided buffers where the kernel
//! has them. Unless [`UringOptions`] ask for it no kernel thread polls, which would compete with the VMM for
//! a CPU, and the kernel copies what is sent.
#![allow(unsafe_code)] // Submission entries name memory by address; the buffer ring is shared memory.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::{BufRingEntry, Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, cqueue, opcode, squeue};
use thiserror::Error;

use super::ring_io::{Completion, Op, Ring, SLOTS, Slot, Wait};
use super::zero_copy::{Answered, ZeroCopy, message_len};

const ENTRIES: u32 = 64;
const BUFFER_GROUP: u16 = 0;
/// Stretches that can be provided at a time; a power of two.
const BUFFERS: u16 = 256;
/// `IOU_PBUF_RING_INC` of linux/io_uring.h: a buffer is used up bit by bit.
const INCREMENTAL: u16 = 2;
/// `FUTEX2_SIZE_U32`: a shared futex of 32 bits.
const FUTEX_U32: u32 = 2;
const FUTEX_ANY: u64 = 0xffff_ffff;

/// How long a polling kernel thread looks for work before it sleeps, in ms.
const POLL_IDLE_MS: u32 = 2;

/// Messages up to this long are sent by a system call of their own, in bytes.
const AT_ONCE_BYTES: usize = 16 << 10;

/// What the ring may do besides; nothing by default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct UringOptions {
    /// Large messages are sent from the arena's pages themselves (SENDMSG_ZC).
    pub zero_copy: bool,
    /// A kernel thread takes submissions (SQPOLL).
    pub kernel_polls: bool,
}

/// Why there is no ring.
#[derive(Debug, Error)]
pub enum SetupError {
    /// The host forbids io_uring.
    #[error(
        "io_uring is switched off on this host: the sysctl kernel.io_uring_disabled is {0}. \
         Set it to 0, or to 1 and kernel.io_uring_group to a group of the daemon"
    )]
    Disabled(String),
    /// The kernel has no io_uring, or one that is too old.
    #[error("this kernel has no suitable io_uring (Linux 6.1 or newer is needed)")]
    Unsupported(#[source] io::Error),
    /// Anything else.
    #[error("io_uring cannot be set up")]
    Io(#[source] io::Error),
}

impl SetupError {
    fn of(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EPERM) => {
                let path = "/proc/sys/kernel/io_uring_disabled";
                match std::fs::read_to_string(path) {
                    Ok(value) if value.trim() != "0" => Self::Disabled(value.trim().to_owned()),
                    _ => Self::Io(error),
                }
            }
            Some(libc::ENOSYS | libc::EINVAL) => Self::Unsupported(error),
            _ => Self::Io(error),
        }
    }
}

/// io_uring, owned by the thread that made it.
pub struct Uring {
    ring: IoUring,
    buffers: Option<BufferRing>,
    zero_copy: Option<ZeroCopy>,
    wait_word: bool,
    /// The connection, on which short messages are sent at once.
    socket: Option<RawFd>,
    /// The answer to what was sent at once: nothing is before there are no answers.
    sent: Option<Completion>,
    /// System calls made, for the metrics.
    enters: u64,
}

impl Uring {
    /// Sets up a ring for the calling thread.
    ///
    /// # Errors
    /// [`SetupError`] says what the operator can do.
    pub fn new(options: UringOptions) -> Result<Self, SetupError> {
        let mut builder = IoUring::builder();
        builder
            .setup_single_issuer()
            .setup_submit_all()
            .setup_cqsize(1024)
            .dontfork();
        if options.kernel_polls {
            // Its thread runs the task work too: there is none to defer.
            builder.setup_sqpoll(POLL_IDLE_MS);
        } else {
            builder.setup_defer_taskrun().setup_taskrun_flag();
        }
        let ring = builder.build(ENTRIES).map_err(SetupError::of)?;
        let submitter = ring.submitter();
        submitter
            .register_files_sparse(SLOTS)
            .map_err(SetupError::of)?;
        let mut probe = Probe::new();
        submitter
            .register_probe(&mut probe)
            .map_err(SetupError::of)?;
        let wait_word = probe.is_supported(opcode::FutexWait::CODE);
        let can_zero_copy = probe.is_supported(opcode::SendMsgZc::CODE);
        if options.zero_copy && !can_zero_copy {
            tracing::warn!("this kernel cannot send without copying: --send-zc changes nothing");
        }
        let mut this = Self {
            ring,
            buffers: None,
            zero_copy: (options.zero_copy && can_zero_copy).then(ZeroCopy::default),
            wait_word,
            socket: None,
            sent: None,
            enters: 0,
        };
        let buffers = BufferRing::new();
        if buffers.register(&this.ring).is_ok() {
            this.buffers = Some(buffers);
        }
        Ok(this)
    }

    /// Sends what is short, as far as it goes without waiting: by io_uring it takes longer, and the peer waits for
    /// it. None where an operation is to do it: also where the kernel is about to be entered for something else.
    ///
    /// # Safety
    /// As for [`Ring::push`].
    unsafe fn send_at_once(&mut self, op: Op) -> Option<i32> {
        let socket = self.socket?;
        if self.ring.params().is_setup_sqpoll() || self.has_work() || self.has_answer() {
            return None;
        }
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: the caller vouches for the memory that the operation names.
        let sent = unsafe {
            match op {
                Op::SendMessage { message } if message_len(message) <= AT_ONCE_BYTES => {
                    libc::sendmsg(socket, message, flags)
                }
                Op::Send { bytes, len } => libc::send(socket, bytes.cast(), len as usize, flags),
                _ => return None,
            }
        };
        self.enters += 1;
        // What fails here fails again as an operation, and is seen there.
        i32::try_from(sent).ok().filter(|sent| *sent > 0)
    }

    fn entry(op: Op) -> squeue::Entry {
        let fixed = |slot: Slot| Fixed(slot as u32);
        match op {
            Op::WatchEvent { slot } => opcode::PollAdd::new(fixed(slot), libc::POLLIN as u32)
                .multi(true)
                .build(),
            Op::SendMessage { message } => opcode::SendMsg::new(fixed(Slot::Socket), message)
                .flags((libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32)
                .build(),
            Op::Send { bytes, len } => opcode::Send::new(fixed(Slot::Socket), bytes, len)
                .flags(libc::MSG_NOSIGNAL | libc::MSG_WAITALL)
                .build(),
            Op::Receive { bytes, len } => {
                opcode::Recv::new(fixed(Slot::Socket), bytes, len).build()
            }
            Op::ReceiveProvided => {
                opcode::RecvMulti::new(fixed(Slot::Socket), BUFFER_GROUP).build()
            }
            Op::WaitWord { word, value } => {
                opcode::FutexWait::new(word, value.into(), FUTEX_ANY, FUTEX_U32).build()
            }
            Op::Timer { after } => opcode::Timeout::new(after.cast()).build(),
            Op::Cancel { token } => opcode::AsyncCancel::new(token).build(),
        }
    }
}

impl Ring for Uring {
    fn set_file(&mut self, slot: Slot, file: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let fd = file.map_or(-1, |file| file.as_raw_fd());
        if slot == Slot::Socket {
            self.socket = (fd >= 0).then_some(fd);
        }
        self.ring
            .submitter()
            .register_files_update(slot as u32, &[fd])
            .map(|_| ())
    }

    fn signal(&mut self, _slot: Slot, event: BorrowedFd<'_>) {
        self.enters += 1;
        // Fails only where the count is at its limit: whoever waits is then awake all the same.
        let _ = rustix::io::write(event, &1u64.to_ne_bytes());
    }

    unsafe fn push(&mut self, op: Op, token: u64) {
        // SAFETY: the caller's promise.
        if let Some(result) = unsafe { self.send_at_once(op) } {
            self.sent = Some(Completion {
                token,
                result,
                more: false,
            });
            return;
        }
        let (entry, token) = match (&mut self.zero_copy, op) {
            (Some(zero_copy), Op::SendMessage { message }) => {
                // SAFETY: the caller vouches for the message.
                if unsafe { ZeroCopy::pays(message) } {
                    (ZeroCopy::entry(message), zero_copy.begin(token))
                } else {
                    (Self::entry(op), token)
                }
            }
            (Some(zero_copy), Op::Cancel { token: of }) => {
                let of = zero_copy.cancel(of);
                (Self::entry(Op::Cancel { token: of }), token)
            }
            _ => (Self::entry(op), token),
        };
        let entry = entry.user_data(token);
        // SAFETY: the caller vouches for the memory that the entry names.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.enters += 1;
            // A full queue is handed over; what fails here fails again in `enter` and is seen there.
            let _ = self.ring.submit();
        }
    }

    fn enter(&mut self, wait: Wait) -> io::Result<()> {
        self.enters += 1;
        let result = match wait {
            Wait::No => self.ring.submit(),
            Wait::ForAnswer => self.ring.submit_and_wait(1),
            Wait::AtMost(ns) => {
                let timeout = Timespec::new()
                    .sec(ns / 1_000_000_000)
                    .nsec((ns % 1_000_000_000) as u32);
                let args = SubmitArgs::new().timespec(&timeout);
                self.ring.submitter().submit_with_args(1, &args)
            }
        };
        match result {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(error),
            },
        }
    }

    fn has_work(&mut self) -> bool {
        let queue = self.ring.submission();
        !queue.is_empty() || queue.taskrun()
    }

    fn has_answer(&mut self) -> bool {
        self.sent.is_some()
            || !self.ring.completion().is_empty()
            || self.zero_copy.as_ref().is_some_and(ZeroCopy::has_answer)
    }

    fn next(&mut self) -> Option<Completion> {
        if let Some(answer) = self.sent.take() {
            return Some(answer);
        }
        let entry = loop {
            if let Some(zero_copy) = &mut self.zero_copy
                && let Some(answer) = zero_copy.take_answer()
            {
                return Some(answer);
            }
            let entry = self.ring.completion().next()?;
            match &mut self.zero_copy {
                None => break entry,
                Some(zero_copy) => match zero_copy.answered(&entry) {
                    Answered::Other => break entry,
                    Answered::Ours => {}
                },
            }
        };
        let flags = entry.flags();
        if cqueue::buffer_select(flags).is_some()
            && !cqueue::buffer_more(flags)
            && let Some(buffers) = &mut self.buffers
        {
            buffers.used_up += 1;
        }
        Some(Completion {
            token: entry.user_data(),
            result: entry.result(),
            more: cqueue::more(flags),
        })
    }

    fn can_provide(&self) -> bool {
        self.buffers.is_some()
    }

    unsafe fn provide(&mut self, bytes: *mut u8, len: u32) -> bool {
        self.buffers
            .as_mut()
            .is_some_and(|buffers| buffers.append(bytes, len))
    }

    fn withdraw(&mut self) -> io::Result<()> {
        let Some(buffers) = &mut self.buffers else {
            return Ok(());
        };
        self.ring.submitter().unregister_buf_ring(BUFFER_GROUP)?;
        buffers.clear();
        buffers.register(&self.ring)
    }

    fn can_wait_word(&self) -> bool {
        self.wait_word
    }

    fn enters(&self) -> u64 {
        self.enters
    }
}

/// The ring of provided buffers, in memory shared with the kernel.
struct BufferRing {
    entries: NonNull<BufRingEntry>,
    tail: u16,
    /// Stretches handed out since the last withdrawal.
    appended: u64,
    /// How many of them the kernel has filled and reported.
    used_up: u64,
}

// SAFETY: owned memory without thread affinity.
unsafe impl Send for BufferRing {}

impl BufferRing {
    fn layout() -> Layout {
        Layout::from_size_align(usize::from(BUFFERS) * size_of::<BufRingEntry>(), 4096)
            .expect("a constant size and alignment")
    }

    fn new() -> Self {
        let layout = Self::layout();
        // SAFETY: the layout is not empty.
        let memory = unsafe { alloc_zeroed(layout) };
        let Some(entries) = NonNull::new(memory.cast()) else {
            handle_alloc_error(layout)
        };
        Self {
            entries,
            tail: 0,
            appended: 0,
            used_up: 0,
        }
    }

    fn register(&self, ring: &IoUring) -> io::Result<()> {
        // SAFETY: the entries live until the ring or the registration ends: `Uring` drops its
        // fields in order, the ring first.
        unsafe {
            ring.submitter().register_buf_ring_with_flags(
                self.entries.as_ptr() as u64,
                BUFFERS,
                BUFFER_GROUP,
                INCREMENTAL,
            )
        }
    }

    fn clear(&mut self) {
        // SAFETY: the entries are zeroed memory of this size, not registered at the moment.
        unsafe {
            self.entries
                .as_ptr()
                .cast::<u8>()
                .write_bytes(0, Self::layout().size())
        };
        self.tail = 0;
        self.appended = 0;
        self.used_up = 0;
    }

    fn append(&mut self, bytes: *mut u8, len: u32) -> bool {
        if self.appended - self.used_up >= u64::from(BUFFERS) {
            return false;
        }
        let index = usize::from(self.tail % BUFFERS);
        // SAFETY: the index is inside the ring; the kernel does not look at an entry before the
        // tail has passed it.
        let entry = unsafe { &mut *self.entries.as_ptr().add(index) };
        entry.set_addr(bytes as u64);
        entry.set_len(len);
        entry.set_bid(self.tail % BUFFERS);
        self.tail = self.tail.wrapping_add(1);
        self.appended += 1;
        // SAFETY: the tail is a field of the first entry, aligned, read by the kernel.
        let tail =
            unsafe { AtomicU16::from_ptr(BufRingEntry::tail(self.entries.as_ptr()).cast_mut()) };
        tail.store(self.tail, Ordering::Release);
        true
    }
}

impl Drop for BufferRing {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with the same layout.
        unsafe { dealloc(self.entries.as_ptr().cast(), Self::layout()) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn ring() -> Uring {
        Uring::new(UringOptions::default()).expect("this host has io_uring")
    }

    #[test]
    fn each_signal_is_answered_and_the_watch_goes_on() {
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        let mut ring = ring();
        ring.set_file(Slot::LogKick, Some(event.as_fd())).unwrap();
        let slot = Slot::LogKick;
        // SAFETY: the operation names no memory.
        unsafe { ring.push(Op::WatchEvent { slot }, 7) };
        ring.enter(Wait::No).unwrap();
        for _ in 0..3 {
            assert_eq!(ring.next(), None);
            ring.signal(slot, event.as_fd());
            let mut answer = None;
            while answer.is_none() {
                ring.enter(Wait::AtMost(1_000_000_000)).unwrap();
                answer = ring.next();
            }
            let signalled = Completion {
                token: 7,
                result: i32::from(libc::POLLIN),
                more: true,
            };
            assert_eq!(answer, Some(signalled));
        }
    }

    #[test]
    fn a_large_message_is_answered_once_with_all_its_bytes_however_it_is_sent() {
        use std::io::Read;
        use std::net::{TcpListener, TcpStream};

        const LEN: usize = 200_000;
        for (zero_copy, kernel_polls) in [(false, false), (true, false), (false, true)] {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let mut peer = listener.accept().unwrap().0;
            let reader = std::thread::spawn(move || {
                let mut got = vec![0; LEN];
                peer.read_exact(&mut got).unwrap();
                got
            });
            let options = UringOptions {
                zero_copy,
                kernel_polls,
            };
            let mut ring = Uring::new(options).unwrap();
            assert_eq!(ring.zero_copy.is_some(), zero_copy);
            ring.set_file(Slot::Socket, Some(socket.as_fd())).unwrap();
            let mut bytes = vec![7u8; LEN];
            let mut buffer = libc::iovec {
                iov_base: bytes.as_mut_ptr().cast(),
                iov_len: LEN,
            };
            // SAFETY: a message of null pointers and zero lengths is a valid empty one.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = &raw mut buffer;
            message.msg_iovlen = 1;
            let message = &raw const message;
            // SAFETY: all of it lives until the answer below.
            unsafe { ring.push(Op::SendMessage { message }, 6) };
            let mut answers = Vec::new();
            while answers.is_empty() {
                ring.enter(Wait::AtMost(1_000_000_000)).unwrap();
                answers.extend(std::iter::from_fn(|| ring.next()));
            }
            let whole = Completion {
                token: 6,
                result: LEN as i32,
                more: false,
            };
            assert_eq!(answers, [whole], "{options:?}");
            assert_eq!(reader.join().unwrap(), bytes);
        }
    }

    #[test]
    fn a_short_message_leaves_at_once_and_waits_where_the_socket_is_full() {
        use std::io::{Read, Write};
        use std::net::{TcpListener, TcpStream};

        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut peer = listener.accept().unwrap().0;
        let mut ring = ring();
        ring.set_file(Slot::Socket, Some(socket.as_fd())).unwrap();
        let record = [7u8; 32];
        let op = Op::Send {
            bytes: record.as_ptr(),
            len: 32,
        };
        let whole = Completion {
            token: 6,
            result: 32,
            more: false,
        };
        // SAFETY: the record lives until both answers.
        unsafe { ring.push(op, 6) };
        assert!(ring.has_answer() && !ring.has_work());
        assert_eq!(ring.next(), Some(whole));
        let mut got = [0; 32];
        peer.read_exact(&mut got).unwrap();
        assert_eq!(got, record);

        socket.set_nonblocking(true).unwrap();
        let mut filled = 0;
        while let Ok(more) = socket.write(&[0; 1000]) {
            filled += more;
        }
        // SAFETY: as above.
        unsafe { ring.push(op, 6) };
        assert_eq!(ring.next(), None);
        ring.enter(Wait::No).unwrap();
        assert_eq!(ring.next(), None);
        peer.read_exact(&mut vec![0; filled]).unwrap();
        let mut answer = None;
        while answer.is_none() {
            ring.enter(Wait::AtMost(1_000_000_000)).unwrap();
            answer = ring.next();
        }
        assert_eq!(answer, Some(whole));
        peer.read_exact(&mut got).unwrap();
        assert_eq!(got, record);
    }

    #[test]
    fn an_empty_ring_returns_after_its_time() {
        let mut ring = ring();
        ring.enter(Wait::AtMost(1000)).unwrap();
        assert_eq!(ring.next(), None);
    }

    #[test]
    fn a_switched_off_io_uring_is_named() {
        let error = SetupError::Disabled("2".to_owned()).to_string();
        assert!(error.contains("kernel.io_uring_disabled is 2"), "{error}");
    }
}
