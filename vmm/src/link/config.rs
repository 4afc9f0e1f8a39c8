//! What a link is told when it starts.

use std::net::SocketAddr;
use std::time::Duration;

use ft::HostId;

use super::key::Key;

/// The most hosts that a link knows, those that dialed included.
pub const MAX_PEERS: usize = 64;

/// The configuration of a link.
#[derive(Debug, Clone)]
pub struct LinkConfig {
    /// The name of this host.
    pub me: HostId,
    /// Where to listen; port 0: any.
    pub listen: SocketAddr,
    /// The shared key.
    pub key: Key,
    /// Hosts that can be dialed, each with its addresses in the order of preference. Others may dial
    /// in, and are answered on their own connections.
    pub peers: Vec<(HostId, Vec<SocketAddr>)>,
    /// Time limits.
    pub times: LinkTimes,
}

/// Time limits of a link. None matters for safety.
#[derive(Debug, Clone, Copy)]
pub struct LinkTimes {
    /// How long making a TCP connection may take.
    pub connect: Duration,
    /// How long a handshake may take.
    pub handshake: Duration,
    /// How often an empty record is sent.
    pub ping: Duration,
    /// A connection on which nothing came for this long is broken.
    pub silence: Duration,
    /// Unanswered data for this long ends a connection (TCP_USER_TIMEOUT).
    pub user_timeout: Duration,
    /// First pause after a failed attempt to connect; doubles.
    pub retry: Duration,
    /// The longest of these pauses.
    pub retry_most: Duration,
}

impl Default for LinkTimes {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(1),
            handshake: Duration::from_secs(2),
            ping: Duration::from_secs(1),
            silence: Duration::from_secs(4),
            user_timeout: Duration::from_secs(2),
            retry: Duration::from_millis(10),
            retry_most: Duration::from_millis(320),
        }
    }
}
