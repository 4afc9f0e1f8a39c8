//! Snapshots: a directory with a machine's state, and the disk that belongs to it.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::thread::ScopedJoinHandle;

use hypervisor::GuestRam;
use replay::{MachineState, RecordingId, SavedError, incomplete_path, load_machine, save_machine};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use transfer::{Item, Reader, Writer};

use super::{Host, KvmMachine, boot};
use crate::io::{DiskError, DiskIdentity};

/// The file with the state.
pub const STATE_FILE: &str = "state";
/// The section of a state file with its [`SnapshotMeta`].
pub const META_TAG: &str = "snapshot";
const META_SCHEMA: u32 = 3;

/// What a snapshot says besides the machine's state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotMeta {
    /// The disk, and at which moment of its life.
    pub disk: Option<DiskIdentity>,
    /// Where the disk was.
    pub disk_path: Option<PathBuf>,
    /// The TAP that the VM had.
    pub tap: Option<String>,
    /// The recording that the state is the start of, or that a replay has saved it from.
    pub recording: Option<RecordingId>,
    /// How many entries of the recording are behind the state.
    pub entries: u64,
}

impl SnapshotMeta {
    /// Of a state of this recording, behind its first `entries` entries.
    #[must_use]
    pub fn of_recording(id: Option<RecordingId>, entries: u64) -> Self {
        Self {
            recording: id,
            entries,
            ..Self::default()
        }
    }
}

/// Why a snapshot cannot be written or read.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// A file.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The state.
    #[error("{path}: {source}")]
    Saved {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: SavedError,
    },
    /// The hypervisor.
    #[error(transparent)]
    Hypervisor(#[from] hypervisor::Error),
    /// The disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The directory is there already.
    #[error("{0} exists already: remove it or choose another name")]
    Exists(PathBuf),
    /// Something is where the snapshot is written until it is whole.
    #[error(
        "{path} is in the way: it is left of a snapshot that was not finished, or another process writes it. \
         Remove it if none does, or choose another name than {dir}"
    )]
    InTheWay {
        /// What is in the way.
        path: PathBuf,
        /// The snapshot that was asked for.
        dir: PathBuf,
    },
    /// Something without a path.
    #[error(transparent)]
    State(#[from] SavedError),
}

/// Writes state, memory and meta to `path`. That it is on the disk is the caller's affair.
///
/// # Errors
/// The file cannot be written.
pub fn write_state(
    path: &Path,
    meta: &SnapshotMeta,
    state: &MachineState,
    memory: &GuestRam,
) -> Result<File, SnapshotError> {
    let saved = |source| SnapshotError::Saved {
        path: path.to_owned(),
        source,
    };
    let file = File::create_new(path).map_err(at(path))?;
    let mut writer =
        Writer::new(BufWriter::with_capacity(1 << 20, file)).map_err(|e| saved(e.into()))?;
    writer
        .section(META_TAG, META_SCHEMA, meta)
        .map_err(|e| saved(e.into()))?;
    save_machine(&mut writer, state, memory).map_err(saved)?;
    let file = writer.finish().map_err(|e| saved(e.into()))?;
    file.into_inner().map_err(|e| at(path)(e.into_error()))
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> SnapshotError + '_ {
    move |source| SnapshotError::Io {
        path: path.to_owned(),
        source,
    }
}

/// Writes the snapshot `dir`: it has its name once it is whole and on the disk.
///
/// # Errors
/// It exists already, or cannot be written: then nothing is left of it.
pub fn write_snapshot(
    dir: &Path,
    meta: &SnapshotMeta,
    state: &MachineState,
    memory: &GuestRam,
) -> Result<(), SnapshotError> {
    write_whole(dir, |path| {
        let file = write_state(path, meta, state, memory)?;
        file.sync_all().map_err(at(path))
    })
}

/// Makes the directory `dir` with a state file that `write` writes.
fn write_whole(
    dir: &Path,
    write: impl FnOnce(&Path) -> Result<(), SnapshotError>,
) -> Result<(), SnapshotError> {
    if dir.exists() {
        return Err(SnapshotError::Exists(dir.to_owned()));
    }
    let incomplete = incomplete_path(dir);
    fs::create_dir(&incomplete).map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => SnapshotError::InTheWay {
            path: incomplete.clone(),
            dir: dir.to_owned(),
        },
        _ => at(&incomplete)(source),
    })?;
    let written = write(&incomplete.join(STATE_FILE))
        .and_then(|()| fs::rename(&incomplete, dir).map_err(at(dir)));
    if written.is_err() {
        // It would be in the way of the next attempt; why this one failed is told.
        let _ = fs::remove_dir_all(&incomplete);
    }
    written
}

/// Reads what a state file says besides the machine's state, which is not looked at.
///
/// # Errors
/// The file is bad.
pub fn read_meta(path: &Path) -> Result<SnapshotMeta, SnapshotError> {
    let file = File::open(path).map_err(at(path))?;
    let saved = |source: transfer::Error| SnapshotError::Saved {
        path: path.to_owned(),
        source: source.into(),
    };
    let mut reader = Reader::new(BufReader::new(file)).map_err(saved)?;
    // It comes first.
    match reader.next_item().map_err(saved)? {
        Some(Item::Section(section)) if section.tag == META_TAG => {
            section.decode(META_SCHEMA).map_err(saved)
        }
        _ => Err(saved(transfer::Error::Missing(META_TAG.to_owned()))),
    }
}

/// Reads a state file into a machine on this host.
///
/// # Errors
/// The file is bad, or the hypervisor does not take the state.
pub fn load_state(path: &Path, host: &Host) -> Result<(KvmMachine, SnapshotMeta), SnapshotError> {
    load_state_on(path, || Ok(host))
}

/// The same; what the host is like need not be known before the file is read.
fn load_state_on<'h>(
    path: &Path,
    host: impl FnOnce() -> Result<&'h Host, hypervisor::Error>,
) -> Result<(KvmMachine, SnapshotMeta), SnapshotError> {
    let file = File::open(path).map_err(at(path))?;
    let saved = |source: SavedError| SnapshotError::Saved {
        path: path.to_owned(),
        source,
    };
    let mut reader =
        Reader::new(BufReader::with_capacity(1 << 20, file)).map_err(|e| saved(e.into()))?;
    let mut meta = SnapshotMeta::default();
    let machine = load_machine::<_, _, _, SnapshotError>(
        &mut reader,
        |section| {
            if section.tag == META_TAG {
                meta = section.decode(META_SCHEMA).map_err(|e| saved(e.into()))?;
            }
            Ok(())
        },
        |config, ram| Ok(boot::create_saved(config, ram, host()?)?),
    )?;
    Ok((machine, meta))
}

/// Reads the snapshot `dir` into a machine on this host, which is probed at the same time.
///
/// # Errors
/// As [`load_state`], and those of the probes.
pub fn restore_snapshot(dir: &Path) -> Result<(KvmMachine, SnapshotMeta), SnapshotError> {
    let probed = OnceLock::new();
    std::thread::scope(|scope| {
        let mut probes = Some(scope.spawn(boot::probe_host));
        let mut join = || {
            let joined = probes.take().map(ScopedJoinHandle::join);
            joined.map(|host| host.unwrap_or_else(|panic| resume_unwind(panic)))
        };
        let loaded = load_state_on(&dir.join(STATE_FILE), || {
            let host = join().expect("one machine is made")?;
            Ok(probed.get_or_init(|| host))
        });
        // Where the file could not be read and the host could not run it, the host comes first.
        if let Some(Err(error)) = join() {
            return Err(error.into());
        }
        loaded
    })
}

/// Reads the snapshot `dir` into a machine on this host.
///
/// # Errors
/// As [`load_state`].
pub fn load_snapshot(dir: &Path, host: &Host) -> Result<(KvmMachine, SnapshotMeta), SnapshotError> {
    load_state(&dir.join(STATE_FILE), host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_whose_names_differ_behind_a_dot_have_places_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("snap.v1"), dir.path().join("snap.v2"));
        write_whole(&first, |_| {
            write_whole(&second, |path| fs::write(path, b"2").map_err(at(path)))
        })
        .unwrap();
        assert!(first.is_dir());
        assert_eq!(fs::read(second.join(STATE_FILE)).unwrap(), b"2");
    }

    #[test]
    fn what_is_in_the_way_of_a_snapshot_is_named_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (snapshot, left) = (dir.path().join("s.v1"), dir.path().join("s.v1.incomplete"));
        fs::create_dir(&left).unwrap();
        let said = write_whole(&snapshot, |_| Ok(())).unwrap_err().to_string();
        let begins = format!("{} is in the way", left.display());
        assert!(said.starts_with(&begins), "{said}");
        assert!(said.contains("Remove it"), "{said}");
        assert!(left.exists() && !snapshot.exists());
    }

    #[test]
    fn of_a_snapshot_that_cannot_be_written_nothing_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let snapshot = dir.path().join("snapshot");
        let full = |path: &Path| {
            fs::write(path, b"half").unwrap();
            Err(at(path)(io::ErrorKind::StorageFull.into()))
        };
        write_whole(&snapshot, full).unwrap_err();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        write_whole(&snapshot, |_| Ok(())).unwrap();
    }
}
