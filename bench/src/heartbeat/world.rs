//! Two hosts with an `ftprobe` each, and processes that stand for VMMs.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ebpf_events::{KeyGeneration, SessionKeys, Side};
use harness::{End, Host, Link, Process};
use heartbeat::{Client, VmmPages};

use crate::Failure;

pub(super) const GENERATION: KeyGeneration = KeyGeneration(1);
pub(super) const EPOCH: u64 = 1;
/// How often an event loop ticks at least, as the VMM's does with an idle guest.
const TICK_EVERY: Duration = Duration::from_millis(50);

pub(super) fn keys(session: u64, side: Side) -> SessionKeys {
    SessionKeys::derive(b"a secret for measuring only", session, GENERATION, side)
}

/// Who answers on host B.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Responder {
    /// XDP in the driver.
    Native,
    /// TCX.
    Tcx,
    /// A userspace thread with real-time priority.
    UserspaceRaised,
    /// A userspace thread without the right to raise its priority.
    Userspace,
}

impl Responder {
    const fn mode(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Tcx => "tcx",
            Self::UserspaceRaised | Self::Userspace => "userspace",
        }
    }
}

/// Hosts A on CPU 0 and B on CPU 1.
pub(super) struct World {
    pub(super) a: Host,
    pub(super) b: Host,
    pub(super) link: Link,
    directory: tempfile::TempDir,
    ftprobe: PathBuf,
}

impl World {
    pub(super) fn new(ftprobe: &Path) -> Result<Self, Failure> {
        let a = Host::new()?.on_cpu(0);
        let b = Host::new()?.on_cpu(1);
        let link = Link::between(&a, &b)?;
        let directory = tempfile::tempdir()?;
        Ok(Self {
            a,
            b,
            link,
            directory,
            ftprobe: ftprobe.to_owned(),
        })
    }

    pub(super) fn socket(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Has each host receive on its own CPU: a veth leaves it to the sender's.
    pub(super) fn receive_apart(&self) -> Result<(), Failure> {
        for (host, end, cpus) in [(&self.a, &self.link.a, "1"), (&self.b, &self.link.b, "2")] {
            // The host's interfaces are seen in a sysfs that is mounted there, for this command only.
            let path = format!("/sys/class/net/{}/queues/rx-0/rps_cpus", end.interface);
            let script = format!("mount -t sysfs none /sys && echo {cpus} > {path}");
            host.command("unshare", &["--mount", "sh", "-c", &script])?;
        }
        Ok(())
    }

    /// Starts `ftprobe` on both hosts; B's answers as asked.
    pub(super) fn probes(&self, responder: Responder) -> Result<[Process; 2], Failure> {
        // A veth takes what XDP sends only if it has an XDP program too.
        let a = if responder == Responder::Native {
            Responder::Native
        } else {
            Responder::Tcx
        };
        Ok([
            self.ftprobe(&self.a, &self.link.a, "a", a)?,
            self.ftprobe(&self.b, &self.link.b, "b", responder)?,
        ])
    }

    fn ftprobe(
        &self,
        host: &Host,
        end: &End,
        name: &str,
        as_: Responder,
    ) -> Result<Process, Failure> {
        let mut command = if as_ == Responder::Userspace {
            let mut unprivileged = Command::new("setpriv");
            unprivileged.args(["--bounding-set=-sys_nice", "--inh-caps=-sys_nice"]);
            unprivileged.arg(&self.ftprobe);
            unprivileged
        } else {
            Command::new(&self.ftprobe)
        };
        command
            .args([
                "run",
                "--mode",
                as_.mode(),
                "--interface",
                &end.interface,
                "--socket",
            ])
            .arg(self.socket(name));
        let mut process = host.spawn(&mut command)?;
        process.wait_for_line("ready")?;
        Ok(process)
    }

    /// Starts a process on host B that has joined the session as its VMM and ticks.
    pub(super) fn vmm_on_b(&self, session: u64) -> Result<Process, Failure> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args([
                "heartbeat-member",
                "--session",
                &session.to_string(),
                "--socket",
            ])
            .arg(self.socket("b"));
        let mut process = self.b.spawn(&mut command)?;
        process.wait_for_line("joined")?;
        Ok(process)
    }
}

/// Joins as the VMM of one side.
pub(super) fn join(socket: &Path, session: u64, side: Side) -> Result<(Client, VmmPages), Failure> {
    let mut client = Client::connect(socket)?;
    let pages = client.join_vmm(session, EPOCH)?;
    client.set_keys(session, GENERATION, &keys(session, side))?;
    Ok((client, pages))
}

/// Stands for the VMM of host B: an event loop that ticks.
pub(super) fn join_and_tick(socket: &Path, session: u64) -> Result<Infallible, Failure> {
    let (_client, pages) = join(socket, session, Side::Listener)?;
    println!("joined");
    loop {
        pages.vmm.progress.fetch_add(1, Ordering::Release);
        std::thread::sleep(TICK_EVERY);
    }
}

/// The program beside this one, unless another is named.
pub(super) fn find_ftprobe(named: Option<&Path>) -> Result<PathBuf, Failure> {
    if let Some(path) = named {
        return Ok(path.to_owned());
    }
    let beside = std::env::current_exe()?.with_file_name("ftprobe");
    if beside.exists() {
        return Ok(beside);
    }
    Err(format!(
        "{} is not there: build it with `cargo build --release -p ftprobe`, or name one with --ftprobe",
        beside.display()
    )
    .into())
}
