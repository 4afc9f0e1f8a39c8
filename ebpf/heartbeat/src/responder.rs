//! The userspace responder: answers heartbeats where no eBPF program can.
//!
//! Same packets, same checks, same counters as the program in the kernel, but it must be given a CPU
//! before it answers: on a starved host its replies are late, and a detector needs longer time-outs.
//! Its replies say so ([`ReplyFlags::USERSPACE`]). It should run in a process apart from the VMM, so
//! that a stopped VMM is still told from a dead host.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use ebpf_events::maps::{Counter, DaemonPage, SeenPage, SessionEntry, VmmPage};
use ebpf_events::{HEARTBEAT_BYTES, Kind, Opening, PacketError, Reply, ReplyFlags, Request};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use thiserror::Error;

use crate::clock::monotonic_ns;
use crate::page::Page;
use crate::socket::{HeartbeatSocket, transient};

/// Why a responder could not start.
#[derive(Debug, Error)]
pub enum ResponderError {
    /// The socket could not be made or bound: another responder has the port, or no such address.
    #[error("heartbeat responder on {local}: {source}")]
    Socket {
        /// The address asked for.
        local: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The thread could not be started.
    #[error("heartbeat responder thread: {0}")]
    Thread(#[source] io::Error),
}

/// The pages of one session, as its responder sees them.
#[derive(Debug, Clone)]
pub struct SessionPages {
    /// Written by the VMM.
    pub vmm: Page<VmmPage>,
    /// Written by the channel daemon.
    pub daemon: Page<DaemonPage>,
    /// Written by the responder.
    pub seen: Page<SeenPage>,
}

impl SessionPages {
    /// Pages of this process alone, for a responder inside a VMM.
    ///
    /// # Errors
    /// Out of memory.
    pub fn private() -> io::Result<Self> {
        Ok(Self {
            vmm: Page::private()?,
            daemon: Page::private()?,
            seen: Page::private()?,
        })
    }
}

/// What is done with a packet, without the socket.
#[derive(Debug, Default)]
struct Answerer {
    sessions: BTreeMap<u64, (SessionEntry, SessionPages)>,
    counters: [u64; Counter::ALL.len()],
}

impl Answerer {
    fn refuse<T>(&mut self, why: Counter) -> Option<T> {
        self.counters[why as usize] += 1;
        None
    }

    /// The reply to a packet, or `None` where it deserves none; either way it is counted.
    fn answer(&mut self, packet: &[u8], arrived_ns: u64) -> Option<[u8; HEARTBEAT_BYTES]> {
        let Ok(opening) = Opening::read(packet) else {
            return self.refuse(Counter::Malformed);
        };
        if opening.kind != Kind::Request {
            return self.refuse(Counter::Malformed);
        }
        let Some((entry, pages)) = self.sessions.get(&opening.session) else {
            return self.refuse(Counter::UnknownSession);
        };
        let Some(keys) = entry.keys_of(opening.generation) else {
            return self.refuse(Counter::UnknownKey);
        };
        let request = match Request::decode(packet, &keys.theirs) {
            Ok(request) => request,
            Err(PacketError::Forged) => return self.refuse(Counter::Forged),
            Err(_) => return self.refuse(Counter::Malformed),
        };
        if request.sequence <= pages.seen.highest_request.load(Ordering::Acquire) {
            return self.refuse(Counter::Replayed);
        }
        pages
            .seen
            .highest_request
            .store(request.sequence, Ordering::Release);
        pages.seen.heard_ns.store(arrived_ns, Ordering::Release);
        pages.seen.answered.fetch_add(1, Ordering::Relaxed);
        let local = ReplyFlags(pages.seen.local.load(Ordering::Acquire) as u8);
        let reply = Reply {
            flags: local | ReplyFlags::USERSPACE,
            epoch: entry.epoch,
            time_ns: monotonic_ns(),
            vmm_progress: pages.vmm.progress.load(Ordering::Acquire),
            daemon_progress: pages.daemon.progress.load(Ordering::Acquire),
            ..Reply::to(&request)
        };
        let packet = reply.encode(&keys.theirs);
        self.counters[Counter::Answered as usize] += 1;
        Some(packet)
    }
}

/// A running userspace responder; dropping it stops and joins its thread.
#[derive(Debug)]
pub struct Responder {
    answerer: Arc<Mutex<Answerer>>,
    local: SocketAddr,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Responder {
    /// Answers on `local`, which must be the address that the peer probes (a reply from another
    /// address of this host is ignored there), on one interface if it is named. It answers nothing
    /// before the first [`open`](Self::open).
    ///
    /// # Errors
    /// [`ResponderError`].
    pub fn userspace(local: SocketAddr, interface: Option<&str>) -> Result<Self, ResponderError> {
        let failed = |source| ResponderError::Socket { local, source };
        let socket = HeartbeatSocket::bind(local, interface).map_err(failed)?;
        socket.socket().set_nonblocking(true).map_err(failed)?;
        let local = socket.local_addr().map_err(failed)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
        let wake = Arc::new(wake);
        let answerer = Arc::new(Mutex::new(Answerer::default()));
        let (shared, stop) = (Arc::clone(&answerer), Arc::clone(&wake));
        let thread = std::thread::Builder::new()
            .name("heartbeat-reply".into())
            .spawn(move || {
                crate::priority::raise();
                run(&socket, &shared, &stop);
            })
            .map_err(ResponderError::Thread)?;
        Ok(Self {
            answerer,
            local,
            wake,
            thread: Some(thread),
        })
    }

    /// Where it answers; the port, if 0 was asked for, is filled in.
    pub const fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Answers for a session, or replaces its keys and epoch.
    pub fn open(&self, session: u64, entry: SessionEntry, pages: SessionPages) {
        self.answerer().sessions.insert(session, (entry, pages));
    }

    /// Answers for a session no more.
    pub fn close(&self, session: u64) {
        self.answerer().sessions.remove(&session);
    }

    /// What was counted so far, in the order of [`Counter::ALL`].
    pub fn counters(&self) -> [u64; Counter::ALL.len()] {
        self.answerer().counters
    }

    fn answerer(&self) -> MutexGuard<'_, Answerer> {
        self.answerer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        let woken = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes());
        debug_assert!(woken.is_ok(), "an eventfd takes a one");
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the heartbeat responder panicked");
        }
    }
}

fn run(socket: &HeartbeatSocket, answerer: &Mutex<Answerer>, stop: &OwnedFd) {
    let mut buffer = [0; HEARTBEAT_BYTES + 1];
    loop {
        let mut waiting = [
            PollFd::from_borrowed_fd(socket.socket().as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN),
        ];
        match poll(&mut waiting, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return tracing::error!(%error, "heartbeat responder stops"),
        }
        if !waiting[1].revents().is_empty() {
            return;
        }
        match socket.receive(&mut buffer) {
            Ok(None) => {}
            Ok(Some(arrival)) => {
                let reply = answerer
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .answer(&buffer[..arrival.bytes], arrival.arrived_ns);
                if let Some(reply) = reply
                    && let Err(error) = socket.socket().send_to(&reply, arrival.from)
                    && !transient(&error)
                {
                    tracing::debug!(%error, to = %arrival.from, "heartbeat reply not sent");
                }
            }
            Err(error) => return tracing::error!(%error, "heartbeat responder stops"),
        }
    }
}

#[cfg(test)]
mod tests;
