//! Offloads of an interface, by the ethtool ioctl.
#![allow(unsafe_code)] // the ioctl takes a pointer to a pointer

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

/// `ETHTOOL_SGRO` of linux/ethtool.h.
const ETHTOOL_SGRO: u32 = 0x2c;

#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// Turns generic receive offload of an interface on or off, on the calling thread's host.
pub(crate) fn set_gro(interface: &str, on: bool) -> io::Result<()> {
    let any = UdpSocket::bind(("127.0.0.1", 0))?;
    let mut value = Value {
        command: ETHTOOL_SGRO,
        data: on.into(),
    };
    // SAFETY: all zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if interface.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the request names an interface and points to a value that the command takes.
    let result = unsafe { libc::ioctl(any.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
