//! The UDP socket of probers and userspace responders, with the kernel's arrival times.
//!
//! Times from the kernel are CLOCK_REALTIME; they are carried over to CLOCK_MONOTONIC by reading both
//! clocks after the packet. A step of the wall clock in between would misplace an arrival, so one that
//! lies in the future, or that has no stamp, counts as arriving now. The kernel begins to stamp a
//! moment after the first socket has asked for it; until then the time of reading is given.
#![allow(unsafe_code)] // recvmsg with a time stamp has no safe wrapper

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;

use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

use crate::clock::{monotonic_ns, realtime_ns};

/// Differentiated services: expedited forwarding (RFC 3246), so that full queues delay heartbeats least.
const DSCP_EXPEDITED: u32 = 46 << 2;

/// Packets that wait for a reader that does not run: 1 MiB is more than a thousand.
const RECEIVE_BUFFER_BYTES: usize = 1 << 20;
/// Both clocks are read within this time, ns, or again.
const CLOCK_SLACK_NS: u64 = 10_000;
/// How often at most.
const CLOCK_TRIES: usize = 5;

/// A packet taken from the socket.
#[derive(Debug, Clone, Copy)]
pub struct Arrival {
    /// Bytes in the buffer; longer packets are cut, which makes them malformed.
    pub bytes: usize,
    /// Where it came from.
    pub from: SocketAddr,
    /// When the kernel took it from the interface, ns of CLOCK_MONOTONIC.
    pub arrived_ns: u64,
}

/// See the module.
#[derive(Debug)]
pub struct HeartbeatSocket {
    socket: UdpSocket,
}

impl HeartbeatSocket {
    /// Binds to an address, and to an interface if one is named.
    ///
    /// # Errors
    /// Whatever the system says: no such address or interface, the port is taken.
    pub fn bind(local: SocketAddr, interface: Option<&str>) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(local), Type::DGRAM, Some(Protocol::UDP))?;
        if let Some(interface) = interface {
            socket.bind_device(Some(interface.as_bytes()))?;
        }
        let marked = match local {
            SocketAddr::V4(_) => socket.set_tos_v4(DSCP_EXPEDITED),
            SocketAddr::V6(_) => socket.set_tclass_v6(DSCP_EXPEDITED),
        };
        if let Err(error) = marked {
            tracing::debug!(%error, "heartbeats go without priority");
        }
        socket.set_recv_buffer_size(RECEIVE_BUFFER_BYTES)?;
        enable_time_stamps(&socket)?;
        socket.bind(&SockAddr::from(local))?;
        Ok(Self {
            socket: socket.into(),
        })
    }

    /// Where it is bound.
    ///
    /// # Errors
    /// Whatever the system says.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// The socket itself, to send with and to set up.
    pub const fn socket(&self) -> &UdpSocket {
        &self.socket
    }

    /// Takes one packet; `None` if there is none (a non-blocking socket, or its time-out), or if an
    /// ICMP error was waiting instead.
    ///
    /// # Errors
    /// Whatever else the system says about the socket.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<Arrival>> {
        let mut control = MaybeUninit::<Control>::zeroed();
        let mut data = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        // SAFETY: all zero is a valid msghdr.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &raw mut data;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of::<Control>();
        let receive = |storage: *mut SockAddrStorage, length: *mut libc::socklen_t| {
            message.msg_name = storage.cast();
            // SAFETY: `length` holds the size of `storage`; every pointer in `message` names a live
            // buffer of the length beside it.
            let got = unsafe {
                message.msg_namelen = *length;
                libc::recvmsg(self.socket.as_raw_fd(), &raw mut message, 0)
            };
            let bytes = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
            // SAFETY: as above; the kernel has written msg_namelen bytes of address.
            unsafe { *length = message.msg_namelen };
            Ok(bytes)
        };
        // SAFETY: on success the closure has filled in an address and its length.
        let (bytes, from) = match unsafe { SockAddr::try_init(receive) } {
            Err(error) if transient(&error) => return Ok(None),
            other => other?,
        };
        let arrived_ns = to_monotonic(time_stamp(&message));
        Ok(from.as_socket().map(|from| Arrival {
            bytes,
            from,
            arrived_ns,
        }))
    }
}

/// Room for control messages, aligned as they need.
type Control = [libc::cmsghdr; 8];

fn enable_time_stamps(socket: &Socket) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the option takes an int, which lives through the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_TIMESTAMPNS,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The kernel's stamp, ns of CLOCK_REALTIME.
fn time_stamp(message: &libc::msghdr) -> Option<u64> {
    // SAFETY: recvmsg has set msg_controllen to what it wrote; the macros stay within that, and each
    // header found is followed by its data, here a timespec.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET
                && (*header).cmsg_type == libc::SCM_TIMESTAMPNS
            {
                let time = libc::CMSG_DATA(header)
                    .cast::<libc::timespec>()
                    .read_unaligned();
                let seconds = u64::try_from(time.tv_sec).ok()?;
                return Some(seconds * 1_000_000_000 + u64::try_from(time.tv_nsec).ok()?);
            }
            header = libc::CMSG_NXTHDR(message, header);
        }
    }
    None
}

fn to_monotonic(stamp: Option<u64>) -> u64 {
    let (monotonic, realtime) = both_clocks();
    let age = stamp.and_then(|stamp| realtime.checked_sub(stamp));
    monotonic.saturating_sub(age.unwrap_or(0))
}

/// Both clocks at one moment: read again if the thread was interrupted in between.
fn both_clocks() -> (u64, u64) {
    let mut before = monotonic_ns();
    for _ in 0..CLOCK_TRIES {
        let realtime = realtime_ns();
        let after = monotonic_ns();
        if after - before < CLOCK_SLACK_NS {
            return (before, realtime);
        }
        before = after;
    }
    (before, realtime_ns())
}

/// Errors that say nothing about the socket itself. A refused connection is an ICMP answer to an
/// earlier request: the peer has no responder there (yet).
pub fn transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock
            | io::ErrorKind::TimedOut
            | io::ErrorKind::Interrupted
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::NetworkDown
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (HeartbeatSocket, HeartbeatSocket) {
        let bind = || HeartbeatSocket::bind("127.0.0.1:0".parse().unwrap(), None).unwrap();
        (bind(), bind())
    }

    /// Sends a packet, reads it 2 ms later; returns when it came according to its stamp, relative to
    /// the time after sending.
    fn stamped_after_sending_ns(a: &HeartbeatSocket, b: &HeartbeatSocket) -> i64 {
        a.socket()
            .send_to(b"hello", b.local_addr().unwrap())
            .unwrap();
        // Loopback has delivered it within the call. The time that passes now must not show.
        let after = monotonic_ns();
        while monotonic_ns() < after + 2_000_000 {
            std::hint::spin_loop();
        }
        let arrival = b.receive(&mut [0; 16]).unwrap().unwrap();
        assert_eq!((arrival.bytes, arrival.from), (5, a.local_addr().unwrap()));
        arrival.arrived_ns.cast_signed() - after.cast_signed()
    }

    #[test]
    fn arrivals_carry_the_kernels_time_not_the_readers() {
        let (a, b) = pair();
        // The kernel begins to stamp some time after the first socket has asked for it.
        for _ in 0..1_000 {
            if stamped_after_sending_ns(&a, &b) < 500_000 {
                return;
            }
        }
        panic!("the kernel never stamps");
    }

    #[test]
    fn an_empty_queue_is_no_error() {
        let (a, _) = pair();
        a.socket().set_nonblocking(true).unwrap();
        assert!(a.receive(&mut [0; 16]).unwrap().is_none());
    }
}
