//! Bridges and TAPs on a host, as an administrator sets them up for virtual machines.

use crate::HarnessError;
use crate::host::Host;

impl Host {
    /// Makes a bridge that forwards at once: no spanning tree, no snooping.
    ///
    /// # Errors
    /// There is an interface of this name, or no right to.
    pub fn add_bridge(&self, name: &str) -> Result<(), HarnessError> {
        let quiet = [
            "forward_delay",
            "0",
            "stp_state",
            "0",
            "mcast_snooping",
            "0",
        ];
        let add = ["link", "add", name, "type", "bridge"];
        self.command("ip", &[&add[..], &quiet[..]].concat())?;
        self.command("ip", &["link", "set", name, "up"]).map(drop)
    }

    /// Makes a TAP that stays when no process has it open, as a port of a bridge.
    ///
    /// # Errors
    /// No bridge or TAP of these names can be had.
    pub fn add_tap(&self, name: &str, bridge: &str) -> Result<(), HarnessError> {
        self.command(
            "ip",
            &["tuntap", "add", "dev", name, "mode", "tap", "vnet_hdr"],
        )?;
        self.attach(name, bridge)
    }

    /// Makes an interface a port of a bridge, and brings it up.
    ///
    /// # Errors
    /// One of them is not there.
    pub fn attach(&self, interface: &str, bridge: &str) -> Result<(), HarnessError> {
        let arguments = ["link", "set", interface, "master", bridge, "up"];
        self.command("ip", &arguments).map(drop)
    }

    /// Keeps this host from sending anything over IPv6 by itself. Interfaces that it has already keep what
    /// they have.
    ///
    /// # Errors
    /// No right to.
    pub fn disable_ipv6(&self) -> Result<(), HarnessError> {
        self.run(|| {
            for which in ["all", "default"] {
                let path = format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6");
                match std::fs::write(path, "1") {
                    // A kernel without IPv6 sends nothing over it.
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                        return Err(error);
                    }
                    _ => {}
                }
            }
            Ok(())
        })
        .map_err(|source| HarnessError::System {
            what: "switching IPv6 off",
            source,
        })
    }
}
