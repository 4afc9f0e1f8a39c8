//! A switch: a bridge in a network namespace of its own, and the cables from it to hosts.
//!
//! It learns addresses as a real one does, so that a machine that moves from one host to another is found
//! again only if it is announced. It stands on a host of its own kind, on which its traffic can be watched.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::host::Host;
use crate::interface::{set_gro, set_up};
use crate::{HarnessError, wait_until};

/// Name of the bridge on its host.
const BRIDGE: &str = "switch";

/// See the module.
#[derive(Debug)]
pub struct Switch {
    host: Host,
    ports: AtomicU32,
}

impl Switch {
    /// A switch with nothing plugged in. It speaks no protocol of its own.
    ///
    /// # Errors
    /// No right to make network namespaces or bridges.
    pub fn new() -> Result<Self, HarnessError> {
        let host = Host::new()?;
        host.disable_ipv6()?;
        host.add_bridge(BRIDGE)?;
        Ok(Self {
            host,
            ports: AtomicU32::new(0),
        })
    }

    /// The host that it stands on: its traffic can be watched there.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Plugs a host in: it gets an interface of this name.
    ///
    /// # Errors
    /// The host has an interface of this name, or no right to.
    pub fn plug(&self, host: &Host, interface: &str) -> Result<Port, HarnessError> {
        let number = self.ports.fetch_add(1, Ordering::Relaxed);
        let port = Port {
            switch: self.host.clone(),
            host: host.clone(),
            at_switch: format!("port{number}"),
            at_host: interface.to_owned(),
        };
        let (outer, inner) = (port.at_switch.as_str(), port.at_host.as_str());
        let namespace = host.namespace_path();
        let peer = ["peer", "name", inner, "netns", &namespace];
        let pair = ["link", "add", outer, "type", "veth"];
        self.host.command("ip", &[&pair[..], &peer[..]].concat())?;
        self.host
            .command("ip", &["link", "set", outer, "master", BRIDGE, "up"])?;
        host.command("ip", &["link", "set", inner, "up"])?;
        wait_until("the port to come up", || port.is_up())?;
        Ok(port)
    }
}

/// A cable from a switch to a host. It goes with them.
#[derive(Debug)]
pub struct Port {
    switch: Host,
    host: Host,
    at_switch: String,
    at_host: String,
}

impl Port {
    /// The interface on the host.
    pub fn at_host(&self) -> &str {
        &self.at_host
    }

    /// The interface on the switch.
    pub fn at_switch(&self) -> &str {
        &self.at_switch
    }

    /// Gives the host's interface an address in a /24.
    ///
    /// # Errors
    /// It has that address, or is gone.
    pub fn assign(&self, address: Ipv4Addr) -> Result<(), HarnessError> {
        let address = format!("{address}/24");
        let arguments = ["addr", "add", &address, "dev", &self.at_host];
        self.host.command("ip", &arguments).map(drop)
    }

    /// Turns generic receive offload on at both ends: without it, or an XDP program, an end cannot
    /// receive what an XDP program on the other end sends back.
    ///
    /// # Errors
    /// An end is gone.
    pub fn enable_gro(&self) -> Result<(), HarnessError> {
        let set = |host: &Host, interface: &str| {
            host.run(|| set_gro(interface, true))
                .map_err(failed("switching GRO on"))
        };
        set(&self.switch, &self.at_switch)?;
        set(&self.host, &self.at_host)
    }

    /// Pulls the cable: nothing passes from now on, and both ends see it. Takes microseconds.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn cut(&self) -> Result<(), HarnessError> {
        self.set(false)
    }

    /// Plugs it in again.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn mend(&self) -> Result<(), HarnessError> {
        self.set(true)?;
        wait_until("the port to come up", || self.is_up())
    }

    /// Has the switch pass nothing between this host and others that are set apart, or pass all again.
    /// What is on the way to any other host passes.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn set_apart(&self, apart: bool) -> Result<(), HarnessError> {
        let apart = if apart { "on" } else { "off" };
        let arguments = [
            "link",
            "set",
            &self.at_switch,
            "type",
            "bridge_slave",
            "isolated",
            apart,
        ];
        self.switch.command("ip", &arguments).map(drop)
    }

    fn set(&self, up: bool) -> Result<(), HarnessError> {
        self.switch
            .run(|| set_up(&self.at_switch, up))
            .map_err(failed("setting a port"))
    }

    fn is_up(&self) -> bool {
        let up = |host: &Host, interface: &str| {
            let show = host.command("ip", &["-o", "link", "show", interface]);
            show.is_ok_and(|line| line.contains("state UP"))
        };
        up(&self.switch, &self.at_switch) && up(&self.host, &self.at_host)
    }
}

fn failed(what: &'static str) -> impl Fn(std::io::Error) -> HarnessError {
    move |source| HarnessError::System { what, source }
}
