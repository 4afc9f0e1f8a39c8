//! [`Ring`] over a kernel that is not there: operations complete when the test says so, or when what
//! they wait for is there. For tests and fuzzing of the whole data thread without a system call.
#![allow(unsafe_code)] // Carries operations out on the memory that they name.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::ring_io::{Completion, Op, Ring, SLOTS, Slot, Wait};

/// What the kernel knows.
#[derive(Debug, Default)]
struct Kernel {
    files: [bool; SLOTS as usize],
    /// Counts of the eventfds.
    events: [u64; SLOTS as usize],
    waiting: Vec<(Op, u64)>,
    completions: VecDeque<Completion>,
    stretches: VecDeque<(usize, usize)>,
    inbound: VecDeque<u8>,
    outbound: Vec<u8>,
    /// The most bytes that one send takes.
    send_limit: usize,
    closed: bool,
    entered: u64,
    slept: u64,
    last_sleep: Option<Wait>,
    provides: bool,
}

/// A handle on the simulated kernel: one for the engine, one for the test.
#[derive(Debug, Clone)]
pub struct Simulated {
    kernel: Arc<Mutex<Kernel>>,
}

// SAFETY: the addresses in it are of memory that whoever pushed the operation keeps.
unsafe impl Send for Kernel {}

impl Simulated {
    /// A kernel with provided stretches, or one without.
    #[must_use]
    pub fn new(provides: bool) -> Self {
        let kernel = Kernel {
            send_limit: usize::MAX,
            provides,
            ..Kernel::default()
        };
        Self {
            kernel: Arc::new(Mutex::new(kernel)),
        }
    }

    fn kernel(&self) -> MutexGuard<'_, Kernel> {
        self.kernel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Signals an eventfd.
    pub fn kick(&self, slot: Slot) {
        self.kernel().events[slot as usize] += 1;
    }

    /// Takes the count of an eventfd that the engine signals.
    #[must_use]
    pub fn take_calls(&self, slot: Slot) -> u64 {
        std::mem::take(&mut self.kernel().events[slot as usize])
    }

    /// What the engine has sent since the last time.
    #[must_use]
    pub fn take_sent(&self) -> Vec<u8> {
        std::mem::take(&mut self.kernel().outbound)
    }

    /// Bytes that arrive on the connection.
    pub fn arrive(&self, bytes: &[u8]) {
        self.kernel().inbound.extend(bytes);
    }

    /// The peer closes the connection, after what has arrived.
    pub fn close(&self) {
        self.kernel().closed = true;
    }

    /// At most this many bytes go out with one send.
    pub fn limit_sends(&self, bytes: usize) {
        self.kernel().send_limit = bytes;
    }

    /// How often the engine entered the kernel, and how often it slept there: what would be system
    /// calls.
    #[must_use]
    pub fn entered(&self) -> (u64, u64) {
        let kernel = self.kernel();
        (kernel.entered, kernel.slept)
    }

    /// How the engine slept the last time.
    #[must_use]
    pub fn last_sleep(&self) -> Option<Wait> {
        self.kernel().last_sleep
    }

    /// The words whose change is waited for.
    #[must_use]
    pub fn watched_words(&self) -> Vec<*const u32> {
        let kernel = self.kernel();
        let words = kernel.waiting.iter().filter_map(|(op, _)| match op {
            Op::WaitWord { word, .. } => Some(*word),
            _ => None,
        });
        words.collect()
    }
}

impl Kernel {
    /// Completes what can be completed, in the order in which it was pushed.
    fn advance(&mut self) {
        let mut index = 0;
        while index < self.waiting.len() {
            let (op, token) = self.waiting[index];
            match self.attempt(op, token) {
                Some(()) => {
                    self.waiting.remove(index);
                }
                None => index += 1,
            }
        }
    }

    fn answer(&mut self, token: u64, result: i32) {
        self.completions.push_back(Completion {
            token,
            result,
            more: false,
        });
    }

    /// `None` where the operation goes on waiting.
    fn attempt(&mut self, op: Op, token: u64) -> Option<()> {
        match op {
            Op::WatchEvent { slot } => {
                if std::mem::take(&mut self.events[slot as usize]) > 0 {
                    self.completions.push_back(Completion {
                        token,
                        result: i32::from(libc::POLLIN),
                        more: true,
                    });
                }
                return None;
            }
            Op::SendMessage { message } => {
                // SAFETY: the engine keeps message and buffers until the answer.
                let sent = unsafe { self.send_message(message) };
                self.answer(token, sent);
            }
            Op::Send { bytes, len } => {
                // SAFETY: the engine keeps the bytes until the answer.
                let bytes = unsafe { std::slice::from_raw_parts(bytes, len as usize) };
                self.outbound.extend_from_slice(bytes);
                self.answer(token, len as i32);
            }
            Op::Receive { bytes, len } => {
                let len = self.inbound.len().min(len as usize);
                if len == 0 && !self.closed {
                    return None;
                }
                self.take_inbound(bytes, len);
                self.answer(token, len as i32);
            }
            Op::ReceiveProvided => return self.receive_provided(token),
            Op::WaitWord { word, value } => {
                // SAFETY: the engine keeps the word mapped until the answer.
                let now = unsafe { AtomicU32::from_ptr(word.cast_mut()) }.load(Ordering::Acquire);
                if now == value {
                    return None;
                }
                self.answer(token, 0);
            }
            Op::Timer { .. } => return None, // time is the test's
            Op::Cancel { .. } => {}          // carried out when it was pushed
        }
        Some(())
    }

    fn cancel(&mut self, of: u64, token: u64) {
        let found = self.waiting.iter().position(|(_, token)| *token == of);
        if let Some(found) = found {
            self.waiting.remove(found);
            self.answer(of, -libc::ECANCELED);
        }
        self.answer(token, if found.is_some() { 0 } else { -libc::ENOENT });
    }

    unsafe fn send_message(&mut self, message: *const libc::msghdr) -> i32 {
        // SAFETY: the caller's promise.
        let message = unsafe { &*message };
        let mut left = self.send_limit;
        let mut sent = 0;
        for i in 0..message.msg_iovlen {
            // SAFETY: as above.
            let bytes = unsafe {
                let buffer = &*message.msg_iov.add(i);
                std::slice::from_raw_parts(buffer.iov_base.cast::<u8>(), buffer.iov_len)
            };
            let taken = bytes.len().min(left);
            self.outbound.extend_from_slice(&bytes[..taken]);
            left -= taken;
            sent += taken as i32;
        }
        sent
    }

    fn take_inbound(&mut self, to: *mut u8, len: usize) {
        for (i, byte) in self.inbound.drain(..len).enumerate() {
            // SAFETY: the engine vouches for at least `len` bytes.
            unsafe { to.add(i).write(byte) };
        }
    }

    fn receive_provided(&mut self, token: u64) -> Option<()> {
        loop {
            let Some((start, len)) = self.stretches.front().copied() else {
                self.answer(token, -libc::ENOBUFS);
                return Some(());
            };
            let taken = self.inbound.len().min(len);
            if taken == 0 {
                if self.closed {
                    self.answer(token, 0);
                    return Some(());
                }
                return None;
            }
            self.take_inbound(start as *mut u8, taken);
            if taken == len {
                self.stretches.pop_front();
            } else {
                self.stretches[0] = (start + taken, len - taken);
            }
            self.completions.push_back(Completion {
                token,
                result: taken as i32,
                more: true,
            });
        }
    }
}

impl Ring for Simulated {
    fn set_file(&mut self, slot: Slot, file: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut kernel = self.kernel();
        kernel.files[slot as usize] = file.is_some();
        if slot == Slot::Socket {
            kernel.inbound.clear();
            kernel.outbound.clear();
            kernel.closed = false;
        }
        Ok(())
    }

    fn signal(&mut self, slot: Slot, _event: BorrowedFd<'_>) {
        let mut kernel = self.kernel();
        kernel.entered += 1;
        kernel.events[slot as usize] += 1;
    }

    unsafe fn push(&mut self, op: Op, token: u64) {
        let mut kernel = self.kernel();
        if let Op::Cancel { token: of } = op {
            kernel.cancel(of, token);
        } else {
            kernel.waiting.push((op, token));
        }
    }

    fn enter(&mut self, wait: Wait) -> io::Result<()> {
        let mut kernel = self.kernel();
        kernel.entered += 1;
        kernel.advance();
        if kernel.completions.is_empty() && wait != Wait::No {
            kernel.slept += 1;
            kernel.last_sleep = Some(wait);
        }
        Ok(())
    }

    fn has_work(&mut self) -> bool {
        !self.kernel().waiting.is_empty()
    }

    fn has_answer(&mut self) -> bool {
        !self.kernel().completions.is_empty()
    }

    fn next(&mut self) -> Option<Completion> {
        self.kernel().completions.pop_front()
    }

    fn can_provide(&self) -> bool {
        self.kernel().provides
    }

    unsafe fn provide(&mut self, bytes: *mut u8, len: u32) -> bool {
        let mut kernel = self.kernel();
        kernel.stretches.push_back((bytes as usize, len as usize));
        true
    }

    fn withdraw(&mut self) -> io::Result<()> {
        self.kernel().stretches.clear();
        Ok(())
    }

    fn can_wait_word(&self) -> bool {
        true
    }

    fn enters(&self) -> u64 {
        self.kernel().entered
    }
}
