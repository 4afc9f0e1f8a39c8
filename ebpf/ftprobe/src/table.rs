//! The open sessions: which process has which role in each, and what becomes of them.
//!
//! Owned by the daemon, under one lock. Every rule about who may join, what an exit means and which
//! session gives way to a new one is here; how heartbeats are answered is the backend's.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;

use ebpf_events::histogram::Histogram;
use ebpf_events::maps::{Counter, MAX_SESSIONS, SeenPage, SessionEntry, Watched};
use ebpf_events::{KeyGeneration, ReplyFlags, SessionKeys};
use heartbeat::Page;
use heartbeat::protocol::{
    Abilities, ClockStatus, Refusal, RefusalCode, Role, SessionStatus, Status,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::backend::{Backend, BackendError};

/// A process that has joined.
#[derive(Debug)]
struct Member {
    pid: u32,
    /// Readable once the process has exited.
    pidfd: OwnedFd,
    alive: bool,
}

#[derive(Debug)]
struct Session {
    id: u64,
    entry: SessionEntry,
    vmm: Option<Member>,
    daemon: Option<Member>,
}

impl Session {
    const fn slot(&self) -> usize {
        self.entry.slot as usize
    }

    fn member_mut(&mut self, role: Role) -> &mut Option<Member> {
        match role {
            Role::Vmm => &mut self.vmm,
            Role::Daemon => &mut self.daemon,
        }
    }

    fn members(&self) -> impl Iterator<Item = (Role, &Member)> {
        let vmm = self.vmm.iter().map(|m| (Role::Vmm, m));
        vmm.chain(self.daemon.iter().map(|m| (Role::Daemon, m)))
    }

    fn living(&self) -> impl Iterator<Item = (Role, &Member)> {
        self.members().filter(|(_, m)| m.alive)
    }
}

/// See the module.
pub struct Table {
    backend: Box<dyn Backend>,
    /// In the order in which they were opened.
    sessions: Vec<Session>,
}

impl Table {
    /// No session yet.
    pub fn new(backend: Box<dyn Backend>) -> Self {
        Self {
            backend,
            sessions: Vec::new(),
        }
    }

    /// What the backend can do.
    pub fn abilities(&self) -> &Abilities {
        self.backend.abilities()
    }

    /// Counters of the heartbeats, in the order of [`Counter::ALL`].
    pub fn counters(&self) -> [u64; Counter::ALL.len()] {
        self.backend.counters()
    }

    /// Gives a process a role in a session, which begins if it is new; returns the pages to hand over.
    ///
    /// # Errors
    /// The role is taken, no place is free, or the kernel said no.
    pub fn join(
        &mut self,
        session: u64,
        epoch: u64,
        role: Role,
        pid: u32,
        pidfd: OwnedFd,
    ) -> Result<Vec<BorrowedFd<'_>>, Refusal> {
        // Whoever held the role, or another session, may have exited a moment ago.
        self.reap();
        let at = match self.find(session) {
            Some(at) => at,
            None => self.begin(session, epoch)?,
        };
        self.admit(at, role, pid, pidfd)?;
        self.raise_epoch(at, epoch)?;
        Ok(self.backend.descriptors(self.sessions[at].slot(), role))
    }

    /// Installs the keys of a generation.
    ///
    /// # Errors
    /// No such session, or the kernel said no.
    pub fn set_keys(
        &mut self,
        session: u64,
        generation: KeyGeneration,
        keys: SessionKeys,
    ) -> Result<(), Refusal> {
        let at = self.known(session)?;
        self.update(at, |entry| entry.install(generation, keys))
    }

    /// Raises this host's epoch; a lower one than is known changes nothing.
    ///
    /// # Errors
    /// As for [`set_keys`](Self::set_keys).
    pub fn set_epoch(&mut self, session: u64, epoch: u64) -> Result<(), Refusal> {
        let at = self.known(session)?;
        self.raise_epoch(at, epoch)
    }

    /// Ends a session.
    ///
    /// # Errors
    /// No such session.
    pub fn close(&mut self, session: u64) -> Result<(), Refusal> {
        let at = self.known(session)?;
        self.remove(at);
        Ok(())
    }

    /// Descriptors that become readable when a process of some session exits.
    pub fn pidfds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.sessions
            .iter()
            .flat_map(|s| s.living().map(|(_, m)| m.pidfd.as_fd()))
    }

    /// Marks the processes that have exited. The kernel's watch has usually done it before.
    pub fn reap(&mut self) {
        for session in &mut self.sessions {
            for (role, flag) in [
                (Role::Vmm, ReplyFlags::VMM_DEAD),
                (Role::Daemon, ReplyFlags::DAEMON_DEAD),
            ] {
                let (id, slot) = (session.id, session.slot());
                let Some(member) = session.member_mut(role) else {
                    continue;
                };
                if member.alive && exited(&member.pidfd) {
                    member.alive = false;
                    tracing::info!(session = id, pid = member.pid, ?role, "process has exited");
                    raise(self.backend.seen(slot), flag);
                }
            }
        }
    }

    /// What is going on, as far as it is about sessions.
    pub fn status(&self) -> Status {
        let counters = Counter::ALL.iter().zip(self.counters());
        Status {
            abilities: self.abilities().clone(),
            counters: counters.map(|(c, n)| (c.name().to_owned(), n)).collect(),
            sessions: self
                .sessions
                .iter()
                .map(|s| self.session_status(s))
                .collect(),
            traffic_watched: false,
            flows: Vec::new(),
            exits: Vec::new(),
        }
    }

    /// Round trips of each session, where the kernel times them.
    pub fn round_trips(&self) -> Vec<(u64, Histogram)> {
        let sessions = self.sessions.iter();
        let timed = sessions.filter_map(|s| Some((s.id, self.backend.round_trips(s.slot())?)));
        timed.collect()
    }

    fn session_status(&self, session: &Session) -> SessionStatus {
        let seen = self.backend.seen(session.slot());
        let reply = seen
            .and_then(|page| page.reply())
            .filter(|reply| reply.count > 0);
        let local = ReplyFlags(seen.map_or(0, |page| page.local.load(Ordering::Acquire)) as u8);
        SessionStatus {
            session: session.id,
            epoch: session.entry.epoch,
            vmm: session.vmm.as_ref().map(|m| m.pid),
            daemon: session.daemon.as_ref().map(|m| m.pid),
            vmm_dead: local.has(ReplyFlags::VMM_DEAD),
            daemon_dead: local.has(ReplyFlags::DAEMON_DEAD),
            generations: session
                .entry
                .keys
                .iter()
                .flatten()
                .map(|(g, _)| g.0)
                .collect(),
            answered: seen.map_or(0, |page| page.answered.load(Ordering::Relaxed)),
            accepted: reply.map_or(0, |reply| reply.count),
            clock: reply.map(|reply| {
                let (offset_ns, error_ns) = reply.clock_offset_ns();
                ClockStatus {
                    at_ns: reply.arrived_ns,
                    offset_ns,
                    error_ns,
                }
            }),
        }
    }

    fn find(&self, session: u64) -> Option<usize> {
        self.sessions.iter().position(|s| s.id == session)
    }

    fn known(&self, session: u64) -> Result<usize, Refusal> {
        self.find(session).ok_or_else(|| Refusal {
            code: RefusalCode::UnknownSession,
            message: format!("no process has joined session {session}"),
        })
    }

    fn begin(&mut self, session: u64, epoch: u64) -> Result<usize, Refusal> {
        let slot = self.free_slot()?;
        let entry = SessionEntry {
            slot,
            epoch,
            ..SessionEntry::default()
        };
        self.backend.open(session, &entry).map_err(|e| system(&e))?;
        self.sessions.push(Session {
            id: session,
            entry,
            vmm: None,
            daemon: None,
        });
        Ok(self.sessions.len() - 1)
    }

    /// A free slot, or that of the oldest session in which nobody lives, or else no VMM: a channel daemon
    /// that goes from session to session never says that it leaves one.
    fn free_slot(&mut self) -> Result<u32, Refusal> {
        if self.sessions.len() == MAX_SESSIONS {
            let sessions = &self.sessions;
            let dead = sessions.iter().position(|s| s.living().next().is_none());
            let no_vmm = |s: &Session| !s.living().any(|(role, _)| role == Role::Vmm);
            let at = dead.or_else(|| sessions.iter().position(no_vmm));
            let at = at.ok_or_else(|| Refusal {
                code: RefusalCode::Full,
                message: format!("all {MAX_SESSIONS} places are taken by living VMMs"),
            })?;
            tracing::info!(
                session = self.sessions[at].id,
                "session gives way to a new one"
            );
            self.remove(at);
        }
        let taken = |slot: &u32| self.sessions.iter().any(|s| s.entry.slot == *slot);
        let free = (0..MAX_SESSIONS as u32).find(|slot| !taken(slot));
        Ok(free.expect("there are fewer sessions than slots"))
    }

    fn admit(&mut self, at: usize, role: Role, pid: u32, pidfd: OwnedFd) -> Result<(), Refusal> {
        let session = &mut self.sessions[at];
        let (id, slot) = (session.id, session.slot());
        match session.member_mut(role) {
            Some(member) if member.alive && member.pid == pid => return Ok(()),
            Some(member) if member.alive => {
                let holder = member.pid;
                return Err(taken(format!(
                    "process {holder} has this role in session {id}"
                )));
            }
            Some(member) if role == Role::Vmm => {
                let late = member.pid;
                return Err(taken(format!("session {id} has ended with its VMM {late}")));
            }
            member => {
                *member = Some(Member {
                    pid,
                    pidfd,
                    alive: true,
                })
            }
        }
        if let Some(seen) = self.backend.seen(slot) {
            let (known, dead) = match role {
                Role::Vmm => (ReplyFlags::VMM_KNOWN, ReplyFlags::VMM_DEAD),
                Role::Daemon => (ReplyFlags::DAEMON_KNOWN, ReplyFlags::DAEMON_DEAD),
            };
            seen.local.fetch_and(!u64::from(dead.0), Ordering::AcqRel);
            seen.local.fetch_or(u64::from(known.0), Ordering::AcqRel);
        }
        tracing::info!(session = id, pid, ?role, "process has joined");
        self.watch(pid);
        // It may have exited before it was watched.
        self.reap();
        Ok(())
    }

    /// Tells the kernel's watch all that a process is now.
    fn watch(&mut self, pid: u32) {
        let mut what = Watched::default();
        for session in &self.sessions {
            for (role, member) in session.living() {
                let bit = u32::from(member.pid == pid) << session.entry.slot;
                match role {
                    Role::Vmm => what.vmm_of |= bit,
                    Role::Daemon => what.daemon_of |= bit,
                }
            }
        }
        if let Err(error) = self.backend.watch(pid, what) {
            tracing::warn!(pid, %error, "not watched in the kernel; its pidfd is watched here");
        }
    }

    fn raise_epoch(&mut self, at: usize, epoch: u64) -> Result<(), Refusal> {
        self.update(at, |entry| entry.epoch = entry.epoch.max(epoch))
    }

    fn update(&mut self, at: usize, change: impl FnOnce(&mut SessionEntry)) -> Result<(), Refusal> {
        let session = &mut self.sessions[at];
        let mut entry = session.entry.clone();
        change(&mut entry);
        self.backend
            .update(session.id, &entry)
            .map_err(|e| system(&e))?;
        session.entry = entry;
        Ok(())
    }

    fn remove(&mut self, at: usize) {
        let session = self.sessions.remove(at);
        self.backend.close(session.id, session.slot());
        for (_, member) in session.living() {
            self.watch(member.pid);
        }
        tracing::info!(session = session.id, "session closed");
    }
}

fn exited(pidfd: &OwnedFd) -> bool {
    let mut waiting = [PollFd::new(pidfd, PollFlags::IN)];
    matches!(poll(&mut waiting, Some(&Timespec::default())), Ok(ready) if ready > 0)
}

fn raise(seen: Option<&Page<SeenPage>>, flag: ReplyFlags) {
    if let Some(seen) = seen {
        seen.local.fetch_or(u64::from(flag.0), Ordering::AcqRel);
    }
}

const fn taken(message: String) -> Refusal {
    Refusal {
        code: RefusalCode::RoleTaken,
        message,
    }
}

fn system(error: &BackendError) -> Refusal {
    Refusal {
        code: RefusalCode::System,
        message: error.to_string(),
    }
}

#[cfg(test)]
mod tests;
