//! TAP devices for guests, and TCP for the logging channel.

use std::fs::OpenOptions;
use std::io;

use rustix::net::{self, AddressFamily, SocketType, sockopt};

use super::host::{Capability, Host};
use super::report::Finding;
use super::sys;

const AREA: &str = "Network";
const TUN: &str = "/dev/net/tun";
/// The congestion control that does not pace bulk transfers.
const CUBIC: &str = "cubic";

pub(super) fn check(host: &Host) -> Vec<Finding> {
    vec![tap(host), congestion_control(host, try_cubic())]
}

fn tap(host: &Host) -> Finding {
    const NAME: &str = "TAP";
    let no_network = "guests run, but without a network";
    let file = match OpenOptions::new()
        .read(true)
        .write(true)
        .open(host.path(TUN))
    {
        Ok(file) => file,
        Err(error) => {
            let remedy = if error.kind() == io::ErrorKind::NotFound {
                "modprobe tun; in a container, pass /dev/net/tun in"
            } else {
                "grant access to /dev/net/tun"
            };
            return Finding::warn(AREA, NAME, format!("{TUN}: {error}"), no_network, remedy);
        }
    };
    if let Err(error) = sys::tap_has_virtio_header(&file) {
        let finding = format!("{TUN}: {error}");
        return Finding::warn(
            AREA,
            NAME,
            finding,
            no_network,
            "use the kernel's own tun driver",
        );
    }
    if host.has(Capability::NetAdmin) {
        return Finding::ok(AREA, NAME, "can be created", "guests can have a network");
    }
    Finding::warn(
        AREA,
        NAME,
        "cannot be created (no CAP_NET_ADMIN)",
        "guests use TAP devices that somebody else has created for this user",
        "ip tuntap add dev NAME mode tap user USER, or grant CAP_NET_ADMIN",
    )
}

fn try_cubic() -> io::Result<()> {
    let socket = net::socket(AddressFamily::INET, SocketType::STREAM, None)?;
    Ok(sockopt::set_tcp_congestion(&socket, CUBIC)?)
}

fn congestion_control(host: &Host, cubic: io::Result<()>) -> Finding {
    const NAME: &str = "congestion control";
    let default = host
        .read("/proc/sys/net/ipv4/tcp_congestion_control")
        .unwrap_or_else(|| "unknown".into());
    match cubic {
        Ok(()) => Finding::ok(
            AREA,
            NAME,
            format!("cubic can be chosen (default: {default})"),
            "the channel sets it for its own connections",
        ),
        Err(error) => Finding::warn(
            AREA,
            NAME,
            format!("cubic cannot be chosen ({error}); default: {default}"),
            "a default that paces, such as bbr, costs most of the channel's throughput",
            "modprobe tcp_cubic; add cubic to net.ipv4.tcp_allowed_congestion_control",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::host::tests::host_of;
    use super::super::report::Status;
    use super::*;

    #[test]
    fn lacking_tun_device_is_a_warning_with_a_remedy() {
        let (_dir, host) = host_of(&[]);
        let finding = tap(&host);
        assert_eq!(finding.status, Status::Warn);
        assert!(
            finding
                .remedy
                .is_some_and(|remedy| remedy.contains("modprobe tun"))
        );
    }

    #[test]
    fn file_that_is_no_tun_device_is_refused() {
        let (_dir, host) = host_of(&[(TUN, ""), ("/proc/self/status", "CapEff:\tffffffff\n")]);
        assert_eq!(tap(&host).status, Status::Warn);
    }

    #[test]
    fn default_congestion_control_is_named() {
        let (_dir, host) = host_of(&[("/proc/sys/net/ipv4/tcp_congestion_control", "bbr\n")]);
        let good = congestion_control(&host, Ok(()));
        assert!(good.finding.contains("bbr") && good.status == Status::Ok);
        let bad = congestion_control(&host, Err(io::Error::from_raw_os_error(libc::ENOENT)));
        assert_eq!(bad.status, Status::Warn);
    }
}
