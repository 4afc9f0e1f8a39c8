//! What a responder of either kind does for the table of sessions.

use std::io;
use std::os::fd::BorrowedFd;

use ebpf_events::histogram::Histogram;
use ebpf_events::maps::{Counter, SeenPage, SessionEntry, Watched};
use heartbeat::Page;
use heartbeat::protocol::{Abilities, Role};
use thiserror::Error;

/// Why the kernel would not do something.
#[derive(Debug, Error)]
pub enum BackendError {
    /// An eBPF map.
    #[error("eBPF map: {0}")]
    Map(#[from] aya::maps::MapError),
    /// A page could not be made or mapped.
    #[error("page: {0}")]
    Page(#[from] io::Error),
}

/// Answers heartbeats of up to `MAX_SESSIONS` sessions, each in a slot.
pub trait Backend: Send {
    /// What it can do on this host.
    fn abilities(&self) -> &Abilities;

    /// Begins to answer for a session in a free slot, with fresh pages.
    ///
    /// # Errors
    /// [`BackendError`]; then the slot is free again.
    fn open(&mut self, session: u64, entry: &SessionEntry) -> Result<(), BackendError>;

    /// Replaces keys and epoch of an open session.
    ///
    /// # Errors
    /// [`BackendError`]; then the old ones hold.
    fn update(&mut self, session: u64, entry: &SessionEntry) -> Result<(), BackendError>;

    /// Answers for a session no more and frees its slot.
    fn close(&mut self, session: u64, slot: usize);

    /// The pages to hand to a process in a role.
    fn descriptors(&self, slot: usize, role: Role) -> Vec<BorrowedFd<'_>>;

    /// The page on which the process of a slot is marked dead.
    fn seen(&self, slot: usize) -> Option<&Page<SeenPage>>;

    /// Marks a process for the watch in the kernel, or takes the mark away where `what` is empty.
    /// Without such a watch this does nothing.
    ///
    /// # Errors
    /// [`BackendError`].
    fn watch(&mut self, pid: u32, what: Watched) -> Result<(), BackendError>;

    /// Round trips of a slot's heartbeats since its session was opened; `None` where nobody times them.
    fn round_trips(&self, slot: usize) -> Option<Histogram>;

    /// Counters of the heartbeats, in the order of [`Counter::ALL`].
    fn counters(&self) -> [u64; Counter::ALL.len()];
}
