//! TAP: the VM's link to the host's network.
#![allow(unsafe_code)] // TAP is set up by ioctls.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use devices::NetOffloads;
use thiserror::Error;

/// Bytes of the virtio-net header before every frame (`virtio_net_hdr_v1`).
pub const VNET_HEADER_LEN: usize = 12;
/// The longest frame with its header: 64 KiB of segments, an Ethernet header, a VLAN tag.
pub const MAX_FRAME_LEN: usize = VNET_HEADER_LEN + 65_535 + 18;

const DEVICE: &str = "/dev/net/tun";
/// `TUNSETIFF` etc. of linux/if_tun.h.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUN_F_CSUM: u32 = 1;
const TUN_F_TSO4: u32 = 2;
const TUN_F_TSO6: u32 = 4;
const TUN_F_TSO_ECN: u32 = 8;

/// Why there is no TAP.
#[derive(Debug, Error)]
pub enum TapError {
    /// The device cannot be opened.
    #[error("{DEVICE}: {0}: load the tun module and run with CAP_NET_ADMIN")]
    Device(io::Error),
    /// A name that the kernel does not take.
    #[error("{0:?} is no name for a TAP: 1 to 15 bytes, no slash or blank")]
    Name(String),
    /// Another process has it.
    #[error("TAP {0} is in use by another process: stop it or choose another name")]
    Busy(String),
    /// The kernel refuses.
    #[error("TAP {name}: {call}: {source}")]
    Call {
        /// The interface.
        name: String,
        /// What was asked.
        call: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// An open TAP.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
}

impl Tap {
    /// Opens the TAP `name`, and makes it where there is none. It comes up with its interface: the
    /// caller's network set-up (bridge, address) is not touched, but for bringing it up.
    ///
    /// # Errors
    /// The name, the rights, or another user of the interface.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let plain = |byte: u8| byte.is_ascii_graphic() && byte != b'/';
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || !name.bytes().all(plain) {
            return Err(TapError::Name(name.to_owned()));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC)
            .open(DEVICE)
            .map_err(TapError::Device)?;
        let tap = Self {
            file,
            name: name.to_owned(),
        };
        tap.attach()?;
        tap.set(
            "TUNSETVNETHDRSZ",
            TUNSETVNETHDRSZ,
            &(VNET_HEADER_LEN as libc::c_int),
        )?;
        tap.bring_up()?;
        Ok(tap)
    }

    fn error(&self, call: &'static str) -> TapError {
        let source = io::Error::last_os_error();
        match source.raw_os_error() {
            Some(libc::EBUSY) => TapError::Busy(self.name.clone()),
            _ => TapError::Call {
                name: self.name.clone(),
                call,
                source,
            },
        }
    }

    fn request(&self) -> libc::ifreq {
        // SAFETY: an all-zero ifreq is valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(self.name.bytes()) {
            *to = from.cast_signed();
        }
        request
    }

    fn attach(&self) -> Result<(), TapError> {
        let mut request = self.request();
        request.ifr_ifru.ifru_flags =
            (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        self.set("TUNSETIFF", TUNSETIFF, &request)
    }

    fn set<T>(&self, call: &'static str, number: libc::c_ulong, value: &T) -> Result<(), TapError> {
        // SAFETY: each of these ioctls reads a value of type T, which outlives the call.
        match unsafe { libc::ioctl(self.file.as_raw_fd(), number, std::ptr::from_ref(value)) } {
            -1 => Err(self.error(call)),
            _ => Ok(()),
        }
    }

    /// Tells the kernel what the guest's driver takes: checksums to be filled in and large segments.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_offloads(&self, offloads: NetOffloads) -> Result<(), TapError> {
        let flag = |on: bool, flag: u32| if on { flag } else { 0 };
        let flags = flag(offloads.checksum, TUN_F_CSUM)
            | flag(offloads.checksum && offloads.tso4, TUN_F_TSO4)
            | flag(offloads.checksum && offloads.tso6, TUN_F_TSO6)
            | flag(offloads.checksum && offloads.ecn, TUN_F_TSO_ECN);
        // SAFETY: this ioctl takes its argument by value.
        match unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                TUNSETOFFLOAD,
                libc::c_ulong::from(flags),
            )
        } {
            -1 => Err(self.error("TUNSETOFFLOAD")),
            _ => Ok(()),
        }
    }

    fn bring_up(&self) -> Result<(), TapError> {
        // SAFETY: socket takes no pointers.
        let socket =
            unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        if socket < 0 {
            return Err(self.error("socket"));
        }
        let mut request = self.request();
        // SAFETY: both ioctls take an ifreq with a name; the descriptor is ours and closed once.
        let done = unsafe {
            let got = libc::ioctl(socket, libc::SIOCGIFFLAGS, &raw mut request);
            request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short;
            let set = libc::ioctl(socket, libc::SIOCSIFFLAGS, &raw mut request);
            got == 0 && set == 0
        };
        let result = if done {
            Ok(())
        } else {
            Err(self.error("SIOCSIFFLAGS"))
        };
        // SAFETY: as above.
        unsafe { libc::close(socket) };
        result
    }

    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_the_kernel_does_not_take_are_refused() {
        for name in ["", "a/b", "a b", "sixteen-bytes-xx"] {
            assert!(
                matches!(Tap::open(name), Err(TapError::Name(_))),
                "{name:?}"
            );
        }
    }
}
