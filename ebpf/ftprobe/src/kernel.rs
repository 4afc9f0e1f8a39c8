//! The backend in the kernel: XDP or TCX programs answer, a tracepoint program watches for exits.
//!
//! The programs are attached by links that end with this process, so that nothing is left behind
//! however it ends.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;

use aya::maps::{Array, ArrayOfMaps, HashMap, Map, MapData, MapError, PerCpuArray};
use aya::{Ebpf, EbpfLoader};
use aya_obj::generated::{BPF_F_MMAPABLE, bpf_map_type};
use ebpf_events::histogram::{HISTOGRAM_BYTES, Histogram};
use ebpf_events::maps::{
    Counter, DaemonPage, MAX_SESSIONS, SESSION_ENTRY_BYTES, SeenPage, SessionEntry, VmmPage,
    WATCHED_BYTES, Watched,
};
use heartbeat::Page;
use heartbeat::protocol::{Abilities, ExitWatch, ResponderKind, Role, VERSION};
use thiserror::Error;

use crate::backend::{Backend, BackendError};
use crate::causes::with_causes;
use crate::objects::{self, ObjectError};
use crate::traffic::Traffic;

mod attach;

use attach::{Hooks, attach_egress, attach_exit, attach_responder};

/// Bits of a minor device number within the kernel (`MINORBITS` of linux/kdev_t.h).
const KERNEL_MINOR_BITS: u32 = 20;

/// Why no heartbeat program could be put to work.
#[derive(Debug, Error)]
pub enum KernelError {
    /// The object or one of its maps.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// None of the ways to attach the responder worked.
    #[error("heartbeats cannot be answered in the kernel: {0}")]
    Attach(String),
    /// This process's PID namespace.
    #[error("/proc/self/ns/pid: {0}")]
    PidNamespace(#[source] io::Error),
}

struct Slot {
    vmm: MapData,
    daemon: MapData,
    seen: MapData,
    seen_page: Page<SeenPage>,
}

/// What the heartbeat programs are told, and how they are to be attached.
#[derive(Debug, Clone)]
pub struct KernelConfig {
    /// Interface that heartbeats arrive on.
    pub interface: String,
    /// UDP port of the responders.
    pub port: u16,
    /// Ways to attach, to be tried in this order.
    pub ways: Vec<ResponderKind>,
    /// Why others are not among them; empty if all are.
    pub left_out: String,
}

/// See the module.
pub struct Kernel {
    abilities: Abilities,
    sessions: HashMap<MapData, u64, [u8; SESSION_ENTRY_BYTES]>,
    watched: HashMap<MapData, u32, [u8; WATCHED_BYTES]>,
    counters: PerCpuArray<MapData, u64>,
    round_trips: Array<MapData, [u8; HISTOGRAM_BYTES]>,
    vmm_pages: ArrayOfMaps<MapData, MapData>,
    daemon_pages: ArrayOfMaps<MapData, MapData>,
    seen_pages: ArrayOfMaps<MapData, MapData>,
    slots: [Option<Slot>; MAX_SESSIONS],
    /// Holds the programs and their links: they end with it.
    _object: Ebpf,
}

impl Kernel {
    /// Loads and attaches the heartbeat programs, on TCX behind those of the logging channel if these are on
    /// the same interface.
    ///
    /// # Errors
    /// [`KernelError`]: then nothing is left attached, but the probe of the log may still hand packets on.
    pub fn start(config: &KernelConfig, log: Option<&mut Traffic>) -> Result<Self, KernelError> {
        let (device, inode) = pid_namespace().map_err(KernelError::PidNamespace)?;
        let mut object = EbpfLoader::new()
            .override_global("heartbeat_port", &config.port, true)
            .override_global("pid_namespace_device", &device, true)
            .override_global("pid_namespace_inode", &inode, true)
            .load(objects::HEARTBEAT)
            .map_err(ObjectError::from)?;
        let mut hooks = Hooks::of(&config.interface, log);
        let (responder, responder_reason) = attach_responder(&mut object, config, &mut hooks)?;
        let departures = worked(
            "stamps of departure",
            attach_egress(&mut object, &mut hooks),
        );
        let watches = worked(
            "the watch for exits in the kernel",
            attach_exit(&mut object),
        );
        let abilities = Abilities {
            version: VERSION,
            responder,
            responder_reason,
            exit_watch: if watches {
                ExitWatch::Kernel
            } else {
                ExitWatch::Pidfd
            },
            departures,
            port: config.port,
            interface: config.interface.clone(),
        };
        Ok(Self {
            abilities,
            sessions: taken(&mut object, "sessions")?,
            watched: taken(&mut object, "watched")?,
            counters: taken(&mut object, "counters")?,
            round_trips: taken(&mut object, "round_trips")?,
            vmm_pages: taken(&mut object, "vmm_pages")?,
            daemon_pages: taken(&mut object, "daemon_pages")?,
            seen_pages: taken(&mut object, "seen_pages")?,
            slots: [const { None }; MAX_SESSIONS],
            _object: object,
        })
    }
}

impl Backend for Kernel {
    fn abilities(&self) -> &Abilities {
        &self.abilities
    }

    fn open(&mut self, session: u64, entry: &SessionEntry) -> Result<(), BackendError> {
        let vmm = page_map::<VmmPage>("vmm_page")?;
        let daemon = page_map::<DaemonPage>("daemon_page")?;
        let seen = page_map::<SeenPage>("seen_page")?;
        let seen_page = Page::map(seen.fd())?;
        self.vmm_pages.set(entry.slot, &vmm, 0)?;
        self.daemon_pages.set(entry.slot, &daemon, 0)?;
        self.seen_pages.set(entry.slot, &seen, 0)?;
        self.round_trips.set(entry.slot, [0; HISTOGRAM_BYTES], 0)?;
        // The programs find the session from here on, with all of its pages in place.
        self.sessions.insert(session, entry.to_bytes(), 0)?;
        self.slots[entry.slot as usize] = Some(Slot {
            vmm,
            daemon,
            seen,
            seen_page,
        });
        Ok(())
    }

    fn update(&mut self, session: u64, entry: &SessionEntry) -> Result<(), BackendError> {
        Ok(self.sessions.insert(session, entry.to_bytes(), 0)?)
    }

    fn close(&mut self, session: u64, slot: usize) {
        if let Err(error) = self.sessions.remove(&session) {
            tracing::warn!(session, %error, "session not removed from the kernel");
        }
        self.slots[slot] = None;
    }

    fn descriptors(&self, slot: usize, role: Role) -> Vec<BorrowedFd<'_>> {
        let Some(slot) = &self.slots[slot] else {
            return Vec::new();
        };
        match role {
            Role::Vmm => vec![slot.vmm.fd().as_fd(), slot.seen.fd().as_fd()],
            Role::Daemon => vec![slot.daemon.fd().as_fd()],
        }
    }

    fn seen(&self, slot: usize) -> Option<&Page<SeenPage>> {
        self.slots[slot].as_ref().map(|slot| &slot.seen_page)
    }

    fn watch(&mut self, pid: u32, what: Watched) -> Result<(), BackendError> {
        if what != Watched::default() {
            return Ok(self.watched.insert(pid, what.to_bytes(), 0)?);
        }
        match self.watched.remove(&pid) {
            // The program takes the mark away itself when the process exits.
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(MapError::SyscallError(e)) if e.io_error.raw_os_error() == Some(libc::ENOENT) => {
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn round_trips(&self, slot: usize) -> Option<Histogram> {
        let slot = u32::try_from(slot).ok()?;
        let bytes = self.round_trips.get(&slot, 0).ok()?;
        Some(Histogram::from_bytes(&bytes))
    }

    fn counters(&self) -> [u64; Counter::ALL.len()] {
        Counter::ALL.map(|counter| match self.counters.get(&(counter as u32), 0) {
            Ok(values) => values.iter().sum(),
            Err(error) => {
                tracing::warn!(counter = counter.name(), %error, "counter not read");
                0
            }
        })
    }
}

fn taken<M: TryFrom<Map, Error = MapError>>(
    object: &mut Ebpf,
    name: &'static str,
) -> Result<M, ObjectError> {
    Ok(M::try_from(objects::map(object, name)?)?)
}

/// An array of one `T` that processes can map.
fn page_map<T>(name: &str) -> Result<MapData, MapError> {
    let size = u32::try_from(size_of::<T>()).expect("pages are small");
    let array = bpf_map_type::BPF_MAP_TYPE_ARRAY as u32;
    let definition = aya_obj::Map::new_from_params(array, 4, size, 1, BPF_F_MMAPABLE);
    MapData::create(definition, name, None)
}

/// Device and inode of this process's PID namespace, as the kernel numbers them.
pub(crate) fn pid_namespace() -> io::Result<(u64, u64)> {
    let status = std::fs::metadata("/proc/self/ns/pid")?;
    let (major, minor) = (libc::major(status.dev()), libc::minor(status.dev()));
    Ok((
        u64::from(major) << KERNEL_MINOR_BITS | u64::from(minor),
        status.ino(),
    ))
}

/// Turns the failure of a part that can be done without into a warning.
fn worked(what: &str, result: Result<(), ObjectError>) -> bool {
    if let Err(error) = &result {
        tracing::warn!(error = with_causes(error), "without {what}");
    }
    result.is_ok()
}
