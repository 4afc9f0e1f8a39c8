//! Snapshots: a directory with a machine's state, and the disk that belongs to it.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::thread::ScopedJoinHandle;

use hypervisor::GuestRam;
use replay::{MachineState, SavedError, load_machine, save_machine};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use transfer::{Reader, Writer};

use super::{Host, KvmMachine, boot};
use crate::io::{DiskError, DiskIdentity};

/// The file with the state.
pub const STATE_FILE: &str = "state";
const META_TAG: &str = "snapshot";
const META_SCHEMA: u32 = 1;

/// What a snapshot says besides the machine's state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotMeta {
    /// The disk, and at which moment of its life.
    pub disk: Option<DiskIdentity>,
    /// Where the disk was.
    pub disk_path: Option<PathBuf>,
    /// The TAP that the VM had.
    pub tap: Option<String>,
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
    /// Something without a path.
    #[error(transparent)]
    State(#[from] SavedError),
}

/// Writes state, memory and meta to `path`.
///
/// # Errors
/// The file cannot be written.
pub fn write_state(
    path: &Path,
    meta: &SnapshotMeta,
    state: &MachineState,
    memory: &GuestRam,
) -> Result<(), SnapshotError> {
    let io = |source| SnapshotError::Io {
        path: path.to_owned(),
        source,
    };
    let saved = |source| SnapshotError::Saved {
        path: path.to_owned(),
        source,
    };
    let file = File::create_new(path).map_err(io)?;
    let mut writer =
        Writer::new(BufWriter::with_capacity(1 << 20, file)).map_err(|e| saved(e.into()))?;
    writer
        .section(META_TAG, META_SCHEMA, meta)
        .map_err(|e| saved(e.into()))?;
    save_machine(&mut writer, state, memory).map_err(saved)?;
    writer.finish().map_err(|e| saved(e.into()))?;
    Ok(())
}

/// Writes the snapshot `dir`.
///
/// # Errors
/// It exists already, or cannot be written.
pub fn write_snapshot(
    dir: &Path,
    meta: &SnapshotMeta,
    state: &MachineState,
    memory: &GuestRam,
) -> Result<(), SnapshotError> {
    let io = |source| SnapshotError::Io {
        path: dir.to_owned(),
        source,
    };
    if dir.exists() {
        return Err(SnapshotError::Exists(dir.to_owned()));
    }
    let incomplete = dir.with_extension("incomplete");
    fs::create_dir(&incomplete).map_err(io)?;
    write_state(&incomplete.join(STATE_FILE), meta, state, memory)?;
    fs::rename(&incomplete, dir).map_err(io)
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
    let file = File::open(path).map_err(|source| SnapshotError::Io {
        path: path.to_owned(),
        source,
    })?;
    let at = |source: SavedError| SnapshotError::Saved {
        path: path.to_owned(),
        source,
    };
    let mut reader =
        Reader::new(BufReader::with_capacity(1 << 20, file)).map_err(|e| at(e.into()))?;
    let mut meta = SnapshotMeta::default();
    let machine = load_machine::<_, _, _, SnapshotError>(
        &mut reader,
        |section| {
            if section.tag == META_TAG {
                meta = section.decode(META_SCHEMA).map_err(|e| at(e.into()))?;
            }
            Ok(())
        },
        |ram| Ok(boot::create(ram, host()?)?),
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
