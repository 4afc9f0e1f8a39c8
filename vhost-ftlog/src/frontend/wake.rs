//! Eventfds and waiting on them.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use vmm_sys_util::eventfd::EventFd;

use super::{Error, io_error};

/// An eventfd that this process waits on or writes to.
#[derive(Debug)]
pub(super) struct Event {
    file: OwnedFd,
}

impl Event {
    /// One whose count is zero. Nobody who writes to it waits.
    pub(super) fn new() -> Result<Self, Error> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let file =
            rustix::event::eventfd(0, flags).map_err(|error| io_error("eventfd")(error.into()))?;
        Ok(Self { file })
    }

    /// Adds one. It can only fail where the counter is full: the reader then wakes all the same.
    pub(super) fn signal(&self) {
        let _ = rustix::io::write(&self.file, &1u64.to_ne_bytes());
    }

    /// Waits until it is signalled, takes the signals; false after `limit`.
    pub(super) fn wait(&self, limit: Option<Duration>) -> Result<bool, Error> {
        let mut poll = [PollFd::new(&self.file, PollFlags::IN)];
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        match rustix::event::poll(&mut poll, limit.as_ref()) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(false),
            Ok(_) => {}
            Err(error) => return Err(io_error("wait for an eventfd")(error.into())),
        }
        self.take()?;
        Ok(true)
    }

    fn take(&self) -> Result<(), Error> {
        let mut count = [0; 8];
        match rustix::io::read(&self.file, &mut count) {
            Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(io_error("read an eventfd")(error.into())),
        }
    }

    /// Takes signals that are there, without waiting.
    pub(super) fn clear(&self) -> Result<(), Error> {
        self.take()
    }

    /// The same eventfd in the type of the vhost crate.
    pub(super) fn for_vhost(&self) -> Result<EventFd, Error> {
        let file = self
            .file
            .try_clone()
            .map_err(io_error("duplicate an eventfd"))?;
        Ok(into_event_fd(file))
    }
}

#[allow(unsafe_code)] // The type of the vhost crate can only be made from a raw descriptor.
fn into_event_fd(file: OwnedFd) -> EventFd {
    // SAFETY: the descriptor is an eventfd that nobody else owns.
    unsafe { EventFd::from_raw_fd(file.into_raw_fd()) }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Event {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.file.as_raw_fd()
    }
}
