//! The prober: sends a request at each beat, collects the replies, says what it has found.
//!
//! It does not keep time itself: [`ProberThread`](crate::ProberThread) calls it, or a program's own
//! event loop. Replies come from the kernel's page where a heartbeat program catches them, else from
//! the socket; both may be in use at once, while the probe daemon comes or goes. A reply counts once,
//! whichever way it came, and only if its request is in the window.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use ebpf_events::maps::{SeenReply, VmmPage};
use ebpf_events::{HEARTBEAT_BYTES, Key, KeyGeneration, Kind, Opening, Reply, Request};
use thiserror::Error;

use crate::clock::monotonic_ns;
use crate::observation::{Observation, PeerState};
use crate::page::{Page, SeenReader};
use crate::socket::{HeartbeatSocket, transient};

/// Time between requests unless another is set.
pub const DEFAULT_INTERVAL: Duration = Duration::from_millis(10);
/// Packets taken from the socket at one beat at most.
const RECEIVE_LIMIT: usize = 64;
/// A beat that comes later than this many intervals after the last one shows that the prober did not
/// run.
const GAP_INTERVALS: u32 = 2;

/// Why a prober could not start.
#[derive(Debug, Error)]
pub enum ProberError {
    /// The socket could not be made, bound or connected.
    #[error("heartbeat socket to {peer}: {source}")]
    Socket {
        /// The peer's responder.
        peer: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The thread could not be started.
    #[error("heartbeat thread: {0}")]
    Thread(#[source] io::Error),
    /// An interval of zero.
    #[error("heartbeat interval must not be zero")]
    Interval,
}

/// Whom to probe, how often, signed with what.
#[derive(Debug, Clone)]
pub struct ProberConfig {
    /// The channel's session.
    pub session: u64,
    /// This host's epoch.
    pub epoch: u64,
    /// Generation of `key`.
    pub generation: KeyGeneration,
    /// [`SessionKeys::ours`](ebpf_events::SessionKeys::ours).
    pub key: Key,
    /// The peer's responder.
    pub peer: SocketAddr,
    /// Address to send from; any if `None`.
    pub local: Option<IpAddr>,
    /// Interface to send on; by the routing table if `None`.
    pub interface: Option<String>,
    /// Time between requests.
    pub interval: Duration,
}

impl ProberConfig {
    /// Probes `peer` every [`DEFAULT_INTERVAL`] from any address.
    pub const fn new(
        session: u64,
        epoch: u64,
        generation: KeyGeneration,
        key: Key,
        peer: SocketAddr,
    ) -> Self {
        Self {
            session,
            epoch,
            generation,
            key,
            peer,
            local: None,
            interface: None,
            interval: DEFAULT_INTERVAL,
        }
    }
}

/// Sends requests and collects replies of one session.
#[derive(Debug)]
pub struct Prober {
    config: ProberConfig,
    /// The key before the newest: replies to requests signed with it may still be under way.
    previous_key: Option<(KeyGeneration, Key)>,
    socket: HeartbeatSocket,
    vmm: Page<VmmPage>,
    seen: Option<SeenReader>,
    nonces: Nonces,
    /// Requests are numbered from here.
    base: u64,
    sequence: u64,
    sent: u64,
    unsent: u64,
    /// As the newest reply describes it.
    peer: Option<PeerState>,
    last_beat_ns: Option<u64>,
    silence_ns: u64,
}

impl Prober {
    /// Opens the socket. `vmm` is the page of this VMM's session (or a private one without a probe
    /// daemon), `seen` what the kernel sees of the peer.
    ///
    /// Sequences begin at the clock's time, so that a prober that is restarted within a session goes
    /// on above what it has used.
    ///
    /// # Errors
    /// [`ProberError`].
    pub fn new(
        config: ProberConfig,
        vmm: Page<VmmPage>,
        seen: Option<SeenReader>,
    ) -> Result<Self, ProberError> {
        if config.interval.is_zero() {
            return Err(ProberError::Interval);
        }
        let failed = |source| ProberError::Socket {
            peer: config.peer,
            source,
        };
        let local = config.local.unwrap_or(match config.peer {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        });
        let socket = HeartbeatSocket::bind((local, 0).into(), config.interface.as_deref())
            .map_err(failed)?;
        socket.socket().set_nonblocking(true).map_err(failed)?;
        socket.socket().connect(config.peer).map_err(failed)?;
        let nonces = Nonces::new().map_err(failed)?;
        let base = monotonic_ns();
        Ok(Self {
            config,
            previous_key: None,
            socket,
            vmm,
            seen,
            nonces,
            base,
            sequence: base,
            sent: 0,
            unsent: 0,
            peer: None,
            last_beat_ns: None,
            silence_ns: 0,
        })
    }

    /// Time between beats.
    pub const fn interval(&self) -> Duration {
        self.config.interval
    }

    /// Signs with a new key from now on.
    pub fn set_key(&mut self, generation: KeyGeneration, key: Key) {
        let old = (
            self.config.generation,
            std::mem::replace(&mut self.config.key, key),
        );
        self.config.generation = generation;
        self.previous_key = Some(old);
    }

    /// Sends another epoch from now on.
    pub const fn set_epoch(&mut self, epoch: u64) {
        self.config.epoch = epoch;
    }

    /// Collects what has arrived, sends the next request, says what is known. To be called every
    /// [`interval`](Self::interval); or use [`collect`](Self::collect) and [`ask`](Self::ask), and
    /// keep the time elsewhere.
    pub fn beat(&mut self) -> Observation {
        let now = monotonic_ns();
        let own_gap_ns = self.account(now);
        self.collect(|_| {});
        let asked = self.sequence - self.base;
        match self.peer {
            Some(peer) if peer.request == asked => self.silence_ns = 0,
            Some(peer) => {
                self.silence_ns = self.silence_ns.min(now.saturating_sub(peer.arrived_ns));
            }
            None => {}
        }
        let observation = Observation {
            at_ns: now,
            sent: self.sent,
            unsent: self.unsent,
            peer: self.peer,
            heard_ns: self.heard_ns(),
            silence_ns: self.silence_ns,
            own_gap_ns,
        };
        self.ask();
        observation
    }

    /// When the peer's own last request arrived, ns; `None` if no program in the kernel sees them.
    pub fn heard_ns(&self) -> Option<u64> {
        self.seen.as_ref().and_then(SeenReader::heard_ns)
    }

    /// Adds the time since the last beat to the silence, or finds that the prober did not run in it.
    fn account(&mut self, now: u64) -> u64 {
        let Some(last) = self.last_beat_ns.replace(now) else {
            return 0;
        };
        let since = now.saturating_sub(last);
        let limit = (self.config.interval * GAP_INTERVALS).as_nanos();
        if u128::from(since) > limit {
            return since;
        }
        self.silence_ns += since;
        0
    }

    /// Takes the replies that have arrived, and hands on each that is newer than those before. Where
    /// the kernel takes them, only the newest is left to be seen. Never blocks.
    pub fn collect(&mut self, mut each: impl FnMut(&PeerState)) {
        if let Some(caught) = self.seen.as_ref().and_then(SeenReader::reply) {
            self.take(&caught, &mut each);
        }
        let mut buffer = [0; HEARTBEAT_BYTES + 1];
        for _ in 0..RECEIVE_LIMIT {
            let Ok(Some(arrival)) = self.socket.receive(&mut buffer) else {
                break;
            };
            if let Some(reply) = self.read_reply(&buffer[..arrival.bytes], arrival.arrived_ns) {
                self.take(&reply, &mut each);
            }
        }
    }

    fn take(&mut self, reply: &SeenReply, each: &mut impl FnMut(&PeerState)) {
        let Some(state) = PeerState::new(reply, self.base) else {
            return;
        };
        if self.peer.is_none_or(|known| state.request > known.request) {
            each(&state);
            self.peer = Some(state);
        }
    }

    /// What the kernel's program does with a reply, done here: signature, then window.
    fn read_reply(&self, packet: &[u8], arrived_ns: u64) -> Option<SeenReply> {
        let opening = Opening::read(packet).ok()?;
        if opening.kind != Kind::Reply || opening.session != self.config.session {
            return None;
        }
        let reply = Reply::decode(packet, self.key_of(opening.generation)?).ok()?;
        let sent_ns = self.vmm.window.sent_ns(reply.sequence, reply.nonce)?;
        Some(SeenReply {
            count: 1,
            sequence: reply.sequence,
            nonce: reply.nonce,
            arrived_ns,
            departed_ns: 0,
            sent_ns,
            peer_time_ns: reply.time_ns,
            peer_epoch: reply.epoch,
            vmm_progress: reply.vmm_progress,
            daemon_progress: reply.daemon_progress,
            flags: u64::from(reply.flags.0),
        })
    }

    fn key_of(&self, generation: KeyGeneration) -> Option<&Key> {
        if generation == self.config.generation {
            return Some(&self.config.key);
        }
        self.previous_key
            .as_ref()
            .filter(|(g, _)| *g == generation)
            .map(|(_, key)| key)
    }

    /// Sends a request and returns its number: 1 for the first of this prober. One that cannot be sent
    /// has its number all the same.
    pub fn ask(&mut self) -> u64 {
        self.sequence += 1;
        let request = Request {
            session: self.config.session,
            generation: self.config.generation,
            epoch: self.config.epoch,
            sequence: self.sequence,
            nonce: self.nonces.next(),
            time_ns: monotonic_ns(),
        };
        let packet = request.encode(&self.config.key);
        self.vmm
            .window
            .note(request.sequence, request.nonce, request.time_ns);
        // An ICMP error about an earlier request is reported here once and then forgotten.
        let sent = match self.socket.socket().send(&packet) {
            Err(error) if transient(&error) => self.socket.socket().send(&packet),
            other => other,
        };
        match sent {
            Ok(_) => self.sent += 1,
            Err(error) => {
                self.unsent += 1;
                tracing::debug!(%error, peer = %self.config.peer, "heartbeat not sent");
            }
        }
        self.sequence - self.base
    }
}

/// Its socket: readable when a reply has arrived, also where the kernel has taken note of it.
impl AsFd for Prober {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.socket().as_fd()
    }
}

/// Random numbers that a peer or an onlooker cannot foretell.
#[derive(Debug)]
struct Nonces {
    source: std::fs::File,
}

impl Nonces {
    fn new() -> io::Result<Self> {
        Ok(Self {
            source: std::fs::File::open("/dev/urandom")?,
        })
    }

    fn next(&mut self) -> u64 {
        let mut bytes = [0; 8];
        io::Read::read_exact(&mut self.source, &mut bytes)
            .expect("urandom gives eight bytes whole once it has been opened");
        u64::from_ne_bytes(bytes)
    }
}

#[cfg(test)]
mod tests;
