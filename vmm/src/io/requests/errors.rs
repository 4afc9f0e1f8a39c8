//! Whose an error of a disk request is: the medium's, of which the guest is told, or the transport's, which passes.
//!
//! EIO may be either: it is the medium's if the image can be read elsewhere after it, and else the transport's.

use std::io;
use std::time::Instant;

use devices::RequestId;

use super::super::backend::{Backend, Tag};
use super::super::buffer::Buffer;
use super::super::ring::Call;
use super::Part;

/// Bytes that are read to see whether the storage serves at all.
const BLOCK: u64 = 4096;

impl Backend {
    /// Whether an error is the transport's. One that may be either is taken for it until the image can be read
    /// somewhere else.
    pub(super) fn is_transport(
        &mut self,
        error: &io::Error,
        id: RequestId,
        part: Part,
    ) -> io::Result<bool> {
        let at = match part {
            _ if error.raw_os_error() != Some(libc::EIO) => return Ok(is_transport(error)),
            // It has lost what it was to write: another one would say that all is well.
            Part::Flush { .. } => return Ok(false),
            Part::Read { at, .. } | Part::Write { at, .. } => at,
        };
        let now = Instant::now();
        let since = *self.requests.doubts.entry(id).or_insert(now);
        if self.requests.elsewhere.is_some_and(|read| read >= since) {
            return Ok(false);
        }
        self.read_elsewhere(at)
    }

    /// Reads the image far from `at`. False where it has no other place.
    fn read_elsewhere(&mut self, at: u64) -> io::Result<bool> {
        let Some(storage) = &self.config.disk else {
            return Ok(false);
        };
        let last = (storage.bytes() / BLOCK).saturating_sub(1) * BLOCK;
        let place = if at < last / 2 { last } else { 0 };
        if place / BLOCK == at / BLOCK {
            return Ok(false);
        }
        let tag = Tag::Elsewhere(Instant::now());
        if self.ring.count(|tag| matches!(tag, Tag::Elsewhere(_))) == 0 {
            let call = Call::ReadAt(storage.fd(), place);
            self.ring
                .push_aside(tag, call, Buffer::zeroed(BLOCK as usize))?;
        }
        Ok(true)
    }

    /// A read of the image elsewhere has ended; it began then.
    pub(in crate::io) fn elsewhere(&mut self, began: Instant, result: &io::Result<usize>) {
        if result.as_ref().is_ok_and(|len| *len > 0) {
            self.requests.elsewhere = Some(began);
        }
    }
}

/// Whether an error says that the storage cannot be reached, or has no room at the moment, not that the
/// medium is bad.
pub(super) fn is_transport(error: &io::Error) -> bool {
    let codes = [
        libc::EAGAIN,
        libc::EINTR,
        libc::ETIMEDOUT,
        libc::ENOTCONN,
        libc::ECONNRESET,
        libc::ECONNREFUSED,
        libc::ECONNABORTED,
        libc::ESHUTDOWN,
        libc::EPIPE,
        libc::ENETDOWN,
        libc::ENETUNREACH,
        libc::EHOSTDOWN,
        libc::EHOSTUNREACH,
        libc::ENOLINK,
        libc::EREMOTEIO,
        libc::ESTALE,
        libc::ENODEV,
        libc::ENXIO,
        libc::ENOSPC,
        libc::EDQUOT,
    ];
    error
        .raw_os_error()
        .is_some_and(|code| codes.contains(&code))
}
