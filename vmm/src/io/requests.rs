//! Disk requests: their parts, their repetition while the storage is away, and the folding of what is
//! quarantined.
//!
//! An error of the transport never reaches the guest: the part is tried again after a pause. A request
//! that has been outstanding for [`STORAGE_LIMIT`] says that the storage is lost, to whoever may know
//! better what to do; its end, and that of all others that are late, that it is back.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use devices::{DiskStatus, Effect, Input, RequestId};

use super::backend::{Backend, Tag};
use super::buffer::Buffer;
use super::handle::Delivery;
use super::ring::{Call, Done};
use super::storage::{Piece, Storage};

/// Pause before a part that the storage did not take is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(10);
/// How long a request may be outstanding before the storage counts as lost.
const STORAGE_LIMIT: Duration = Duration::from_secs(2);

/// A part of a disk request: what it does where, for another try, and its place in the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Read { fd: RawFd, at: u64, offset: usize },
    Write { fd: RawFd, at: u64 },
    Flush { fd: RawFd },
}

impl Part {
    fn call(&self) -> Call {
        match *self {
            Self::Read { fd, at, .. } => Call::ReadAt(fd, at),
            Self::Write { fd, at } => Call::WriteAt(fd, at),
            Self::Flush { fd } => Call::Sync(fd),
        }
    }
}

/// A disk request whose parts are under way.
struct Pending {
    parts: usize,
    /// What was read.
    data: Vec<u8>,
    status: DiskStatus,
    since: Instant,
}

/// What is tried again.
struct Retry {
    at: Instant,
    id: RequestId,
    part: Part,
    buffer: Buffer,
}

/// The disk requests of a VM.
#[derive(Default)]
pub(super) struct Requests {
    pending: BTreeMap<RequestId, Pending>,
    retries: Vec<Retry>,
    /// The storage was said to be lost.
    lost: bool,
    /// Writes to quarantined sectors wait in `parked` while those are folded back.
    folding: bool,
    parked: Vec<Effect>,
}

impl Requests {
    /// Whether there is anything to look after now and then.
    pub(super) fn is_idle(&self) -> bool {
        self.pending.is_empty()
    }

    /// How long there is nothing to try again.
    pub(super) fn pause(&self) -> Option<Duration> {
        (!self.retries.is_empty()).then_some(RETRY_PAUSE)
    }

    /// The first of the requests that are late.
    fn late(&self) -> Option<RequestId> {
        let late = |(id, pending): (&RequestId, &Pending)| {
            (pending.since.elapsed() >= STORAGE_LIMIT).then_some(*id)
        };
        self.pending.iter().find_map(late)
    }
}

impl Backend {
    pub(super) fn start_disk(&mut self, effect: Effect) -> io::Result<()> {
        let Some(storage) = &self.config.disk else {
            if let Some(id) = effect.request() {
                self.disk_done(id, DiskStatus::MediumError, Vec::new());
            }
            return Ok(());
        };
        match effect {
            Effect::DiskRead { id, sector, len } => {
                let pieces = storage.pieces(sector, len as usize);
                self.disk_parts(id, &pieces, len as usize, None)
            }
            Effect::DiskWrite {
                sector, ref data, ..
            } if self.requests.folding && storage.touches(sector, data.len()) => {
                self.requests.parked.push(effect);
                Ok(())
            }
            Effect::DiskWrite { id, sector, data } => {
                let pieces = storage.pieces(sector, data.len());
                self.disk_parts(id, &pieces, 0, Some(&data))
            }
            Effect::DiskFlush { id } => {
                let part = Part::Flush { fd: storage.fd() };
                self.begin(id, 1, 0);
                self.start_part(id, part, Buffer::zeroed(0))
            }
            _ => Ok(()),
        }
    }

    fn begin(&mut self, id: RequestId, parts: usize, read_len: usize) {
        let pending = Pending {
            parts,
            data: vec![0; read_len],
            status: DiskStatus::Ok,
            since: Instant::now(),
        };
        self.requests.pending.insert(id, pending);
    }

    /// Starts the parts of a request; it is done when all of them are.
    fn disk_parts(
        &mut self,
        id: RequestId,
        pieces: &[Piece],
        read_len: usize,
        write: Option<&[u8]>,
    ) -> io::Result<()> {
        self.begin(id, pieces.len(), read_len);
        for piece in pieces {
            let Piece {
                fd,
                at,
                offset,
                len,
            } = *piece;
            let (part, buffer) = match write {
                Some(data) => (
                    Part::Write { fd, at },
                    Buffer::of(&data[offset..offset + len]),
                ),
                None => (Part::Read { fd, at, offset }, Buffer::zeroed(len)),
            };
            self.start_part(id, part, buffer)?;
        }
        Ok(())
    }

    fn start_part(&mut self, id: RequestId, part: Part, buffer: Buffer) -> io::Result<()> {
        self.ring.push(Tag::Disk(id, part), part.call(), buffer)
    }

    /// Tries again what is due, and tells when the storage is lost and when it is back.
    pub(super) fn look_after_storage(&mut self) -> io::Result<()> {
        let now = Instant::now();
        let retries = std::mem::take(&mut self.requests.retries);
        for retry in retries {
            if retry.at <= now {
                self.start_part(retry.id, retry.part, retry.buffer)?;
            } else {
                self.requests.retries.push(retry);
            }
        }
        let late = self.requests.late();
        if late.is_some() != self.requests.lost {
            self.requests.lost = late.is_some();
            (self.config.deliver)(match late {
                Some(id) => {
                    tracing::error!(
                        ?id,
                        "the storage does not answer; requests stay outstanding"
                    );
                    Delivery::StorageLost
                }
                None => Delivery::StorageBack,
            });
        }
        Ok(())
    }

    /// A part of a disk request has ended on the host: completes the request with its last one, or
    /// tries the part again where the storage, not the medium, failed.
    pub(super) fn disk_ended(&mut self, id: RequestId, part: Part, done: Done<Tag>) {
        let Done { buffer, result, .. } = done;
        let failed = match result {
            Ok(len) if len == buffer.len() => None,
            Ok(len) => Some(io::Error::other(format!("{len} of {} bytes", buffer.len()))),
            Err(error) if is_transport(&error) && !self.stopping => {
                if self.requests.retries.is_empty() {
                    tracing::warn!(%error, ?id, "storage is away; the request stays outstanding");
                }
                let at = Instant::now() + RETRY_PAUSE;
                return self.requests.retries.push(Retry {
                    at,
                    id,
                    part,
                    buffer,
                });
            }
            Err(error) => Some(error),
        };
        let Some(pending) = self.requests.pending.get_mut(&id) else {
            return;
        };
        if let Some(error) = failed {
            tracing::error!(%error, ?id, ?part, "disk error");
            pending.status = DiskStatus::MediumError;
        } else if let Part::Read { offset, .. } = part {
            pending.data[offset..offset + buffer.len()].copy_from_slice(&buffer);
        }
        pending.parts -= 1;
        if pending.parts == 0
            && let Some(pending) = self.requests.pending.remove(&id)
        {
            let ok = pending.status == DiskStatus::Ok;
            let data = if ok { pending.data } else { Vec::new() };
            self.disk_done(id, pending.status, data);
        }
    }

    fn disk_done(&self, id: RequestId, status: DiskStatus, data: Vec<u8>) {
        self.deliver(Input::DiskDone { id, status, data });
    }

    pub(super) fn fold(&mut self) {
        self.requests.folding = true;
        let folded = self.config.disk.as_ref().map_or(Ok(()), Storage::fold);
        match folded {
            Ok(()) => (self.config.deliver)(Delivery::Folded),
            // The protocol asks again; until then the guest's writes to these sectors wait.
            Err(error) => tracing::error!(%error, "side files cannot be folded back"),
        }
    }

    pub(super) fn unquarantine(&mut self) -> io::Result<()> {
        self.requests.folding = false;
        if let Some(storage) = &mut self.config.disk {
            storage.release();
        }
        std::mem::take(&mut self.requests.parked)
            .into_iter()
            .try_for_each(|effect| self.start(effect))
    }
}

/// Whether an error says that the storage cannot be reached, or has no room at the moment, not that the
/// medium is bad.
fn is_transport(error: &io::Error) -> bool {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_medium_is_no_matter_of_transport() {
        let is = |code| is_transport(&io::Error::from_raw_os_error(code));
        assert!(is(libc::ETIMEDOUT) && is(libc::ESTALE) && is(libc::ENOSPC));
        assert!(!is(libc::EIO) && !is(libc::EINVAL) && !is(libc::EBADF));
        assert!(!is_transport(&io::Error::other("short")));
    }
}
