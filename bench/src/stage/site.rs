//! One of the hosts that VMMs run on.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;

use harness::{Host, Port, Stream, Switch};

use super::Files;
use super::api::{Api, Status};
use super::vmm::Vmm;
use crate::Failure;

/// Name of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SiteId(u8);

/// All hosts of a stage.
pub(crate) const SITES: [SiteId; 3] = [SiteId(0), SiteId(1), SiteId(2)];

impl SiteId {
    /// Its place among [`SITES`].
    pub(crate) fn index(self) -> usize {
        self.0.into()
    }

    /// The host of this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        SITES.into_iter().find(|id| id.to_string() == name)
    }

    /// Its address on the logging network.
    pub(super) fn listen(self) -> SocketAddr {
        (Ipv4Addr::new(10, 78, 0, self.0 + 1), 7000).into()
    }
}

impl std::fmt::Display for SiteId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", char::from(b'a' + self.0))
    }
}

/// See the module.
pub(crate) struct Site {
    id: SiteId,
    vmm: Option<Vmm>,
    /// The VMM may end: it was killed, or is powering off.
    may_end: bool,
    lan: Port,
    wire: Port,
    host: Host,
}

impl Site {
    /// A host with nothing on it, plugged into both networks.
    pub(super) fn new(id: SiteId, lan: &Switch, wire: &Switch) -> Result<Self, Failure> {
        let host = Host::new()?;
        host.disable_ipv6()?;
        host.add_bridge("br0")?;
        host.add_tap("tap0", "br0")?;
        let lan = lan.plug(&host, "up0")?;
        host.attach("up0", "br0")?;
        let wire = wire.plug(&host, "log0")?;
        wire.enable_gro()?;
        let std::net::IpAddr::V4(address) = id.listen().ip() else {
            unreachable!("hosts have IPv4 addresses");
        };
        wire.assign(address)?;
        Ok(Self {
            id,
            vmm: None,
            may_end: false,
            lan,
            wire,
            host,
        })
    }

    pub(crate) fn id(&self) -> SiteId {
        self.id
    }

    /// Its cable to the client's network.
    pub(crate) fn lan(&self) -> &Port {
        &self.lan
    }

    /// Its cable to the logging network.
    pub(crate) fn wire(&self) -> &Port {
        &self.wire
    }

    /// The host itself.
    pub(crate) fn host(&self) -> &Host {
        &self.host
    }

    pub(super) fn pin(&mut self, cpu: usize) {
        self.host = self.host.on_cpu(cpu);
    }

    pub(super) fn start(&mut self, mut command: Command, files: &Files) -> Result<(), Failure> {
        self.end(files)?;
        let process = self.host.spawn(&mut command)?;
        self.vmm = Some(Vmm::new(process, Api::new(files.api(self.id))));
        Ok(())
    }

    pub(super) fn status(&self) -> Option<Status> {
        self.vmm.as_ref()?.api().status()
    }

    pub(super) fn events(&self) -> Option<String> {
        self.vmm.as_ref()?.api().events()
    }

    /// Fails if the VMM has ended by itself.
    pub(super) fn check(&mut self) -> Result<(), Failure> {
        let Some(vmm) = &mut self.vmm else {
            return Ok(());
        };
        match vmm.process().try_wait() {
            None => Ok(()),
            Some(_) if self.may_end => Ok(()),
            Some(status) => {
                let said = vmm.process().printed(Stream::Error);
                let last: Vec<&str> = said.lines().rev().take(20).collect();
                let last: Vec<&str> = last.into_iter().rev().collect();
                let id = self.id;
                Err(format!(
                    "the VMM of host {id} has ended: {status}\n{}",
                    last.join("\n")
                )
                .into())
            }
        }
    }

    /// The VMM, if one was started.
    pub(super) fn vmm(&mut self) -> Option<&mut Vmm> {
        self.vmm.as_mut()
    }

    /// The VMM is about to end, and that is no failure.
    pub(super) fn expect_end(&mut self) {
        self.may_end = true;
    }

    /// Is lost.
    pub(super) fn crash(&mut self, files: &Files) -> Result<(), Failure> {
        self.lan.cut()?;
        self.wire.cut()?;
        self.end(files)
    }

    /// Kills every process on it, and forgets its VMM.
    pub(super) fn end(&mut self, files: &Files) -> Result<(), Failure> {
        self.host.kill_all()?;
        self.may_end = false;
        if let Some(mut vmm) = self.vmm.take() {
            vmm.process().kill();
            files.keep_log(self.id, &vmm.process().printed(Stream::Error));
        }
        Ok(())
    }

    /// Is plugged in again.
    pub(super) fn repair(&mut self) -> Result<(), Failure> {
        self.lan.mend()?;
        self.wire.mend()?;
        Ok(())
    }
}
