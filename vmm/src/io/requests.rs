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
/// Pause before side files that could not be folded back are tried again.
const FOLD_PAUSE: Duration = Duration::from_millis(200);
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

/// The end of a quarantine. Parts on side files that are under way have to end first: a write that the
/// guest was told of must be in what is folded, and no file is closed under a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Fold {
    /// Nobody asked.
    #[default]
    No,
    /// Writes to quarantined sectors wait in `parked`; what is under way ends, then all is copied, at
    /// this time at the earliest.
    Copying(Instant),
    /// Copied; the record still names the side files.
    Copied,
    /// Reads wait, too; what is under way ends, then the side files are removed.
    Releasing,
}

/// The disk requests of a VM.
#[derive(Default)]
pub(super) struct Requests {
    pending: BTreeMap<RequestId, Pending>,
    retries: Vec<Retry>,
    /// The storage was said to be lost.
    lost: bool,
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
        if let Some(count) = self.on_sides(&part) {
            *count -= 1;
        }
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

    /// The quarantine is to end: its sectors are copied back into the image.
    pub(super) fn fold(&mut self) -> io::Result<()> {
        if self.requests.fold == Fold::No {
            self.requests.fold = Fold::Copying(Instant::now());
        }
        self.drive_fold()
    }

    /// The record does not name the side files any more.
    pub(super) fn unquarantine(&mut self) -> io::Result<()> {
        self.requests.fold = Fold::Releasing;
        self.drive_fold()
    }

    /// Goes on with the end of the quarantine as far as it can.
    fn drive_fold(&mut self) -> io::Result<()> {
        let (reads, writes) = self.requests.on_sides;
        match self.requests.fold {
            Fold::Copying(at) if writes == 0 && at <= Instant::now() => {
                let folded = self.config.disk.as_ref().map_or(Ok(()), Storage::fold);
                match folded {
                    Ok(()) => {
                        self.requests.fold = Fold::Copied;
                        (self.config.deliver)(Delivery::Folded);
                    }
                    Err(error) => {
                        tracing::error!(%error, "side files cannot be folded back; it is tried again");
                        self.requests.fold = Fold::Copying(Instant::now() + FOLD_PAUSE);
                    }
                }
                Ok(())
            }
            Fold::Releasing if reads + writes == 0 => {
                self.requests.fold = Fold::No;
                if let Some(storage) = &mut self.config.disk {
                    storage.release();
                }
                std::mem::take(&mut self.requests.parked)
                    .into_iter()
                    .try_for_each(|effect| self.start(effect))
            }
            _ => Ok(()),
        }
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
    use std::path::Path;
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, channel};

    use ft::GateMode;

    use super::super::disk::{Disk, DiskMode};
    use super::super::handle::{IoConfig, Shared};
    use super::super::ring::Ring;
    use super::*;

    /// A backend that a test drives, over a disk of ones of which sectors 8 to 15 are in a side file.
    fn backend(dir: &Path) -> (Backend, Receiver<Delivery>) {
        let path = dir.join("disk.img");
        std::fs::write(&path, vec![1; 64 * 512]).unwrap();
        let wire = serde_json::json!({
            "ranges": [[{ "first": 8, "count": 8 }, 2]],
            "suspects": [],
        });
        let disk = Disk::open(&path, DiskMode::Cached).unwrap();
        let storage = Storage::with_quarantine(disk, serde_json::from_value(wire).unwrap());
        let (send, deliveries) = channel();
        let config = IoConfig {
            tap: None,
            disk: Some(storage.unwrap()),
            console: None,
            gate: GateMode::Open,
            deliver: Box::new(move |delivery| {
                let _ = send.send(delivery);
            }),
        };
        let shared = Arc::new(Shared::new().unwrap());
        let backend = Backend::new(config, Ring::new().unwrap(), channel().1, shared);
        (backend, deliveries)
    }

    /// Lets everything end that is under way.
    fn settle(backend: &mut Backend) {
        while backend.ring.count(|_| true) > 0 {
            backend.ring.wait(1).unwrap();
            while let Some(done) = backend.ring.reap() {
                backend.complete(done).unwrap();
            }
            backend.look_after_storage().unwrap();
        }
    }

    /// What was delivered: the requests that are done with the first byte read, and "folded".
    fn delivered(deliveries: &Receiver<Delivery>) -> Vec<String> {
        let text = |delivery| match delivery {
            Delivery::Input(Input::DiskDone { id, status, data }) => {
                assert_eq!(status, DiskStatus::Ok);
                format!("{} {:?}", id.0, data.first())
            }
            Delivery::Folded => "folded".to_owned(),
            other => format!("{other:?}"),
        };
        deliveries.try_iter().map(text).collect()
    }

    fn write(id: u64, byte: u8) -> Effect {
        Effect::DiskWrite {
            id: RequestId(id),
            sector: 8,
            data: Arc::new(vec![byte; 512]),
        }
    }

    fn read(id: u64) -> Effect {
        Effect::DiskRead {
            id: RequestId(id),
            sector: 8,
            len: 512,
        }
    }

    #[test]
    fn a_write_under_way_when_a_quarantine_ends_is_in_what_is_folded() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let (mut backend, deliveries) = backend(dir.path());
        backend.start_disk(write(1, 2)).unwrap();
        backend.fold().unwrap();
        backend.start_disk(write(2, 3)).unwrap();
        settle(&mut backend);
        assert_eq!(delivered(&deliveries), ["1 None", "folded"]);
        let image = std::fs::read(dir.path().join("disk.img")).unwrap();
        assert!(image[8 * 512..9 * 512].iter().all(|byte| *byte == 2));

        // A read is under way when the side file is to go; one more comes.
        backend.start_disk(read(3)).unwrap();
        backend.unquarantine().unwrap();
        backend.start_disk(read(4)).unwrap();
        settle(&mut backend);
        let done = delivered(&deliveries);
        assert_eq!(done[0], "3 Some(2)");
        assert!(done.contains(&"2 None".to_owned()), "{done:?}");
        assert_eq!(done.len(), 3, "{done:?}");
        backend.start_disk(read(5)).unwrap();
        settle(&mut backend);
        assert_eq!(delivered(&deliveries), ["5 Some(3)"]);
        assert!(!dir.path().join("disk.img.side-2").exists());
    }

    #[test]
    fn a_fold_that_fails_is_tried_again_and_loses_nothing() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let (mut backend, deliveries) = backend(dir.path());
        // Shorter than its sectors: what is there cannot be copied whole.
        let side = dir.path().join("disk.img.side-2");
        let whole = std::fs::read(&side).unwrap();
        std::fs::write(&side, &whole[..8 * 512]).unwrap();
        backend.fold().unwrap();
        backend.start_disk(write(1, 4)).unwrap();
        assert!(delivered(&deliveries).is_empty());
        assert_eq!(backend.requests.pause(), Some(FOLD_PAUSE));
        std::fs::write(&side, &whole).unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        while delivered(&deliveries) != ["folded"] {
            assert!(Instant::now() < deadline);
            backend.look_after_storage().unwrap();
        }
        backend.unquarantine().unwrap();
        settle(&mut backend);
        assert_eq!(delivered(&deliveries), ["1 None"]);
    }

    #[test]
    fn a_bad_medium_is_no_matter_of_transport() {
        let is = |code| is_transport(&io::Error::from_raw_os_error(code));
        assert!(is(libc::ETIMEDOUT) && is(libc::ESTALE) && is(libc::ENOSPC));
        assert!(!is(libc::EIO) && !is(libc::EINVAL) && !is(libc::EBADF));
        assert!(!is_transport(&io::Error::other("short")));
    }
}
