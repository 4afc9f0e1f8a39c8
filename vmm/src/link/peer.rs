//! One other host: what waits to be sent to it, and its connections.
//!
//! Owner: the `Peer`, under one lock that is never held over I/O or a call to the outside. Only the
//! peer's writer thread dials and writes; each connection has a reader thread of its own, which is
//! also the one that forgets it.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ft::HostId;

use super::config::LinkTimes;
use super::connection::Connection;

/// The most messages that wait for one host.
pub const MAX_QUEUED_MESSAGES: usize = 256;
/// The most bytes of messages that wait for one host.
pub const MAX_QUEUED_BYTES: usize = 1 << 20;

/// Another host.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) host: HostId,
    pub(super) addresses: Vec<SocketAddr>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    queue: VecDeque<Vec<u8>>,
    queued_bytes: usize,
    /// The newest is last, and is written to.
    connections: Vec<Arc<Connection>>,
    ping_at: Instant,
    dial_at: Instant,
    pause: Duration,
    stopping: bool,
}

/// What the writer thread is to do next.
#[derive(Debug)]
pub(super) enum Work {
    Write(Arc<Connection>, Vec<u8>),
    Ping(Vec<Arc<Connection>>),
    Dial,
    Stop,
}

impl Peer {
    pub(super) fn new(host: HostId, addresses: Vec<SocketAddr>, times: &LinkTimes) -> Self {
        let now = Instant::now();
        Self {
            host,
            addresses,
            state: Mutex::new(State {
                queue: VecDeque::new(),
                queued_bytes: 0,
                connections: Vec::new(),
                ping_at: now,
                dial_at: now,
                pause: times.retry,
                stopping: false,
            }),
            changed: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The state is whole after every statement, so a panic elsewhere leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a message; false where it was dropped.
    pub(super) fn push(&self, bytes: Vec<u8>) -> bool {
        let mut state = self.state();
        let reachable = !state.connections.is_empty() || !self.addresses.is_empty();
        if state.stopping
            || !reachable
            || state.queue.len() >= MAX_QUEUED_MESSAGES
            || state.queued_bytes + bytes.len() > MAX_QUEUED_BYTES
        {
            return false;
        }
        state.queued_bytes += bytes.len();
        state.queue.push_back(bytes);
        self.changed.notify_all();
        true
    }

    /// Waits for something to do.
    pub(super) fn next(&self, times: &LinkTimes) -> Work {
        let mut state = self.state();
        loop {
            if state.stopping {
                return Work::Stop;
            }
            let now = Instant::now();
            let wait = match state.connections.last().cloned() {
                Some(_) if now >= state.ping_at => {
                    state.ping_at = now + times.ping;
                    return Work::Ping(state.connections.clone());
                }
                Some(connection) => match state.queue.pop_front() {
                    Some(bytes) => {
                        state.queued_bytes -= bytes.len();
                        return Work::Write(connection, bytes);
                    }
                    None => Some(state.ping_at - now),
                },
                None if state.queue.is_empty() => None,
                None if now >= state.dial_at => return Work::Dial,
                None => Some(state.dial_at - now),
            };
            state = match wait {
                None => self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(wait) => {
                    self.changed
                        .wait_timeout(state, wait)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
    }

    /// An attempt to connect failed: what waits is dropped, and the next attempt must wait. Returns
    /// how many messages were dropped. Nothing is, where the host has dialed in meanwhile.
    pub(super) fn dial_failed(&self, times: &LinkTimes) -> usize {
        let mut state = self.state();
        state.dial_at = Instant::now() + state.pause;
        state.pause = (2 * state.pause).min(times.retry_most);
        state.drop_if_unconnected()
    }

    /// A new connection, from now on written to. One that the same side had made before is closed:
    /// its maker has given it up. False where the link ends.
    pub(super) fn connected(&self, connection: &Arc<Connection>, times: &LinkTimes) -> bool {
        let mut state = self.state();
        if state.stopping {
            return false;
        }
        state.connections.retain(|old| {
            let superseded = old.dialed == connection.dialed;
            if superseded {
                old.close("a newer connection took its place");
            }
            !superseded
        });
        state.connections.push(Arc::clone(connection));
        state.pause = times.retry;
        state.dial_at = Instant::now();
        state.ping_at = state.dial_at + times.ping;
        self.changed.notify_all();
        true
    }

    /// A connection is of no use any more. Returns how many messages were dropped with it: those that
    /// wait for a host that has to dial itself.
    pub(super) fn broken(&self, connection: &Arc<Connection>) -> usize {
        let mut state = self.state();
        state
            .connections
            .retain(|one| !Arc::ptr_eq(one, connection));
        self.changed.notify_all();
        if self.addresses.is_empty() {
            state.drop_if_unconnected()
        } else {
            0
        }
    }

    /// Closes all connections and ends the writer thread.
    pub(super) fn stop(&self) {
        let mut state = self.state();
        state.stopping = true;
        for connection in state.connections.drain(..) {
            connection.close("the link ends");
        }
        self.changed.notify_all();
    }
}

impl State {
    fn drop_if_unconnected(&mut self) -> usize {
        if !self.connections.is_empty() {
            return 0;
        }
        let dropped = self.queue.len();
        self.queue.clear();
        self.queued_bytes = 0;
        dropped
    }
}
