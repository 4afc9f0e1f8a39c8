//! What kind of network interface this is.
#![allow(unsafe_code)] // the ethtool ioctl takes a pointer to a pointer

use std::net::UdpSocket;
use std::os::fd::AsRawFd;

/// `ETHTOOL_GDRVINFO` of linux/ethtool.h.
const ETHTOOL_GDRVINFO: u32 = 3;
/// Bytes of `struct ethtool_drvinfo`, and where the driver's name is in it.
const DRVINFO_BYTES: usize = 196;
const DRIVER: std::ops::Range<usize> = 4..36;

/// Whether there is an interface of this name.
pub(crate) fn exists(name: &str) -> bool {
    any_socket().is_some_and(|any| rustix::net::netdevice::name_to_index(any, name).is_ok())
}

/// Name of the interface's driver, such as `veth`; `None` if it does not say.
pub(crate) fn driver(name: &str) -> Option<String> {
    let mut info = [0_u32; DRVINFO_BYTES / size_of::<u32>()];
    info[0] = ETHTOOL_GDRVINFO;
    // SAFETY: all zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return None;
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = info.as_mut_ptr().cast();
    let any = any_socket()?;
    // SAFETY: the request names an interface and points to a buffer as large as the command fills.
    let result = unsafe { libc::ioctl(any.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
    if result != 0 {
        return None;
    }
    let bytes: Vec<u8> = info.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let text = bytes[DRIVER].split(|b| *b == 0).next()?;
    String::from_utf8(text.to_vec()).ok()
}

fn any_socket() -> Option<UdpSocket> {
    UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_exists_and_has_no_driver_of_its_own() {
        assert!(exists("lo"));
        assert!(!exists("nowhere0"));
        assert_eq!(driver("nowhere0"), None);
        assert_ne!(driver("lo").as_deref(), Some("veth"));
    }
}
