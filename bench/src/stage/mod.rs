//! A stage for protected VMs: three hosts, a client, and what is between them, all on this machine.
//!
//! ```text
//!            client 10.77.0.1
//!               │
//!   ════════════╪═══════════════╪═══════════════╪════  lan: a switch; the guest is 10.77.0.2
//!           up0 │           up0 │           up0 │
//!        br0 ── tap0     br0 ── tap0     br0 ── tap0
//!          host a          host b          host c
//!           log0            log0            log0
//!   ══════ 10.78.0.1 ══════ .2 ═══════════ .3 ═══════  wire: the logging network, another switch
//! ```
//! Hosts are network namespaces; the directory with disk and epochs is shared by all. A host is lost by
//! pulling its cables and then killing every process on it, so that nothing of its end gets out. All of it
//! goes with the [`Stage`], whatever became of it.

mod api;
mod client;
mod files;
mod guest;
mod interrupt;
mod patience;
mod shell;
mod site;
pub(crate) mod takeover;
mod vmm;

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use harness::{Host, Port, Switch};
use rustix::process::Signal;

pub(crate) use api::{Api, Status};
pub(crate) use client::Client;
pub(crate) use guest::Start;
pub(crate) use interrupt::Interrupt;
pub(crate) use patience::Patience;
pub(crate) use shell::Shell;
pub(crate) use site::{SITES, Site, SiteId};
pub(crate) use vmm::{Programs, Vmm, with_keyboard};

use crate::Failure;
use crate::storage::Storage;
use files::Files;

/// The client's address on the lan.
const CLIENT_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The guest's.
pub(crate) const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// Its Redis server.
pub(crate) const GUEST_REDIS: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(GUEST_ADDRESS), 6379);

/// Events of each host that a failure shows.
const EVENTS_SHOWN: usize = 16;

/// What a stage is made from.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct StageOptions {
    /// Directory with the guest that scripts/guest-image has made: vmlinuz, initramfs.cpio, disk.img.
    #[arg(long, value_name = "DIR", default_value = ".cache/guest")]
    pub(crate) guest: PathBuf,
    /// Directory for snapshots of the booted guest.
    #[arg(long, value_name = "DIR", default_value = ".cache/snapshots")]
    pub(crate) snapshots: PathBuf,
    /// Go on from this snapshot (one of those in the directory of snapshots), whatever program took it.
    #[arg(long, value_name = "DIR", conflicts_with = "boot")]
    pub(crate) snapshot: Option<PathBuf>,
    /// Boot the guest, even if there is a snapshot.
    #[arg(long)]
    pub(crate) boot: bool,
    /// Memory of the guest in MiB.
    #[arg(long, default_value_t = 192)]
    pub(crate) memory: u32,
    /// Directory with pollux, vhost-ftlog and ftprobe; that of this program if it is not given.
    #[arg(long, value_name = "DIR")]
    pub(crate) programs: Option<PathBuf>,
    /// Keeps console and log of every VMM in this directory.
    #[arg(long, value_name = "DIR")]
    pub(crate) keep: Option<PathBuf>,
}

/// See the module.
pub(crate) struct Stage {
    // Dropped in this order: processes before what they stand on.
    sites: Vec<Site>,
    client: Host,
    _client_port: Port,
    lan: Switch,
    _wire: Switch,
    files: Files,
    programs: Programs,
    memory: u32,
    patience: Patience,
}

impl Stage {
    /// Hosts, networks and files; no VM yet.
    pub(crate) fn new(options: &StageOptions, interrupt: &Interrupt) -> Result<Self, Failure> {
        let programs = Programs::find(options.programs.as_deref())?;
        let files = Files::new(options.keep.as_deref())?;
        programs.init(&files)?;
        Self::with(programs, files, options.memory, interrupt)
    }

    /// One on which no VM can be started.
    #[cfg(test)]
    pub(crate) fn empty(interrupt: &Interrupt) -> Result<Self, Failure> {
        Self::with(Programs::none(), Files::new(None)?, 0, interrupt)
    }

    fn with(
        programs: Programs,
        files: Files,
        memory: u32,
        interrupt: &Interrupt,
    ) -> Result<Self, Failure> {
        let (lan, wire) = (Switch::new()?, Switch::new()?);
        let client = Host::new()?;
        client.disable_ipv6()?;
        let client_port = lan.plug(&client, "lan0")?;
        client_port.assign(CLIENT_ADDRESS)?;
        let sites = SITES.into_iter().map(|id| Site::new(id, &lan, &wire));
        Ok(Self {
            sites: sites.collect::<Result<_, _>>()?,
            client,
            _client_port: client_port,
            lan,
            _wire: wire,
            files,
            programs,
            memory,
            patience: Patience::new(interrupt.clone()),
        })
    }

    /// Waiting, as everything on this stage waits.
    pub(crate) fn patience(&self) -> &Patience {
        &self.patience
    }

    /// The host of the client.
    pub(crate) fn client(&self) -> &Host {
        &self.client
    }

    /// The switch between the client and the hosts.
    pub(crate) fn lan(&self) -> &Switch {
        &self.lan
    }

    /// One of the hosts.
    pub(crate) fn site(&self, id: SiteId) -> &Site {
        &self.sites[id.index()]
    }

    /// Puts the guest's disk in its place, and starts the VM on this host, protected.
    pub(crate) fn start_primary(&mut self, id: SiteId, start: &Start) -> Result<(), Failure> {
        start.place_disk(&self.files.disk())?;
        let command = self.programs.primary(id, start, &self.files, self.memory);
        self.sites[id.index()].start(command, &self.files)
    }

    /// Starts the same command again on a host, with the disk as it is.
    pub(crate) fn restart_primary(&mut self, id: SiteId, start: &Start) -> Result<(), Failure> {
        let command = self.programs.primary(id, start, &self.files, self.memory);
        self.sites[id.index()].start(command, &self.files)
    }

    /// The same as [`Self::start_primary`], with a keyboard at the guest's console; what the console shows is the VMM's output.
    pub(crate) fn start_primary_with_keyboard(
        &mut self,
        id: SiteId,
        start: &Start,
    ) -> Result<File, Failure> {
        start.place_disk(&self.files.disk())?;
        let command = self.programs.primary(id, start, &self.files, self.memory);
        let (command, keyboard) = with_keyboard(&command, &self.files.keyboard())?;
        self.sites[id.index()].start(command, &self.files)?;
        Ok(keyboard)
    }

    /// Gives each host a CPU of its own, as far as there are enough: what is started on it keeps to it.
    pub(crate) fn pin(&mut self) {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        for site in &mut self.sites {
            site.pin(site.id().index() % cpus);
        }
    }

    /// Starts an empty standby on this host.
    pub(crate) fn start_standby(&mut self, id: SiteId) -> Result<(), Failure> {
        let command = self.programs.standby(id, &self.files);
        self.sites[id.index()].start(command, &self.files)
    }

    /// Kills the processes of these hosts at one moment.
    pub(crate) fn kill_together(&mut self, hosts: &[SiteId]) -> Result<(), Failure> {
        for id in hosts {
            self.expect_end(*id);
        }
        for id in hosts {
            self.site(*id).host().signal_all(Signal::KILL)?;
        }
        Ok(())
    }

    /// A host is lost: cables first, then all its processes.
    pub(crate) fn crash(&mut self, id: SiteId) -> Result<(), Failure> {
        self.sites[id.index()].crash(&self.files)
    }

    /// A host that was lost is there again, and empty.
    pub(crate) fn repair(&mut self, id: SiteId) -> Result<(), Failure> {
        self.sites[id.index()].repair()
    }

    /// What the VMM of a host says, if one runs there and answers.
    pub(crate) fn status(&self, id: SiteId) -> Option<Status> {
        self.sites[id.index()].status()
    }

    /// What has happened at the VMM of a host lately, if one runs there and answers.
    pub(crate) fn events(&self, id: SiteId) -> Option<String> {
        self.sites[id.index()].events()
    }

    /// The primary with the highest epoch, and what it says.
    pub(crate) fn primary(&self) -> Option<(SiteId, Status)> {
        let said = SITES
            .into_iter()
            .filter_map(|id| Some((id, self.status(id)?)));
        said.filter(|(_, status)| status.role == "primary")
            .max_by_key(|(_, status)| status.epoch)
    }

    /// Waits until the primary has a backup that could take over, in an epoch from `epoch` on.
    pub(crate) fn wait_for_protection(
        &mut self,
        epoch: Option<u64>,
        limit: Duration,
    ) -> Result<(SiteId, Status), Failure> {
        self.wait_for_status("protection", limit, |_, status| {
            status.protected && status.epoch >= epoch
        })
    }

    /// Waits for a primary that is as it is `wanted`.
    pub(crate) fn wait_for_status(
        &mut self,
        what: &str,
        limit: Duration,
        wanted: impl Fn(SiteId, &Status) -> bool,
    ) -> Result<(SiteId, Status), Failure> {
        let patience = self.patience.clone();
        let found = patience.wait_for(what, limit, || {
            self.check_processes()?;
            Ok(self.primary().filter(|(id, status)| wanted(*id, status)))
        });
        match found {
            Err(error) if !patience.is_interrupted() => {
                Err(format!("{error}{}", self.last_events()).into())
            }
            found => found,
        }
    }

    /// What every host told last, for who asks why something did not happen.
    pub(crate) fn last_events(&self) -> String {
        let mut text = String::new();
        for site in &self.sites {
            let events = site.events().unwrap_or_default();
            let lines: Vec<&str> = events.lines().filter(|line| !line.is_empty()).collect();
            let first = lines.len().saturating_sub(EVENTS_SHOWN);
            for line in &lines[first..] {
                text.push_str(&format!("\n  host {}: {line}", site.id()));
            }
        }
        text
    }

    /// The VMM of a host, if one was started there.
    pub(crate) fn vmm(&mut self, id: SiteId) -> Option<&mut Vmm> {
        self.sites[id.index()].vmm()
    }

    /// The VMM of a host is about to end, and that is no failure.
    pub(crate) fn expect_end(&mut self, id: SiteId) {
        self.sites[id.index()].expect_end();
    }

    /// Has the guest power itself off; the VMM of its host ends then.
    pub(crate) fn power_off(&mut self, id: SiteId) -> Result<(), Failure> {
        SITES.into_iter().for_each(|id| self.expect_end(id));
        let vmm = self.vmm(id).ok_or("no VMM to power off")?;
        vmm.api().command("power-off")
    }

    /// Puts a layer between every host and the shared storage, which watches and disturbs. Before any VM
    /// is started.
    pub(crate) fn watch_storage(&mut self) -> Result<(), Failure> {
        self.files.watch_storage()
    }

    /// That layer.
    pub(crate) fn storage(&self) -> Option<&Storage> {
        self.files.storage()
    }

    /// The guest's disk.
    pub(crate) fn disk(&self) -> PathBuf {
        self.files.disk()
    }

    /// Fails if a VMM has ended that nobody has killed.
    pub(crate) fn check_processes(&mut self) -> Result<(), Failure> {
        self.sites.iter_mut().try_for_each(Site::check)
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // A process that waits for the storage does not end before it is there.
        if let Some(storage) = self.files.storage() {
            SITES.into_iter().for_each(|id| storage.mend(id));
        }
        for site in &mut self.sites {
            // Nothing can be done about a host that cannot be emptied; it says so itself.
            if let Err(error) = site.end(&self.files) {
                eprintln!("host {}: {error}", site.id());
            }
        }
    }
}
