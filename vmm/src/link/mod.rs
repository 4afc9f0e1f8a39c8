//! The control stream between the VMMs of two hosts: what carries [`ft::PeerMessage`] outside the log,
//! and hands out connections for bulk data.
//!
//! ```text
//!  caller ── send ──► queue of the peer ──► its writer thread ── TCP ──► reader thread ── deliver
//!                                              │ dials where there is no connection
//!  stranger ──► acceptor ──► handshake thread ─┴► reader thread, or LinkEvent::Bulk
//! ```
//! What always holds:
//! - A message is delivered only from a host that proved the shared key on that very connection, under
//!   the name that it proved it with ([`handshake`]). Any holder of the key may call itself by any
//!   name: the key is what is trusted.
//! - A stranger is told nothing but the protocol's version, changes nothing, and occupies one of
//!   [`MAX_HANDSHAKES`] slots for at most the handshake's time limit. Before a host is authentic, no
//!   more than [`handshake::MAX_NOISE_LEN`] bytes of it are read at a time.
//! - Messages of one connection arrive in their order. Each may be lost when a connection breaks, or
//!   when its queue is full: the protocol sends again what matters.
//! - Each side sends on the newest connection and reads all: two hosts that dial each other at once
//!   lose nothing. There is at most one connection for each side that dialed.
//! - [`Link::send`] never waits for the network.
//!
//! What it does not do: it does not decide whether a host is alive, only whether a connection is; it
//! resolves no names of the DNS, which would be one more thing to lose with a host. Messages are
//! encrypted; bulk connections are authenticated when they are made and are plain TCP afterwards, so the
//! network that carries them must be private, like that of the log.

mod accept;
mod config;
mod connection;
mod dial;
mod handshake;
mod key;
mod peer;
mod record;
mod shared;
mod sockets;
#[cfg(test)]
mod tests;

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Instant;

use format::SessionId;
use ft::{HostId, PeerMessage};
use thiserror::Error;

#[cfg(test)]
pub(crate) use accept::MAX_HANDSHAKES;
pub use config::{LinkConfig, LinkTimes, MAX_PEERS};
pub use key::{Key, KeyError};
#[cfg(test)]
pub(crate) use peer::MAX_QUEUED_MESSAGES;
pub use shared::LinkCounts;

use handshake::{Hello, Purpose};
use shared::Shared;
use sockets::Class;

/// Why there is no link.
#[derive(Debug, Error)]
pub enum LinkError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// No thread.
    #[error("cannot start a thread: {0}")]
    Thread(#[source] io::Error),
    /// Too many hosts.
    #[error("{0} hosts, the limit is {MAX_PEERS}")]
    Peers(usize),
}

/// What happens on the link.
#[derive(Debug)]
pub enum LinkEvent {
    /// A message came.
    Message {
        /// The host that the connection authenticated.
        from: HostId,
        /// The message.
        message: PeerMessage,
    },
    /// A connection for bulk data was made by `from`. The stream blocks, has no time limits, and
    /// nothing has been read from it but the handshake. It is plain TCP.
    Bulk {
        /// The host that the connection authenticated.
        from: HostId,
        /// What `from` says that it is for; not yet checked against anything.
        session: SessionId,
        /// The connection.
        stream: TcpStream,
    },
    /// A connection is there. For logs.
    Connected {
        /// The other host.
        peer: HostId,
        /// Its address.
        address: SocketAddr,
        /// Whether this side made it.
        dialed: bool,
    },
    /// A connection is no more; nothing will come from it. For logs.
    Broken {
        /// The other host.
        peer: HostId,
        /// Its address.
        address: SocketAddr,
        /// Why.
        why: String,
    },
}

/// Where events go. Called from several threads, one at a time; whoever is slow here slows the
/// link. It must not drop the link.
pub type Deliver = Box<dyn Fn(LinkEvent) + Send>;

/// A running link. Dropping it closes all connections and waits for its threads, for as long as a
/// connection attempt under way may take.
#[derive(Debug)]
pub struct Link {
    shared: Arc<Shared>,
    listener: TcpListener,
    address: SocketAddr,
}

impl Link {
    /// Listens, and waits for work.
    ///
    /// # Errors
    /// The address is not to be had, or the configuration is out of bounds.
    pub fn start(config: LinkConfig, deliver: Deliver) -> Result<Self, LinkError> {
        if config.peers.len() > MAX_PEERS {
            return Err(LinkError::Peers(config.peers.len()));
        }
        let at = config.listen;
        let failed = |source| LinkError::Listen {
            address: at,
            source,
        };
        let listener = sockets::listen(at, &config.times).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let shared = Arc::new(Shared::new(config, deliver));
        let theirs = Arc::clone(&shared);
        let socket = listener.try_clone().map_err(failed)?;
        shared
            .spawn("link-accept", move || accept::serve(&theirs, &socket))
            .map_err(LinkError::Thread)?;
        Ok(Self {
            shared,
            listener,
            address,
        })
    }

    /// The address that is listened on.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Queues a message for `to`; connects where there is no connection and an address is known.
    /// Returns whether it was queued: not for a host that is unknown, and not while
    /// [`MAX_QUEUED_MESSAGES`] or [`MAX_QUEUED_BYTES`] wait. A queued message may be lost as well.
    pub fn send(&self, to: &HostId, message: &PeerMessage) -> bool {
        shared::send(&self.shared, *to, message)
    }

    /// Connects to `to` for bulk data of `session`. Blocks, for each of the host's addresses at most
    /// as long as the connection and the handshake may take. The stream that comes back blocks and
    /// has no time limits; it is plain TCP, and yields to the log where the network honours DSCP.
    /// The other side may still close it at once.
    ///
    /// # Errors
    /// `NotFound` for a host without a known address; else why the last address failed.
    pub fn open_bulk(&self, to: &HostId, session: SessionId) -> io::Result<TcpStream> {
        let shared = &self.shared;
        let hello = Hello::new(shared.me, *to, Purpose::Bulk(session));
        let dialed = dial::any(shared, shared.addresses(*to), Class::Bulk, &hello)?;
        sockets::hand_over(&dialed.stream)?;
        Ok(dialed.stream)
    }

    /// What was counted since the start.
    #[must_use]
    pub fn counts(&self) -> LinkCounts {
        self.shared.counts()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Wakes accept().
        let _ = socket2::SockRef::from(&self.listener).shutdown(Shutdown::Both);
        self.shared.stop();
    }
}

/// A time limit as an instant.
fn until(limit: std::time::Duration) -> Instant {
    Instant::now() + limit
}
