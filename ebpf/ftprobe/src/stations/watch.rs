//! Listens at the stations of running programs.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use aya::maps::{MapData, PerCpuArray, RingBuf};
use aya::programs::UProbe;
use aya::{Ebpf, EbpfLoader};
use ebpf_events::stations::StationEvent;
use thiserror::Error;
use usdt::Station;

use super::notes::{NoteError, notes_of};
use super::uprobe::{Hook, hook};
use crate::kernel::pid_namespace;
use crate::objects::{self, ObjectError, failed, program};

/// What to listen to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The program's file.
    pub program: PathBuf,
    /// One process, or all that run it.
    pub process: Option<u32>,
}

/// Why the stations cannot be listened at.
#[derive(Debug, Error)]
pub enum WatchError {
    /// The programs that listen.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// The program to listen to.
    #[error(transparent)]
    Note(#[from] NoteError),
    /// A hook.
    #[error(
        "station {} of {}: {source} (needs CAP_PERFMON, and CAP_SYS_ADMIN where \
         kernel.perf_event_paranoid asks for it)", station.name(), program.display()
    )]
    Hook {
        /// Of which station.
        station: Station,
        /// In which program.
        program: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// This process's PID namespace.
    #[error("/proc/self/ns/pid: {0}")]
    PidNamespace(#[source] io::Error),
    /// Nothing to listen to.
    #[error("{0}")]
    NoStation(String),
}

/// Hooked stations; they are let go with this value.
pub struct Watch {
    events: RingBuf<MapData>,
    lost: PerCpuArray<MapData, u64>,
    stations: usize,
    _hooks: Vec<Hook>,
    _object: Ebpf,
}

impl Watch {
    /// Listens at every station of these programs.
    ///
    /// # Errors
    /// [`WatchError`]; then nothing stays hooked.
    pub fn start(targets: &[Target]) -> Result<Self, WatchError> {
        let (device, inode) = pid_namespace().map_err(WatchError::PidNamespace)?;
        let mut object = EbpfLoader::new()
            .override_global("pid_namespace_device", &device, true)
            .override_global("pid_namespace_inode", &inode, true)
            .load(objects::STATIONS)
            .map_err(ObjectError::from)?;
        let events = RingBuf::try_from(objects::map(&mut object, "events")?);
        let lost = PerCpuArray::try_from(objects::map(&mut object, "lost")?);
        let mut hooks = Vec::new();
        for target in targets {
            for note in notes_of(&target.program)? {
                let name = note.station.name();
                let program: &mut UProbe = program(&mut object, name)?;
                objects::load_once(name, program, UProbe::load)?;
                let fd = program.fd().map_err(failed(name))?.as_fd();
                let hooked = hook(&target.program, note, target.process, fd);
                hooks.push(hooked.map_err(|source| WatchError::Hook {
                    station: note.station,
                    program: target.program.clone(),
                    source,
                })?);
            }
        }
        if hooks.is_empty() {
            let what = "none of the programs has trace points of Pollux";
            return Err(WatchError::NoStation(what.to_owned()));
        }
        Ok(Self {
            events: events.map_err(ObjectError::from)?,
            lost: lost.map_err(ObjectError::from)?,
            stations: hooks.len(),
            _hooks: hooks,
            _object: object,
        })
    }

    /// How many trace points are hooked.
    pub const fn stations(&self) -> usize {
        self.stations
    }

    /// Takes the events that have come, in order. To be called some times a second: the buffer has room
    /// for 150,000.
    pub fn take(&mut self, mut each: impl FnMut(StationEvent)) {
        while let Some(item) = self.events.next() {
            if let Some(bytes) = item.first_chunk() {
                each(StationEvent::from_bytes(bytes));
            }
        }
    }

    /// Events that found no room so far.
    pub fn lost(&self) -> u64 {
        self.lost.get(&0, 0).map_or(0, |counts| counts.iter().sum())
    }
}

/// The programs with trace points of Pollux that run now, each once; or those of these processes.
///
/// # Errors
/// A process that is not there, or none at all.
pub fn programs(processes: &[u32]) -> Result<Vec<Target>, WatchError> {
    if !processes.is_empty() {
        return processes
            .iter()
            .map(|process| target_of(*process))
            .collect();
    }
    let mut found = BTreeMap::new();
    let entries = std::fs::read_dir("/proc").map_err(|e| WatchError::NoStation(e.to_string()))?;
    for entry in entries.flatten() {
        let number = entry.file_name().to_str().and_then(|n| n.parse().ok());
        let Some(process): Option<u32> = number else {
            continue;
        };
        let program = executable(process);
        // Processes come and go, and the kernel's own threads have no program.
        let Ok(metadata) = std::fs::metadata(&program) else {
            continue;
        };
        let file = (metadata.dev(), metadata.ino());
        if !found.contains_key(&file) && notes_of(&program).is_ok_and(|notes| !notes.is_empty()) {
            found.insert(
                file,
                Target {
                    program,
                    process: None,
                },
            );
        }
    }
    if found.is_empty() {
        let what = "no program with trace points of Pollux runs here; name processes with --pid";
        return Err(WatchError::NoStation(what.to_owned()));
    }
    Ok(found.into_values().collect())
}

fn target_of(process: u32) -> Result<Target, WatchError> {
    let program = executable(process);
    if std::fs::metadata(&program).is_err() {
        return Err(WatchError::NoStation(format!("no process {process}")));
    }
    Ok(Target {
        program,
        process: Some(process),
    })
}

/// By the process: that names the file even if another has taken its place.
fn executable(process: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{process}/exe"))
}
