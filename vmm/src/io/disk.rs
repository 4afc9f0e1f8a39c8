//! The VM's disk: a raw image, or a block device, of the host.
#![allow(unsafe_code)] // flock and the size of a block device have no safe interface here.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Bytes of a sector.
pub const SECTOR_LEN: u64 = 512;

/// How the image is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskMode {
    /// Through the host's page cache; a flush of the guest is an `fdatasync`. For a VM on its own: the
    /// image is locked against all other users on this host.
    Cached,
    /// `O_DIRECT | O_DSYNC`: a completed write is on the storage. For an image on shared storage under
    /// protection: which of the hosts may open it is decided by the epoch; the lock, which they share, keeps
    /// VMs away that ask for no epoch.
    Shared,
}

/// Why there is no disk.
#[derive(Debug, Error)]
pub enum DiskError {
    /// It cannot be opened.
    #[error("disk image {path}: {source}")]
    Open {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Another process has it locked.
    #[error("disk image {0} is in use by another process: stop that VM first")]
    InUse(PathBuf),
    /// Late writes of a lost host have no place beside it.
    #[error(
        "disk image {0} is no file: protection needs an image in a directory on shared storage, since \
         late writes of a lost host go to files beside it"
    )]
    NoFile(PathBuf),
    /// Its size is not whole sectors.
    #[error("disk image {path} has {bytes} bytes, which is not a multiple of 512 above zero")]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// The file system has no direct I/O.
    #[error(
        "disk image {0}: its file system has no O_DIRECT, which protection needs (tmpfs of old \
         kernels, some FUSE): put the image on another file system"
    )]
    NoDirect(PathBuf),
    /// The guest has a disk, and nothing is behind it.
    #[error(
        "the guest has a disk of {expected} sectors, and no image was given: give the one that belongs to \
         this state with --disk"
    )]
    None {
        /// Sectors of the guest's disk.
        expected: u64,
    },
    /// The guest has no disk.
    #[error(
        "the guest was started without a disk, and {0} was given: leave out --disk, or start the guest anew with it"
    )]
    Unwanted(PathBuf),
    /// The guest has a disk of another size.
    #[error(
        "disk image {path} has {found} sectors, and the guest has a disk of {expected} sectors: give the \
         image that belongs to this state"
    )]
    OtherSize {
        /// The image.
        path: PathBuf,
        /// Sectors of the guest's disk.
        expected: u64,
        /// Sectors of the image.
        found: u64,
    },
    /// It is not the disk that the saved state belongs to.
    #[error(
        "disk image {path} has moved on since the saved state was taken ({what}): restoring would \
         corrupt it. Use the copy that was taken with the state"
    )]
    MovedOn {
        /// The image.
        path: PathBuf,
        /// How it differs.
        what: String,
    },
}

/// Which disk, and at which moment of its life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskIdentity {
    /// Its size.
    pub bytes: u64,
    /// When it was last written, in ns since 1970, as the file system says.
    pub generation_ns: i128,
}

impl DiskIdentity {
    /// The identity of the image `path`, which is a file.
    ///
    /// # Errors
    /// The file system does not say.
    pub fn of_file(path: &Path) -> Result<Self, DiskError> {
        let meta = metadata(path)?;
        Ok(Self::new(&meta, meta.len() / SECTOR_LEN))
    }

    /// The identity of the image `path` with so many sectors.
    ///
    /// # Errors
    /// The file system does not say.
    pub fn of_path(path: &Path, sectors: u64) -> Result<Self, DiskError> {
        Ok(Self::new(&metadata(path)?, sectors))
    }

    fn new(meta: &Metadata, sectors: u64) -> Self {
        Self {
            bytes: sectors * SECTOR_LEN,
            generation_ns: i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec()),
        }
    }
}

fn metadata(path: &Path) -> Result<Metadata, DiskError> {
    std::fs::metadata(path).map_err(|source| DiskError::Open {
        path: path.to_owned(),
        source,
    })
}

/// Keeps others away, where the file system has locks.
fn lock(file: &File, path: &Path, mode: DiskMode) -> Result<(), DiskError> {
    let kind = match mode {
        DiskMode::Cached => libc::LOCK_EX,
        DiskMode::Shared => libc::LOCK_SH,
    };
    // SAFETY: flock takes no pointers.
    if unsafe { libc::flock(file.as_raw_fd(), kind | libc::LOCK_NB) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::WouldBlock {
        return Err(DiskError::InUse(path.to_owned()));
    }
    tracing::warn!(path = %path.display(), %error, "the disk image cannot be locked");
    Ok(())
}

/// An open disk.
#[derive(Debug)]
pub struct Disk {
    file: File,
    path: PathBuf,
    bytes: u64,
    mode: DiskMode,
}

impl Disk {
    /// Opens an image.
    ///
    /// # Errors
    /// It cannot be opened, is in use, or does not fit.
    pub fn open(path: &Path, mode: DiskMode) -> Result<Self, DiskError> {
        let open_error = |source| DiskError::Open {
            path: path.to_owned(),
            source,
        };
        let flags = match mode {
            DiskMode::Cached => libc::O_CLOEXEC,
            DiskMode::Shared => libc::O_CLOEXEC | libc::O_DIRECT | libc::O_DSYNC,
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path)
            .map_err(|source| match (mode, source.raw_os_error()) {
                (DiskMode::Shared, Some(libc::EINVAL)) => DiskError::NoDirect(path.to_owned()),
                _ => open_error(source),
            })?;
        lock(&file, path, mode)?;
        if mode == DiskMode::Shared && !file.metadata().map_err(open_error)?.is_file() {
            return Err(DiskError::NoFile(path.to_owned()));
        }
        let bytes = file.seek(SeekFrom::End(0)).map_err(open_error)?;
        if bytes == 0 || bytes % SECTOR_LEN != 0 {
            return Err(DiskError::Size {
                path: path.to_owned(),
                bytes,
            });
        }
        Ok(Self {
            file,
            path: path.to_owned(),
            bytes,
            mode,
        })
    }

    /// Its size in sectors of 512 bytes.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.bytes / SECTOR_LEN
    }

    /// How it is written.
    #[must_use]
    pub fn mode(&self) -> DiskMode {
        self.mode
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which disk it is, and at which moment of its life.
    ///
    /// # Errors
    /// The file system does not say.
    pub fn identity(&self) -> Result<DiskIdentity, DiskError> {
        let source = |source| DiskError::Open {
            path: self.path.clone(),
            source,
        };
        self.file.sync_all().map_err(source)?;
        DiskIdentity::of_path(&self.path, self.sectors())
    }

    /// Refuses the disk for a guest whose disk has `expected` sectors.
    ///
    /// # Errors
    /// [`DiskError::OtherSize`].
    pub fn check_sectors(&self, expected: u64) -> Result<(), DiskError> {
        let found = self.sectors();
        if found == expected {
            return Ok(());
        }
        Err(DiskError::OtherSize {
            path: self.path.clone(),
            expected,
            found,
        })
    }

    /// Refuses the disk unless it is `expected`.
    ///
    /// # Errors
    /// [`DiskError::MovedOn`].
    pub fn check_identity(&self, expected: &DiskIdentity) -> Result<(), DiskError> {
        let found = self.identity()?;
        if found == *expected {
            return Ok(());
        }
        let what = if found.bytes == expected.bytes {
            "it was written later".to_owned()
        } else {
            format!("it has {} bytes, not {}", found.bytes, expected.bytes)
        };
        Err(DiskError::MovedOn {
            path: self.path.clone(),
            what,
        })
    }

    /// Writes `data` from `sector` on, at once.
    ///
    /// # Errors
    /// The image cannot be written there.
    pub fn write(&self, sector: u64, data: &[u8]) -> Result<(), DiskError> {
        use std::os::unix::fs::FileExt;
        self.file
            .write_all_at(data, sector * SECTOR_LEN)
            .map_err(|source| DiskError::Open {
                path: self.path.clone(),
                source,
            })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn image(bytes: usize) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        fs::write(&path, vec![0; bytes]).unwrap();
        (dir, path)
    }

    #[test]
    fn a_second_user_of_an_image_is_refused() {
        let (_dir, path) = image(4096);
        let first = Disk::open(&path, DiskMode::Cached).unwrap();
        assert_eq!(first.sectors(), 8);
        assert!(matches!(
            Disk::open(&path, DiskMode::Cached),
            Err(DiskError::InUse(_))
        ));
        drop(first);
        assert!(Disk::open(&path, DiskMode::Cached).is_ok());
    }

    #[test]
    fn protected_vms_share_an_image_and_no_other_has_it_too() {
        let (_dir, path) = image(4096);
        let open = |mode| Disk::open(&path, mode);
        let hosts = [
            open(DiskMode::Shared).unwrap(),
            open(DiskMode::Shared).unwrap(),
        ];
        assert!(matches!(open(DiskMode::Cached), Err(DiskError::InUse(_))));
        drop(hosts);
        let _alone = open(DiskMode::Cached).unwrap();
        assert!(matches!(open(DiskMode::Shared), Err(DiskError::InUse(_))));
    }

    #[test]
    fn an_image_of_odd_size_is_refused() {
        for bytes in [0, 100] {
            let (_dir, path) = image(bytes);
            assert!(matches!(
                Disk::open(&path, DiskMode::Cached),
                Err(DiskError::Size { .. })
            ));
        }
    }

    #[test]
    fn a_disk_that_has_moved_on_is_refused() {
        let (_dir, path) = image(4096);
        let before = Disk::open(&path, DiskMode::Cached)
            .unwrap()
            .identity()
            .unwrap();
        Disk::open(&path, DiskMode::Cached)
            .unwrap()
            .check_identity(&before)
            .unwrap();
        fs::write(&path, vec![1; 4096]).unwrap();
        let disk = Disk::open(&path, DiskMode::Cached).unwrap();
        assert!(matches!(
            disk.check_identity(&before),
            Err(DiskError::MovedOn { .. })
        ));
    }
}
