//! State and offloads of an interface, by ioctl: a cable is pulled in microseconds, not in the milliseconds
//! that a command takes.
#![allow(unsafe_code)] // ioctls take a pointer to a union, and one of them a pointer in it

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
    let mut value = Value {
        command: ETHTOOL_SGRO,
        data: on.into(),
    };
    let mut request = request_for(interface)?;
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // The request points to a value that the command takes, and both live until it returns.
    call(libc::SIOCETHTOOL, &mut request)
}

/// Brings an interface up or takes it down, on the calling thread's host.
pub(crate) fn set_up(interface: &str, up: bool) -> io::Result<()> {
    let mut request = request_for(interface)?;
    call(libc::SIOCGIFFLAGS, &mut request)?;
    let flag = libc::IFF_UP as libc::c_short;
    // SAFETY: the kernel has just filled in the flags, and any bits are valid flags.
    unsafe {
        if up {
            request.ifr_ifru.ifru_flags |= flag;
        } else {
            request.ifr_ifru.ifru_flags &= !flag;
        }
    }
    call(libc::SIOCSIFFLAGS, &mut request)
}

fn request_for(interface: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if interface.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from.cast_signed();
    }
    Ok(request)
}

fn call(command: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    let any = UdpSocket::bind(("127.0.0.1", 0))?;
    // SAFETY: the request names an interface, and its union holds what the command reads.
    let result = unsafe { libc::ioctl(any.as_raw_fd(), command, std::ptr::from_mut(request)) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
