//! io_uring with buffers that live exactly as long as the kernel may touch them.
//!
//! An operation owns its buffer; it is given back with the completion and never before. At the end
//! the ring waits for everything in flight before it lets go of any buffer.
#![allow(unsafe_code)] // Submission queue entries point to memory.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use io_uring::{IoUring, opcode, squeue, types};

use super::buffer::Buffer;

/// How long the end of a ring waits for cancelled operations, and how often.
const DRAIN_PAUSE_NS: u32 = 10_000_000;
const DRAIN_TRIES: u32 = 20;
/// The file's own position, where it has one.
const OWN_POSITION: u64 = u64::MAX;
/// Submission queue entries.
const ENTRIES: u32 = 256;

/// What an operation does with its buffer, on which file.
#[derive(Debug, Clone, Copy)]
pub(super) enum Call {
    /// Read from a file without positions.
    Read(RawFd),
    /// Write all of the buffer to a file without positions.
    Write(RawFd),
    /// Read at a position in bytes.
    ReadAt(RawFd, u64),
    /// Write at a position in bytes.
    WriteAt(RawFd, u64),
    /// `fdatasync`.
    Sync(RawFd),
    /// Wait until the file is readable.
    Poll(RawFd),
}

/// An operation that has ended.
#[derive(Debug)]
pub(super) struct Done<T> {
    /// What the caller gave with it.
    pub(super) tag: T,
    /// Its buffer.
    pub(super) buffer: Buffer,
    /// Bytes done, or the error.
    pub(super) result: io::Result<usize>,
}

/// A ring and the operations in flight on it.
pub(super) struct Ring<T> {
    uring: IoUring,
    flying: Vec<Option<(T, Buffer)>>,
    free: Vec<usize>,
    /// Completions (slot, result) that were taken to make room for more.
    reaped: VecDeque<(u64, i32)>,
}

impl<T> Ring<T> {
    pub(super) fn new() -> io::Result<Self> {
        let mut builder = IoUring::builder();
        builder
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_clamp();
        let uring = builder.build(ENTRIES).or_else(|_| IoUring::new(ENTRIES))?;
        Ok(Self {
            uring,
            flying: Vec::new(),
            free: Vec::new(),
            reaped: VecDeque::new(),
        })
    }

    /// Queues an operation; it starts with the next [`Ring::wait`].
    pub(super) fn push(&mut self, tag: T, call: Call, buffer: Buffer) -> io::Result<()> {
        self.push_with(tag, call, buffer, squeue::Flags::empty())
    }

    /// The same, on a thread of the kernel's: some file systems wait within the submission, and with storage
    /// that hangs this thread would hang.
    pub(super) fn push_aside(&mut self, tag: T, call: Call, buffer: Buffer) -> io::Result<()> {
        self.push_with(tag, call, buffer, squeue::Flags::ASYNC)
    }

    fn push_with(
        &mut self,
        tag: T,
        call: Call,
        mut buffer: Buffer,
        flags: squeue::Flags,
    ) -> io::Result<()> {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.flying.push(None);
            self.flying.len() - 1
        });
        let entry = entry(call, &mut buffer).user_data(slot as u64).flags(flags);
        self.flying[slot] = Some((tag, buffer));
        // SAFETY: the buffer stays in `flying`, at the same address, until its completion is reaped.
        while unsafe { self.uring.submission().push(&entry) }.is_err() {
            match self.uring.submit() {
                Ok(_) => {}
                // No memory for a moment, or completions in the way.
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
                    ) =>
                {
                    let done = self.uring.completion();
                    self.reaped
                        .extend(done.map(|entry| (entry.user_data(), entry.result())));
                    std::thread::yield_now();
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Submits what is queued and waits for `want` completions at least.
    pub(super) fn wait(&mut self, want: usize) -> io::Result<()> {
        match self.uring.submit_and_wait(want) {
            Ok(_) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => Ok(()),
            // The completion queue is full: reap first.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// [`Ring::wait`], for `limit` at the most.
    pub(super) fn wait_for(&mut self, want: usize, limit: Duration) -> io::Result<()> {
        let limit = types::Timespec::new()
            .nsec(limit.subsec_nanos())
            .sec(limit.as_secs());
        let args = types::SubmitArgs::new().timespec(&limit);
        match self.uring.submitter().submit_with_args(want, &args) {
            Ok(_) => Ok(()),
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ETIME | libc::EINTR | libc::EBUSY)
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// The next completion, if one is there.
    pub(super) fn reap(&mut self) -> Option<Done<T>> {
        let (slot, result) = match self.reaped.pop_front() {
            Some(reaped) => reaped,
            None => {
                let entry = self.uring.completion().next()?;
                (entry.user_data(), entry.result())
            }
        };
        let slot = usize::try_from(slot).expect("we set it from a usize");
        let (tag, buffer) = self.flying[slot].take().expect("a slot completes once");
        self.free.push(slot);
        let result = match result {
            error if error < 0 => Err(io::Error::from_raw_os_error(-error)),
            bytes => Ok(bytes.unsigned_abs() as usize),
        };
        Some(Done {
            tag,
            buffer,
            result,
        })
    }

    /// Operations in flight whose tag is `wanted`.
    pub(super) fn count(&self, wanted: impl Fn(&T) -> bool) -> usize {
        self.flying
            .iter()
            .flatten()
            .filter(|(tag, _)| wanted(tag))
            .count()
    }

    /// Cancels everything and waits until the kernel has let go of every buffer; what it will not
    /// let go of in time (a read of a terminal, say) outlives the ring.
    fn drain(&mut self) {
        let _ = self
            .uring
            .submitter()
            .register_sync_cancel(None, types::CancelBuilder::any());
        let pause = types::Timespec::new().nsec(DRAIN_PAUSE_NS);
        let args = types::SubmitArgs::new().timespec(&pause);
        for _ in 0..DRAIN_TRIES {
            while self.reap().is_some() {}
            if self.flying.iter().all(Option::is_none) {
                return;
            }
            let _ = self.uring.submitter().submit_with_args(1, &args);
        }
        self.flying.drain(..).for_each(std::mem::forget);
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        self.drain();
    }
}

fn entry(call: Call, buffer: &mut Buffer) -> squeue::Entry {
    let len = u32::try_from(buffer.len()).expect("buffers are bounded far below 4 GiB");
    let start = buffer.as_mut_ptr();
    match call {
        Call::Read(fd) => opcode::Read::new(types::Fd(fd), start, len)
            .offset(OWN_POSITION)
            .build(),
        Call::ReadAt(fd, at) => opcode::Read::new(types::Fd(fd), start, len)
            .offset(at)
            .build(),
        Call::Write(fd) => opcode::Write::new(types::Fd(fd), start, len)
            .offset(OWN_POSITION)
            .build(),
        Call::WriteAt(fd, at) => opcode::Write::new(types::Fd(fd), start, len)
            .offset(at)
            .build(),
        Call::Sync(fd) => opcode::Fsync::new(types::Fd(fd))
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        Call::Poll(fd) => opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).build(),
    }
}
