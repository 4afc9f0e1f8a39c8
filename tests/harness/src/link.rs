//! A cable between two hosts: a veth pair with addresses.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::host::Host;
use crate::interface::set_gro;
use crate::{HarnessError, system, wait_until};

/// Numbers the links of this process: names and addresses of no two are the same.
static LINKS: AtomicU32 = AtomicU32::new(0);

/// One end of a link.
#[derive(Debug, Clone)]
pub struct End {
    /// Name of the interface on its host.
    pub interface: String,
    /// Its address; the network is a /24.
    pub v4: Ipv4Addr,
    /// Its address; the network is a /64.
    pub v6: Ipv6Addr,
    host: Host,
}

/// A veth pair, up; no generic receive offload, as the system makes it. It goes with its hosts.
#[derive(Debug)]
pub struct Link {
    /// End on the first host.
    pub a: End,
    /// End on the second host.
    pub b: End,
}

impl Link {
    /// Joins two hosts. 10.77.N.1 and .2, fd77:N::1 and ::2, with N counting the links of this process.
    ///
    /// # Errors
    /// No right to, or more than 256 links.
    pub fn between(a: &Host, b: &Host) -> Result<Self, HarnessError> {
        let number = u8::try_from(LINKS.fetch_add(1, Ordering::Relaxed))
            .map_err(|_| system("more than 256 links")(rustix::io::Errno::NOSPC))?;
        let (name_a, name_b) = (format!("plx{number}a"), format!("plx{number}b"));
        let namespace = b.namespace_path();
        a.command(
            "ip",
            &[
                "link", "add", &name_a, "type", "veth", "peer", "name", &name_b, "netns",
                &namespace,
            ],
        )?;
        let end = |host: &Host, interface: String, last: u8| End {
            interface,
            v4: Ipv4Addr::new(10, 77, number, last),
            v6: Ipv6Addr::new(0xfd77, number.into(), 0, 0, 0, 0, 0, last.into()),
            host: host.clone(),
        };
        let link = Self {
            a: end(a, name_a, 1),
            b: end(b, name_b, 2),
        };
        for end in [&link.a, &link.b] {
            end.configure()?;
        }
        for end in [&link.a, &link.b] {
            wait_until("the link to come up", || end.is_up())?;
        }
        Ok(link)
    }

    /// Pulls the cable.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn cut(&self) -> Result<(), HarnessError> {
        self.a.set("down")
    }

    /// Plugs it in again. IPv6 addresses of the first host are lost by a cut and set anew.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn mend(&self) -> Result<(), HarnessError> {
        self.a.set("up")?;
        self.a.add_v6()?;
        wait_until("the link to come up", || self.a.is_up() && self.b.is_up())
    }
}

impl End {
    fn configure(&self) -> Result<(), HarnessError> {
        // No duplicate detection, no router solicitation: the only traffic is the test's own.
        let disable = format!("/proc/sys/net/ipv6/conf/{}/accept_dad", self.interface);
        self.host.run(|| std::fs::write(&disable, "0")).ok();
        self.ip(&[
            "addr",
            "add",
            &format!("{}/24", self.v4),
            "dev",
            &self.interface,
        ])?;
        self.set("up")?;
        self.add_v6()
    }

    /// Turns generic receive offload on: without it, or an XDP program, this end cannot receive what
    /// an XDP program on the other end sends back.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn enable_gro(&self) -> Result<(), HarnessError> {
        self.host
            .run(|| set_gro(&self.interface, true))
            .map_err(|source| HarnessError::System {
                what: "switching GRO on",
                source,
            })
    }

    fn add_v6(&self) -> Result<(), HarnessError> {
        self.ip(&[
            "addr",
            "replace",
            &format!("{}/64", self.v6),
            "dev",
            &self.interface,
            "nodad",
        ])
    }

    /// Takes this end down, as when its host dies, or up again. IPv6 addresses are lost by going down.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn set_up(&self, up: bool) -> Result<(), HarnessError> {
        self.set(if up { "up" } else { "down" })
    }

    fn set(&self, state: &str) -> Result<(), HarnessError> {
        self.ip(&["link", "set", &self.interface, state])
    }

    fn ip(&self, arguments: &[&str]) -> Result<(), HarnessError> {
        self.host.command("ip", arguments).map(drop)
    }

    /// Whether the interface and its other end are up.
    pub fn is_up(&self) -> bool {
        let show = self
            .host
            .command("ip", &["-o", "link", "show", &self.interface]);
        show.is_ok_and(|line| line.contains("state UP"))
    }
}
