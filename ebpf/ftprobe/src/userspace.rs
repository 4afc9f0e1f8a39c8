//! The backend for hosts where no eBPF program can be loaded: a userspace responder, pages in memfds.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use ebpf_events::histogram::Histogram;
use ebpf_events::maps::{Counter, MAX_SESSIONS, SeenPage, SessionEntry, Watched};
use heartbeat::protocol::{Abilities, Role};
use heartbeat::responder::SessionPages;
use heartbeat::{Page, Responder};

use crate::backend::{Backend, BackendError};

#[derive(Debug)]
struct Slot {
    pages: SessionPages,
    vmm: OwnedFd,
    daemon: OwnedFd,
    seen: OwnedFd,
}

/// See the module.
#[derive(Debug)]
pub struct Userspace {
    responder: Responder,
    abilities: Abilities,
    slots: [Option<Slot>; MAX_SESSIONS],
}

impl Userspace {
    /// A backend around a running responder.
    pub fn new(responder: Responder, abilities: Abilities) -> Self {
        Self {
            responder,
            abilities,
            slots: [const { None }; MAX_SESSIONS],
        }
    }
}

impl Backend for Userspace {
    fn abilities(&self) -> &Abilities {
        &self.abilities
    }

    fn open(&mut self, session: u64, entry: &SessionEntry) -> Result<(), BackendError> {
        let (vmm, vmm_page) = Page::shared("pollux-vmm")?;
        let (daemon, daemon_page) = Page::shared("pollux-daemon")?;
        let (seen, seen_page) = Page::shared("pollux-seen")?;
        let pages = SessionPages {
            vmm: vmm_page,
            daemon: daemon_page,
            seen: seen_page,
        };
        self.responder.open(session, entry.clone(), pages.clone());
        self.slots[entry.slot as usize] = Some(Slot {
            pages,
            vmm,
            daemon,
            seen,
        });
        Ok(())
    }

    fn update(&mut self, session: u64, entry: &SessionEntry) -> Result<(), BackendError> {
        if let Some(slot) = &self.slots[entry.slot as usize] {
            self.responder
                .open(session, entry.clone(), slot.pages.clone());
        }
        Ok(())
    }

    fn close(&mut self, session: u64, slot: usize) {
        self.responder.close(session);
        self.slots[slot] = None;
    }

    fn descriptors(&self, slot: usize, role: Role) -> Vec<BorrowedFd<'_>> {
        let Some(slot) = &self.slots[slot] else {
            return Vec::new();
        };
        match role {
            Role::Vmm => vec![slot.vmm.as_fd(), slot.seen.as_fd()],
            Role::Daemon => vec![slot.daemon.as_fd()],
        }
    }

    fn seen(&self, slot: usize) -> Option<&Page<SeenPage>> {
        self.slots[slot].as_ref().map(|slot| &slot.pages.seen)
    }

    fn watch(&mut self, _pid: u32, _what: Watched) -> Result<(), BackendError> {
        Ok(())
    }

    fn round_trips(&self, _slot: usize) -> Option<Histogram> {
        None
    }

    fn counters(&self) -> [u64; Counter::ALL.len()] {
        self.responder.counters()
    }
}
