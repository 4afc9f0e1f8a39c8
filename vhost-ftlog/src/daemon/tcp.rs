//! Sockets as a deployment wants them: every option is set before connect() or listen().

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};

/// What a connection is for: state transfer yields to the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Log frames and acknowledgements.
    Log,
    /// Bulk streams.
    Bulk,
}

/// Options of all sockets.
#[derive(Debug, Clone)]
pub struct SocketOptions {
    /// Network interface that sockets are bound to.
    pub interface: Option<String>,
    /// Congestion control; empty: the system's. Default cubic: BBR's pacing costs bulk throughput.
    pub congestion: String,
    /// DSCP of the log's connection, 0 to 63.
    pub dscp: u8,
    /// DSCP of bulk streams.
    pub bulk_dscp: u8,
    /// Unanswered data for this long ends a connection.
    pub user_timeout: Duration,
    /// Silence before the first keep-alive probe, and between probes.
    pub keepalive: Duration,
}

impl Default for SocketOptions {
    fn default() -> Self {
        Self {
            interface: None,
            congestion: "cubic".to_owned(),
            dscp: 0,
            bulk_dscp: 8, // CS1, "lower effort" on most networks
            user_timeout: Duration::from_secs(2),
            keepalive: Duration::from_secs(1),
        }
    }
}

const KEEPALIVE_PROBES: u32 = 3;
/// Unsent bytes that a bulk stream may hold in the kernel, so that it yields quickly.
const BULK_UNSENT: u32 = 256 << 10;

impl SocketOptions {
    fn socket(&self, address: SocketAddr, class: Class) -> io::Result<Socket> {
        let domain = Domain::for_address(address);
        let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
        if let Some(interface) = &self.interface {
            socket.bind_device(Some(interface.as_bytes()))?;
        }
        if !self.congestion.is_empty() {
            socket
                .set_tcp_congestion(self.congestion.as_bytes())
                .map_err(|error| {
                    named(&format!("congestion control {}", self.congestion), error)
                })?;
        }
        socket.set_tcp_nodelay(true)?;
        socket.set_tcp_user_timeout(Some(self.user_timeout))?;
        let keepalive = TcpKeepalive::new()
            .with_time(self.keepalive)
            .with_interval(self.keepalive)
            .with_retries(KEEPALIVE_PROBES);
        socket.set_tcp_keepalive(&keepalive)?;
        self.set_class(&SockRef::from(&socket), address.is_ipv6(), class)?;
        Ok(socket)
    }

    fn set_class(&self, socket: &SockRef<'_>, ipv6: bool, class: Class) -> io::Result<()> {
        let dscp = match class {
            Class::Log => self.dscp,
            Class::Bulk => {
                socket.set_tcp_notsent_lowat(BULK_UNSENT)?;
                self.bulk_dscp
            }
        };
        let tos = u32::from(dscp) << 2;
        if ipv6 {
            socket.set_tclass_v6(tos)
        } else {
            socket.set_tos_v4(tos)
        }
    }

    /// Makes an accepted socket one of its class: it is known only after the handshake.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn classify(&self, socket: &TcpStream, class: Class) -> io::Result<()> {
        let ipv6 = socket.local_addr()?.is_ipv6();
        self.set_class(&SockRef::from(socket), ipv6, class)
    }

    /// Connects within `limit`.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn connect(
        &self,
        address: SocketAddr,
        class: Class,
        limit: Duration,
    ) -> io::Result<TcpStream> {
        let socket = self.socket(address, class)?;
        socket.connect_timeout(&address.into(), limit)?;
        Ok(socket.into())
    }

    /// Listens. Accepted sockets inherit the options.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn listen(&self, address: SocketAddr) -> io::Result<TcpListener> {
        let socket = self.socket(address, Class::Log)?;
        socket.set_reuse_address(true)?;
        if address.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        socket
            .bind(&address.into())
            .map_err(|error| named(&format!("bind {address}"), error))?;
        socket.listen(16)?;
        Ok(socket.into())
    }
}

fn named(what: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_have_the_options_on_ipv4_and_ipv6() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let options = SocketOptions {
                dscp: 46,
                ..SocketOptions::default()
            };
            let Ok(listener) = options.listen(address.parse().unwrap()) else {
                assert!(address.starts_with('['), "IPv4 is always there");
                continue;
            };
            let to = listener.local_addr().unwrap();
            let dialed = options
                .connect(to, Class::Log, Duration::from_secs(1))
                .unwrap();
            let (accepted, _) = listener.accept().unwrap();
            for socket in [&dialed, &accepted] {
                let socket = SockRef::from(socket);
                assert!(socket.tcp_congestion().unwrap().starts_with(b"cubic"));
                assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
                assert_eq!(
                    socket.tcp_user_timeout().unwrap(),
                    Some(Duration::from_secs(2))
                );
            }
            options.classify(&accepted, Class::Bulk).unwrap();
            let bulk = SockRef::from(&accepted);
            let tos = match to {
                SocketAddr::V4(_) => bulk.tos_v4().unwrap(),
                SocketAddr::V6(_) => bulk.tclass_v6().unwrap(),
            };
            assert_eq!(tos, 8 << 2);
        }
    }

    #[test]
    fn an_unknown_congestion_control_is_named() {
        let options = SocketOptions {
            congestion: "nonesuch".to_owned(),
            ..SocketOptions::default()
        };
        let error = options.listen("127.0.0.1:0".parse().unwrap()).unwrap_err();
        assert!(error.to_string().contains("nonesuch"), "{error}");
    }
}
