//! Disk requests: their parts, and their repetition while the storage is away.
//!
//! A part that is done in part goes on where it ended. An error of the transport never reaches the guest: the
//! part is tried again after a pause (`errors`). Writes to quarantined sectors go to side files until these
//! are folded back (`fold`). A request that has been outstanding for [`STORAGE_LIMIT`] says that the storage is
//! lost, to whoever may know better what to do; its end, and that of all others that are late, that it is back.

mod errors;
mod fold;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use devices::{DiskStatus, Effect, Input, RequestId};

use self::fold::{FOLD_PAUSE, Fold};
use super::backend::{Backend, Tag};
use super::buffer::Buffer;
use super::handle::Delivery;
use super::ring::{Call, Done};
use super::storage::Piece;

/// Pause before a part that the storage did not take is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(10);
/// How long a request may be outstanding before the storage counts as lost. Storage that is merely busy keeps
/// a synchronous write waiting for seconds.
const STORAGE_LIMIT: Duration = Duration::from_secs(5);

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

    /// What is left of it after so many bytes.
    fn rest(self, done: usize) -> Self {
        match self {
            Self::Read { fd, at, offset } => Self::Read {
                fd,
                at: at + done as u64,
                offset: offset + done,
            },
            Self::Write { fd, at } => Self::Write {
                fd,
                at: at + done as u64,
            },
            Self::Flush { .. } => self,
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
    /// Since when a request fails in a way that may be the transport's or the medium's.
    doubts: BTreeMap<RequestId, Instant>,
    /// When the last read of another place began that the storage served.
    elsewhere: Option<Instant>,
    fold: Fold,
    parked: Vec<Effect>,
    /// Parts on side files that are under way or are to be tried again: reads, writes.
    on_sides: (usize, usize),
}

impl Requests {
    /// Whether there is anything to look after now and then.
    pub(super) fn is_idle(&self) -> bool {
        self.pending.is_empty()
    }

    /// How long there is nothing to try again.
    pub(super) fn pause(&self) -> Option<Duration> {
        match self.fold {
            _ if !self.retries.is_empty() => Some(RETRY_PAUSE),
            Fold::Copying(_) => Some(FOLD_PAUSE),
            _ => None,
        }
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
            Effect::DiskRead { sector, len, .. }
                if self.requests.fold == Fold::Releasing
                    && storage.touches(sector, len as usize) =>
            {
                self.requests.parked.push(effect);
                Ok(())
            }
            Effect::DiskRead { id, sector, len } => {
                let pieces = storage.pieces(sector, len as usize);
                self.disk_parts(id, &pieces, len as usize, None)
            }
            Effect::DiskWrite {
                sector, ref data, ..
            } if self.requests.fold != Fold::No && storage.touches(sector, data.len()) => {
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
        let before = self.requests.pending.insert(id, pending);
        assert!(before.is_none(), "a request is issued once");
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
            if let Some(count) = self.on_sides(&part) {
                *count += 1;
            }
            self.start_part(id, part, buffer)?;
        }
        Ok(())
    }

    /// The count of the parts on side files that `part` belongs to, if it does.
    fn on_sides(&mut self, part: &Part) -> Option<&mut usize> {
        let image = self.config.disk.as_ref()?.fd();
        let (reads, writes) = (&mut self.requests.on_sides.0, &mut self.requests.on_sides.1);
        match *part {
            Part::Read { fd, .. } => (fd != image).then_some(reads),
            Part::Write { fd, .. } => (fd != image).then_some(writes),
            Part::Flush { .. } => None,
        }
    }

    fn start_part(&mut self, id: RequestId, part: Part, buffer: Buffer) -> io::Result<()> {
        let (tag, call) = (Tag::Disk(id, part), part.call());
        match &self.config.disk {
            Some(storage) if storage.is_shared() => self.ring.push_aside(tag, call, buffer),
            _ => self.ring.push(tag, call, buffer),
        }
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
        self.drive_fold()?;
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

    /// A part of a disk request has ended on the host: goes on with what is left of it, tries it again where
    /// the storage, not the medium, failed, and completes the request with its last part.
    pub(super) fn disk_ended(
        &mut self,
        id: RequestId,
        part: Part,
        done: Done<Tag>,
    ) -> io::Result<()> {
        let Done { buffer, result, .. } = done;
        let failed = match result {
            Ok(len) if len == buffer.len() => None,
            Ok(0) => Some(io::Error::other("the image ends here")),
            Ok(len) => {
                self.take_read(id, part, &buffer[..len]);
                return self.start_part(id, part.rest(len), Buffer::of(&buffer[len..]));
            }
            Err(error) if !self.stopping && self.is_transport(&error, id, part)? => {
                if self.requests.retries.is_empty() {
                    tracing::warn!(%error, ?id, "storage is away; the request stays outstanding");
                }
                let at = Instant::now() + RETRY_PAUSE;
                self.requests.retries.push(Retry {
                    at,
                    id,
                    part,
                    buffer,
                });
                return Ok(());
            }
            Err(error) => Some(error),
        };
        if let Some(count) = self.on_sides(&part) {
            *count -= 1;
        }
        match failed {
            None => self.take_read(id, part, &buffer),
            Some(error) => {
                tracing::error!(%error, ?id, ?part, "disk error");
                if let Some(pending) = self.requests.pending.get_mut(&id) {
                    pending.status = DiskStatus::MediumError;
                }
            }
        }
        self.part_is_done(id);
        Ok(())
    }

    /// Keeps what a part has read.
    fn take_read(&mut self, id: RequestId, part: Part, bytes: &[u8]) {
        if let (Part::Read { offset, .. }, Some(pending)) =
            (part, self.requests.pending.get_mut(&id))
        {
            pending.data[offset..offset + bytes.len()].copy_from_slice(bytes);
        }
    }

    fn part_is_done(&mut self, id: RequestId) {
        let Some(pending) = self.requests.pending.get_mut(&id) else {
            return;
        };
        pending.parts -= 1;
        if pending.parts == 0
            && let Some(pending) = self.requests.pending.remove(&id)
        {
            self.requests.doubts.remove(&id);
            let ok = pending.status == DiskStatus::Ok;
            let data = if ok { pending.data } else { Vec::new() };
            self.disk_done(id, pending.status, data);
        }
    }

    fn disk_done(&self, id: RequestId, status: DiskStatus, data: Vec<u8>) {
        self.deliver(Input::DiskDone { id, status, data });
    }
}
