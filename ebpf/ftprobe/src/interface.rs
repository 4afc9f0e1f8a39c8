//! What kind of network interface this is.
#![allow(unsafe_code)] // the ethtool ioctl takes a pointer to a pointer; getifaddrs makes a list of them

use std::ffi::CStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
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

/// Name of the interface that has this address; `None` if none has.
#[must_use]
pub fn with_address(address: IpAddr) -> Option<String> {
    let mut first = std::ptr::null_mut();
    // SAFETY: `first` is a valid place for the list's head.
    if unsafe { libc::getifaddrs(&raw mut first) } != 0 {
        return None;
    }
    let mut found = None;
    let mut next = first;
    while !next.is_null() && found.is_none() {
        // SAFETY: an element of the list, which lives until it is freed below.
        let entry = unsafe { &*next };
        if address_of(entry) == Some(address) {
            // SAFETY: every element has a name that ends with zero.
            let name = unsafe { CStr::from_ptr(entry.ifa_name) };
            found = name.to_str().ok().map(str::to_owned);
        }
        next = entry.ifa_next;
    }
    // SAFETY: the list is ours, freed once, and nothing borrows from it any more.
    unsafe { libc::freeifaddrs(first) };
    found
}

fn address_of(entry: &libc::ifaddrs) -> Option<IpAddr> {
    if entry.ifa_addr.is_null() {
        return None;
    }
    // SAFETY: not null, and as long as its family says, which is looked at first.
    unsafe {
        match i32::from((*entry.ifa_addr).sa_family) {
            libc::AF_INET => {
                let address = entry.ifa_addr.cast::<libc::sockaddr_in>();
                let address = u32::from_be((*address).sin_addr.s_addr);
                Some(Ipv4Addr::from(address).into())
            }
            libc::AF_INET6 => {
                let address = entry.ifa_addr.cast::<libc::sockaddr_in6>();
                Some(Ipv6Addr::from((*address).sin6_addr.s6_addr).into())
            }
            _ => None,
        }
    }
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
        assert_eq!(
            with_address(Ipv4Addr::LOCALHOST.into()).as_deref(),
            Some("lo")
        );
        assert_eq!(with_address("192.0.2.99".parse().unwrap()), None);
        assert_ne!(driver("lo").as_deref(), Some("veth"));
    }
}
