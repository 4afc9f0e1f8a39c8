//! What the threads of a link share: the peers, the way out, the counters, and the threads
//! themselves.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use ft::{HostId, PeerMessage};

use super::accept::Slots;
use super::config::{LinkConfig, LinkTimes, MAX_PEERS};
use super::connection::Connection;
use super::dial;
use super::handshake::{Hello, Purpose, Secured};
use super::key::Key;
use super::peer::{Peer, Work};
use super::sockets::Class;
use super::{Deliver, LinkEvent};

/// At most one warning about strangers in this time: they must not fill the log.
const STRANGER_WARNINGS: Duration = Duration::from_secs(10);

pub(super) struct Shared {
    pub(super) me: HostId,
    pub(super) key: Key,
    pub(super) times: LinkTimes,
    pub(super) slots: Slots,
    known: BTreeMap<HostId, Vec<SocketAddr>>,
    peers: Mutex<BTreeMap<HostId, Arc<Peer>>>,
    deliver: Mutex<Deliver>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    stopping: AtomicBool,
    warned: Mutex<Option<Instant>>,
    sent: AtomicU64,
    received: AtomicU64,
    dropped: AtomicU64,
    rejected: AtomicU64,
}

/// What a link counted since its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LinkCounts {
    /// Messages written to a connection.
    pub sent: u64,
    /// Messages delivered.
    pub received: u64,
    /// Messages dropped: no connection to be had, a full queue, or a connection that broke.
    pub dropped: u64,
    /// Connections that did not become authentic, or were refused.
    pub rejected: u64,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("me", &self.me)
            .finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these locks guard is whole after every statement, so a panic elsewhere leaves it whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn new(config: LinkConfig, deliver: Deliver) -> Self {
        let mut known: BTreeMap<HostId, Vec<SocketAddr>> = BTreeMap::new();
        for (host, addresses) in config.peers {
            if host != config.me {
                known.entry(host).or_default().extend(addresses);
            }
        }
        Self {
            me: config.me,
            key: config.key,
            times: config.times,
            slots: Slots::default(),
            known,
            peers: Mutex::default(),
            deliver: Mutex::new(deliver),
            threads: Mutex::default(),
            stopping: AtomicBool::new(false),
            warned: Mutex::new(None),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            rejected: AtomicU64::new(0),
        }
    }

    pub(super) fn addresses(&self, host: HostId) -> &[SocketAddr] {
        self.known.get(&host).map_or(&[], Vec::as_slice)
    }

    pub(super) fn counts(&self) -> LinkCounts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        LinkCounts {
            sent: get(&self.sent),
            received: get(&self.received),
            dropped: get(&self.dropped),
            rejected: get(&self.rejected),
        }
    }

    fn count_dropped(&self, messages: usize) {
        self.dropped.fetch_add(messages as u64, Ordering::Relaxed);
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    pub(super) fn deliver(&self, event: LinkEvent) {
        lock(&self.deliver)(event);
    }

    /// Starts a thread that [`Shared::stop`] waits for.
    pub(super) fn spawn(&self, name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let mut threads = lock(&self.threads);
        threads.retain(|thread| !thread.is_finished());
        threads.push(Builder::new().name(name.to_owned()).spawn(run)?);
        Ok(())
    }

    /// Ends everything, and waits for it.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.slots.close_all();
        for peer in lock(&self.peers).values() {
            peer.stop();
        }
        // A thread that ends may have started another one.
        loop {
            let Some(thread) = lock(&self.threads).pop() else {
                return;
            };
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }

    /// A connection did not come to anything.
    pub(super) fn reject(&self, from: Option<SocketAddr>, why: &dyn std::fmt::Display) {
        let rejected = self.rejected.fetch_add(1, Ordering::Relaxed) + 1;
        let mut warned = lock(&self.warned);
        if warned.is_none_or(|at| at.elapsed() >= STRANGER_WARNINGS) {
            *warned = Some(Instant::now());
            tracing::warn!(?from, rejected, "connection rejected: {why}");
        } else {
            tracing::debug!(?from, rejected, "connection rejected: {why}");
        }
    }

    /// Whether there is room for this host.
    pub(super) fn has_room_for(&self, host: HostId) -> bool {
        let peers = lock(&self.peers);
        peers.contains_key(&host) || peers.len() < MAX_PEERS
    }
}

/// The peer, with its writer thread; none where there are too many, or the link ends.
fn peer(shared: &Arc<Shared>, host: HostId) -> Option<Arc<Peer>> {
    let mut peers = lock(&shared.peers);
    if shared.is_stopping() {
        return None;
    }
    if let Some(peer) = peers.get(&host) {
        return Some(Arc::clone(peer));
    }
    if peers.len() >= MAX_PEERS {
        return None;
    }
    let addresses = shared.addresses(host).to_vec();
    let peer = Arc::new(Peer::new(host, addresses, &shared.times));
    let (theirs, writer) = (Arc::clone(shared), Arc::clone(&peer));
    if let Err(error) = shared.spawn("link-write", move || write(&theirs, &writer)) {
        tracing::error!(%error, "no thread for the link");
        return None;
    }
    peers.insert(host, Arc::clone(&peer));
    Some(peer)
}

/// Queues a message.
pub(super) fn send(shared: &Arc<Shared>, to: HostId, message: &PeerMessage) -> bool {
    let reachable = lock(&shared.peers).contains_key(&to) || shared.known.contains_key(&to);
    let queued = reachable && peer(shared, to).is_some_and(|peer| peer.push(message.encode()));
    if !queued {
        shared.count_dropped(1);
    }
    queued
}

/// A peer's writer thread.
fn write(shared: &Arc<Shared>, peer: &Arc<Peer>) {
    loop {
        match peer.next(&shared.times) {
            Work::Stop => return,
            Work::Write(connection, bytes) => {
                if write_one(shared, peer, &connection, &bytes) {
                    shared.sent.fetch_add(1, Ordering::Relaxed);
                } else {
                    shared.count_dropped(1);
                }
            }
            Work::Ping(connections) => {
                for connection in connections {
                    write_one(shared, peer, &connection, &[]);
                }
            }
            Work::Dial => {
                let hello = Hello::new(shared.me, peer.host, Purpose::Messages);
                match dial::any(shared, &peer.addresses, Class::Messages, &hello) {
                    Ok(dialed) => {
                        let (stream, address) = (dialed.stream, dialed.address);
                        adopt(shared, peer, stream, dialed.secured, address, true);
                    }
                    Err(error) => {
                        tracing::debug!(%error, "dial");
                        shared.count_dropped(peer.dial_failed(&shared.times));
                    }
                }
            }
        }
    }
}

fn write_one(shared: &Shared, peer: &Peer, connection: &Arc<Connection>, bytes: &[u8]) -> bool {
    let written = connection.write(bytes);
    if let Err(error) = &written {
        connection.close(error.to_string());
        shared.count_dropped(peer.broken(connection));
    }
    written.is_ok()
}

/// Makes an authentic connection one of its host's.
pub(super) fn adopt_accepted(
    shared: &Arc<Shared>,
    host: HostId,
    stream: TcpStream,
    secured: Secured,
    address: SocketAddr,
) {
    if let Some(peer) = peer(shared, host) {
        adopt(shared, &peer, stream, secured, address, false);
    }
}

fn adopt(
    shared: &Arc<Shared>,
    peer: &Arc<Peer>,
    stream: TcpStream,
    secured: Secured,
    address: SocketAddr,
    dialed: bool,
) {
    let limits = stream
        .set_read_timeout(Some(shared.times.silence))
        .and_then(|()| stream.set_write_timeout(Some(shared.times.user_timeout)));
    if let Err(error) = limits {
        tracing::warn!(%error, peer = %peer.host, "connection");
        return;
    }
    let (connection, opener) = Connection::new(stream, secured, dialed);
    let connection = Arc::new(connection);
    if !peer.connected(&connection, &shared.times) {
        return;
    }
    let (theirs, of, reading) = (
        Arc::clone(shared),
        Arc::clone(peer),
        Arc::clone(&connection),
    );
    let spawned = shared.spawn("link-read", move || {
        let host = of.host;
        theirs.deliver(LinkEvent::Connected {
            peer: host,
            address,
            dialed,
        });
        let why = reading.read(opener, |message| {
            theirs.received.fetch_add(1, Ordering::Relaxed);
            theirs.deliver(LinkEvent::Message {
                from: host,
                message,
            });
        });
        theirs.count_dropped(of.broken(&reading));
        theirs.deliver(LinkEvent::Broken {
            peer: host,
            address,
            why,
        });
    });
    if let Err(error) = spawned {
        tracing::error!(%error, "no thread for the link");
        connection.close("no thread");
        shared.count_dropped(peer.broken(&connection));
    }
}
