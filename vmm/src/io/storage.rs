//! Where the sectors of the VM's disk are: in the image, or, while an old primary may still write to
//! the image, in side files (R16).
//!
//! A quarantined sector is read from and written to the side file of its epoch, beside the image and at
//! the same offset, until it is folded back into the image.
//!
//! A side file that has its name is whole: every sector that it is asked for was copied from where it
//! was before, in the image or in an older side file. So a host that won an epoch and died before it
//! issued the outstanding writes again leaves what was there, not zeros nor something older, to whoever
//! starts the VM next; also where it died before it made its side file.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use format::Epoch;
use ft::{Location, Quarantine, SectorRange};

use super::buffer::Buffer;
use super::disk::{Disk, DiskError, DiskIdentity, DiskMode, SECTOR_LEN};

/// Sectors copied at a time when side files are folded back.
const FOLD_SECTORS: u64 = 256;

/// A part of a request that lies in one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// The file.
    pub(super) fd: RawFd,
    /// Where in it, in bytes.
    pub(super) at: u64,
    /// Where in the request, in bytes.
    pub(super) offset: usize,
    /// Bytes.
    pub(super) len: usize,
}

/// A disk and what is quarantined of it.
#[derive(Debug)]
pub struct Storage {
    disk: Disk,
    quarantine: Quarantine,
    sides: BTreeMap<Epoch, File>,
}

impl Storage {
    /// A disk of which nothing is quarantined.
    #[must_use]
    pub fn new(disk: Disk) -> Self {
        Self {
            disk,
            quarantine: Quarantine::default(),
            sides: BTreeMap::new(),
        }
    }

    /// A disk under `quarantine`: opens, or makes, its side files.
    ///
    /// # Errors
    /// A side file cannot be had.
    pub fn with_quarantine(disk: Disk, quarantine: Quarantine) -> io::Result<Self> {
        let mut storage = Self::new(disk);
        // The oldest first: the newer ones begin with what is in it.
        for epoch in quarantine.sides() {
            let path = side_path(&storage.disk, epoch);
            if !path.try_exists()? {
                storage.make_side(&quarantine, epoch, &path)?;
            }
            storage.sides.insert(epoch, open_side(&path, false)?);
        }
        storage.quarantine = quarantine;
        Ok(storage)
    }

    /// Makes the side file of `epoch` with what was there before of its sectors, durably, and then gives
    /// it its name. Only the owner of the newest epoch does this, so nobody else makes the same one.
    fn make_side(&self, quarantine: &Quarantine, epoch: Epoch, path: &Path) -> io::Result<()> {
        let mut new: OsString = path.as_os_str().to_owned();
        new.push(".new");
        let new = PathBuf::from(new);
        let side = open_side(&new, true)?;
        for (part, location) in quarantine.sources(epoch) {
            copy(self.file(location), &side, part)?;
        }
        side.sync_all()?;
        std::fs::rename(&new, path)?;
        match path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            Some(dir) => File::open(dir)?.sync_all(),
            None => File::open(".")?.sync_all(),
        }
    }

    fn file(&self, location: Location) -> &File {
        match location {
            Location::Image => self.disk.file(),
            Location::Side(epoch) => self.sides.get(&epoch).expect("every epoch has its file"),
        }
    }

    /// Refuses the disk unless it is `expected`.
    ///
    /// # Errors
    /// [`DiskError::MovedOn`].
    pub fn check_identity(&self, expected: &DiskIdentity) -> Result<(), DiskError> {
        self.disk.check_identity(expected)
    }

    pub(super) fn fd(&self) -> RawFd {
        self.disk.fd()
    }

    /// Whether it is on storage that other hosts use as well, which may hang.
    pub(super) fn is_shared(&self) -> bool {
        self.disk.mode() == DiskMode::Shared
    }

    pub(super) fn bytes(&self) -> u64 {
        self.disk.sectors() * SECTOR_LEN
    }

    /// Whether a request touches what is quarantined.
    pub(super) fn touches(&self, sector: u64, bytes: usize) -> bool {
        !self.quarantine.is_empty() && self.quarantine.touches(range(sector, bytes))
    }

    /// The parts of a request, in order; their lengths add up to `bytes`.
    pub(super) fn pieces(&self, sector: u64, bytes: usize) -> Vec<Piece> {
        let located = self.quarantine.locate(range(sector, bytes));
        let piece = |(part, location): (SectorRange, Location)| Piece {
            fd: self.file(location).as_raw_fd(),
            at: part.first * SECTOR_LEN,
            offset: ((part.first - sector) * SECTOR_LEN) as usize,
            len: (part.count * SECTOR_LEN) as usize,
        };
        located.into_iter().map(piece).collect()
    }

    /// Copies everything that is quarantined into the image, durably. The caller keeps the guest's
    /// writes to it away meanwhile.
    ///
    /// # Errors
    /// The storage failed; nothing is lost, and it can be tried again.
    pub(super) fn fold(&self) -> io::Result<()> {
        let image = self.disk.file();
        for (part, epoch) in self.quarantine.ranges() {
            copy(self.file(Location::Side(epoch)), image, part)?;
        }
        image.sync_all()
    }

    /// The quarantine is over: its side files are removed.
    pub(super) fn release(&mut self) {
        for epoch in std::mem::take(&mut self.sides).into_keys() {
            let path = side_path(&self.disk, epoch);
            if let Err(error) = std::fs::remove_file(&path) {
                tracing::warn!(%error, path = %path.display(), "side file stays");
            }
        }
        self.quarantine = Quarantine::default();
    }
}

fn open_side(path: &Path, fresh: bool) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(fresh)
        .truncate(fresh)
        .custom_flags(libc::O_DIRECT | libc::O_DSYNC | libc::O_CLOEXEC)
        .open(path)
}

/// Copies sectors to the same place in another file.
fn copy(from: &File, to: &File, part: SectorRange) -> io::Result<()> {
    let mut first = part.first;
    while first < part.end() {
        let sectors = FOLD_SECTORS.min(part.end() - first);
        let mut buffer = Buffer::zeroed((sectors * SECTOR_LEN) as usize);
        from.read_exact_at(&mut buffer, first * SECTOR_LEN)?;
        to.write_all_at(&buffer, first * SECTOR_LEN)?;
        first += sectors;
    }
    Ok(())
}

fn range(sector: u64, bytes: usize) -> SectorRange {
    SectorRange {
        first: sector,
        count: bytes as u64 / SECTOR_LEN,
    }
}

fn side_path(disk: &Disk, epoch: Epoch) -> PathBuf {
    let mut name: OsString = disk.path().as_os_str().to_owned();
    name.push(format!(".side-{epoch}"));
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A quarantine as it stands in a record: `count` sectors from `first` in the side file of epoch 2.
    fn quarantine(first: u64, count: u64) -> Quarantine {
        layers(&[(first, count, 2)])
    }

    /// The same with a side file for each epoch.
    fn layers(ranges: &[(u64, u64, u64)]) -> Quarantine {
        let range = |(first, count, epoch): &(u64, u64, u64)| serde_json::json!([{ "first": first, "count": count }, epoch]);
        let ranges: Vec<_> = ranges.iter().map(range).collect();
        serde_json::from_value(serde_json::json!({ "ranges": ranges, "suspects": [] })).unwrap()
    }

    fn fill(storage: &Storage, epoch: u64, first: u64, count: u64, byte: u8) {
        let mut block = Buffer::zeroed((count * SECTOR_LEN) as usize);
        block.fill(byte);
        storage.sides[&Epoch(epoch)]
            .write_all_at(&block, first * SECTOR_LEN)
            .unwrap();
    }

    /// The first byte of each sector, as a request finds it.
    fn found(storage: &Storage, first: u64, count: u64) -> Vec<u8> {
        let place = |sector| storage.quarantine.locate(range(sector, 512))[0].1;
        let byte = |sector| {
            let mut block = Buffer::zeroed(512);
            let file = storage.file(place(sector));
            file.read_exact_at(&mut block, sector * SECTOR_LEN).unwrap();
            block[0]
        };
        (first..first + count).map(byte).collect()
    }

    fn disk(dir: &tempfile::TempDir) -> Disk {
        let path = dir.path().join("disk.img");
        fs::write(&path, vec![1; 64 * 512]).unwrap();
        Disk::open(&path, DiskMode::Cached).unwrap()
    }

    #[test]
    fn a_request_is_cut_where_the_quarantine_begins_and_ends() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let storage = Storage::with_quarantine(disk(&dir), quarantine(8, 8)).unwrap();
        let pieces = storage.pieces(4, 16 * 512);
        let shape: Vec<_> = pieces
            .iter()
            .map(|p| (p.at / 512, p.offset / 512, p.len / 512))
            .collect();
        assert_eq!(shape, [(4, 0, 4), (8, 4, 8), (16, 12, 4)]);
        assert_eq!(pieces[0].fd, storage.fd());
        assert_ne!(pieces[1].fd, storage.fd());
        assert!(storage.touches(15, 512) && !storage.touches(16, 512));
    }

    #[test]
    fn a_side_file_begins_with_what_the_image_holds_and_is_never_seen_half_made() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let half_made = dir.path().join("disk.img.side-2.new");
        fs::write(&half_made, [7; 512]).unwrap();
        let storage = Storage::with_quarantine(disk(&dir), quarantine(8, 8)).unwrap();
        assert!(!half_made.exists());
        let mut block = Buffer::zeroed(8 * 512);
        storage.sides[&Epoch(2)]
            .read_exact_at(&mut block, 8 * 512)
            .unwrap();
        assert!(block.iter().all(|byte| *byte == 1));
        block.fill(9);
        storage.sides[&Epoch(2)]
            .write_all_at(&block, 8 * 512)
            .unwrap();
        drop(storage);
        // The next owner takes it as it is.
        let storage = Storage::with_quarantine(disk(&dir), quarantine(8, 8)).unwrap();
        let mut found = Buffer::zeroed(8 * 512);
        storage.sides[&Epoch(2)]
            .read_exact_at(&mut found, 8 * 512)
            .unwrap();
        assert!(found.iter().all(|byte| *byte == 9));
    }

    #[test]
    fn a_side_file_begins_with_what_an_older_one_holds_of_its_sectors() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let first = layers(&[(8, 8, 2)]);
        fill(
            &Storage::with_quarantine(disk(&dir), first).unwrap(),
            2,
            8,
            8,
            9,
        );
        let second = layers(&[(8, 8, 2), (12, 8, 3)]);
        let storage = Storage::with_quarantine(disk(&dir), second).unwrap();
        let expected = [[1; 4], [9; 4], [9; 4], [1; 4]].concat();
        assert_eq!(found(&storage, 4, 16), expected);
        fill(&storage, 3, 12, 2, 7);
        drop(storage);
        // The owner of epoch 4 died before it made its side file; that of 5 had the same sectors under way.
        let third = layers(&[(8, 8, 2), (12, 8, 3), (13, 2, 4), (10, 4, 5)]);
        let mut storage = Storage::with_quarantine(disk(&dir), third).unwrap();
        let expected = [vec![9; 4], vec![7; 2], vec![9; 2], vec![1; 4]].concat();
        assert_eq!(found(&storage, 8, 12), expected);
        fill(&storage, 5, 10, 1, 5);
        storage.fold().unwrap();
        storage.release();
        let names = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(names, 1, "side files are gone");
        let expected = [vec![9, 9, 5, 9], vec![7; 2], vec![9; 2], vec![1; 4]].concat();
        assert_eq!(found(&storage, 8, 12), expected);
    }

    #[test]
    fn folding_puts_the_side_file_into_the_image_and_removes_it() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let mut storage = Storage::with_quarantine(disk(&dir), quarantine(8, 8)).unwrap();
        let mut block = Buffer::zeroed(8 * 512);
        block.fill(9);
        storage.sides[&Epoch(2)]
            .write_all_at(&block, 8 * 512)
            .unwrap();
        storage.fold().unwrap();
        storage.release();
        let image = fs::read(dir.path().join("disk.img")).unwrap();
        assert!(image[8 * 512..16 * 512].iter().all(|byte| *byte == 9));
        assert!(
            image[..8 * 512]
                .iter()
                .chain(&image[16 * 512..])
                .all(|byte| *byte == 1)
        );
        assert!(!dir.path().join("disk.img.side-2").exists());
        assert!(!storage.touches(8, 512));
    }
}
