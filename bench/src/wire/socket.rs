//! A packet socket (packet(7)) that sees every frame that comes in at any interface of its host, in one
//! order, with the kernel's time of each.
#![allow(unsafe_code)] // packet sockets have no safe wrapper: addresses and control messages are raw

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::monotonic::Moment;

/// Room for the largest frame that segmentation offload makes.
const LARGEST_FRAME: usize = 128 << 10;
/// Frames that may wait to be looked at, in bytes.
const BUFFER_BYTES: libc::c_int = 64 << 20;
/// How long a look waits for a frame.
const WAIT: libc::timeval = libc::timeval {
    tv_sec: 0,
    tv_usec: 50_000,
};

/// See the module.
pub(super) struct PacketSocket {
    socket: OwnedFd,
    buffer: Vec<u8>,
    /// Nanoseconds from CLOCK_MONOTONIC to CLOCK_REALTIME, in which the kernel stamps frames.
    offset: i128,
}

/// A frame that came in.
pub(super) struct Packet<'a> {
    /// Index of the interface.
    pub(super) interface: u32,
    pub(super) at: Moment,
    pub(super) bytes: &'a [u8],
}

#[repr(C, align(8))]
struct Control([u8; 64]);

impl PacketSocket {
    /// Opens one on the calling thread's host.
    pub(super) fn open() -> io::Result<Self> {
        let protocol = libc::c_int::from((libc::ETH_P_ALL as u16).to_be());
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: takes no pointers.
        let fd = unsafe { libc::socket(libc::AF_PACKET, kind, protocol) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let this = Self {
            socket,
            buffer: vec![0; LARGEST_FRAME],
            offset: realtime_offset(),
        };
        let on: libc::c_int = 1;
        this.set(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &BUFFER_BYTES)?;
        this.set(libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, &on)?;
        this.set(libc::SOL_SOCKET, libc::SO_RCVTIMEO, &WAIT)?;
        Ok(this)
    }

    fn set<T>(&self, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
        let length = size_of::<T>() as libc::socklen_t;
        let value = std::ptr::from_ref(value).cast();
        // SAFETY: the value is as long as is said, and read only during the call.
        let result =
            unsafe { libc::setsockopt(self.socket.as_raw_fd(), level, option, value, length) };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// The next frame that came in; nothing, if none came for a while. Frames that go out are left out.
    pub(super) fn receive(&mut self) -> io::Result<Option<Packet<'_>>> {
        loop {
            // SAFETY: all zero is a valid address of any kind, and a valid empty message.
            let (mut from, mut message): (libc::sockaddr_ll, libc::msghdr) =
                unsafe { (zeroed(), zeroed()) };
            let mut control = Control([0; 64]);
            let mut part = libc::iovec {
                iov_base: self.buffer.as_mut_ptr().cast(),
                iov_len: self.buffer.len(),
            };
            message.msg_name = (&raw mut from).cast();
            message.msg_namelen = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            message.msg_iov = &raw mut part;
            message.msg_iovlen = 1;
            message.msg_control = control.0.as_mut_ptr().cast();
            message.msg_controllen = control.0.len();
            // SAFETY: every pointer in the message is to memory of ours as long as is said.
            let got = unsafe { libc::recvmsg(self.socket.as_raw_fd(), &raw mut message, 0) };
            let Ok(length) = usize::try_from(got) else {
                let error = io::Error::last_os_error();
                return match error.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                    _ => Err(error),
                };
            };
            if from.sll_pkttype == libc::PACKET_OUTGOING {
                continue;
            }
            let at = self.time_of(&message);
            return Ok(Some(Packet {
                interface: from.sll_ifindex.cast_unsigned(),
                at,
                bytes: &self.buffer[..length],
            }));
        }
    }

    fn time_of(&self, message: &libc::msghdr) -> Moment {
        // SAFETY: the kernel has filled in the message; the control buffer lives and is aligned.
        let stamp = unsafe {
            let header = libc::CMSG_FIRSTHDR(message);
            let is_stamp = !header.is_null()
                && (*header).cmsg_level == libc::SOL_SOCKET
                && (*header).cmsg_type == libc::SCM_TIMESTAMPNS;
            is_stamp.then(|| {
                libc::CMSG_DATA(header)
                    .cast::<libc::timespec>()
                    .read_unaligned()
            })
        };
        let Some(stamp) = stamp else {
            return Moment::now();
        };
        let realtime = i128::from(stamp.tv_sec) * 1_000_000_000 + i128::from(stamp.tv_nsec);
        Moment(u64::try_from(realtime - self.offset).unwrap_or(0))
    }

    /// How many frames found no room and were not seen.
    pub(super) fn missed(&self) -> io::Result<u64> {
        // SAFETY: all zero is a valid value.
        let mut said: libc::tpacket_stats = unsafe { zeroed() };
        let mut length = size_of::<libc::tpacket_stats>() as libc::socklen_t;
        // SAFETY: the value is as long as is said.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut said).cast(),
                &raw mut length,
            )
        };
        if result == 0 {
            Ok(said.tp_drops.into())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

/// Index of an interface on the calling thread's host.
pub(super) fn index_of(interface: &str) -> io::Result<u32> {
    let name = std::ffi::CString::new(interface)?;
    // SAFETY: the name ends with a zero and is read only during the call.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => Ok(index),
    }
}

fn realtime_offset() -> i128 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let realtime = now.map_or(0, |t| i128::try_from(t.as_nanos()).unwrap_or(0));
    realtime - i128::from(Moment::now().0)
}
