//! Sockets of the link: every option is set before connect() or listen(), and inherited by accept().

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};

use super::config::LinkTimes;

/// BBR, where it is the system's default, paces bulk transfers to a fraction.
const CONGESTION: &[u8] = b"cubic";
const KEEPALIVE: Duration = Duration::from_secs(1);
const KEEPALIVE_PROBES: u32 = 3;
const BACKLOG: i32 = 64;
/// Unsent bytes that a bulk connection may hold in the kernel, so that it yields quickly.
const BULK_UNSENT_BYTES: u32 = 256 << 10;
/// CS1, "lower effort" on most networks, in the upper six bits of the traffic class (RFC 2474).
const BULK_TRAFFIC_CLASS: u32 = 8 << 2;
/// A receiver of state may be slow to make room, which the user time-out counts as unanswered.
const BULK_USER_TIMEOUT: Duration = Duration::from_secs(10);

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    Messages,
    Bulk,
}

fn socket(address: SocketAddr, times: &LinkTimes) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    if let Err(error) = socket.set_tcp_congestion(CONGESTION) {
        // It costs throughput, nothing else.
        tracing::warn!(%error, "congestion control cubic is not to be had: modprobe tcp_cubic");
    }
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_user_timeout(Some(times.user_timeout))?;
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(KEEPALIVE)
            .with_interval(KEEPALIVE)
            .with_retries(KEEPALIVE_PROBES),
    )?;
    Ok(socket)
}

/// Listens; an IPv6 wildcard takes IPv4 as well. There is one listener: a process that was killed keeps its
/// sockets until its requests to the disk have ended (the kernel waits for its io_uring before it closes
/// files), so that one that could listen knows that no write of an earlier process of this host is under way.
pub(super) fn listen(address: SocketAddr, times: &LinkTimes) -> io::Result<TcpListener> {
    let socket = socket(address, times)?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

pub(super) fn connect(
    address: SocketAddr,
    class: Class,
    times: &LinkTimes,
) -> io::Result<TcpStream> {
    let socket = socket(address, times)?;
    socket.connect_timeout(&address.into(), times.connect)?;
    let stream = TcpStream::from(socket);
    if class == Class::Bulk {
        yielding(&stream)?;
    }
    Ok(stream)
}

/// Makes a connection one for bulk data: an accepted one shows only in the handshake what it is for.
pub(super) fn yielding(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_notsent_lowat(BULK_UNSENT_BYTES)?;
    socket.set_tcp_user_timeout(Some(BULK_USER_TIMEOUT))?;
    if stream.local_addr()?.is_ipv6() {
        socket.set_tclass_v6(BULK_TRAFFIC_CLASS)
    } else {
        socket.set_tos_v4(BULK_TRAFFIC_CLASS)
    }
}

/// Takes the handshake's time limits off.
pub(super) fn hand_over(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_listener_is_refused() {
        let times = LinkTimes::default();
        let first = listen("127.0.0.1:0".parse().unwrap(), &times).unwrap();
        let second = listen(first.local_addr().unwrap(), &times);
        assert_eq!(second.unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn both_ends_have_the_options_on_ipv4_and_ipv6() {
        let times = LinkTimes::default();
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = listen(address.parse().unwrap(), &times) else {
                assert!(address.starts_with('['), "IPv4 is always there");
                println!("skipped: no IPv6 here");
                continue;
            };
            let to = listener.local_addr().unwrap();
            let dialed = connect(to, Class::Messages, &times).unwrap();
            let (accepted, _) = listener.accept().unwrap();
            for stream in [&dialed, &accepted] {
                let socket = SockRef::from(stream);
                assert!(socket.tcp_congestion().unwrap().starts_with(CONGESTION));
                assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
                let limit = socket.tcp_user_timeout().unwrap();
                assert_eq!(limit, Some(times.user_timeout));
            }
            yielding(&accepted).unwrap();
            let socket = SockRef::from(&accepted);
            let class = if to.is_ipv6() {
                socket.tclass_v6().unwrap()
            } else {
                socket.tos_v4().unwrap()
            };
            assert_eq!(class, BULK_TRAFFIC_CLASS);
            assert_eq!(socket.tcp_user_timeout().unwrap(), Some(BULK_USER_TIMEOUT));
        }
    }
}
