//! Two linked hosts, each with an `ftprobe`, and the VMMs' side of one session between them.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use ebpf_events::{KeyGeneration, SessionKeys, Side};
use harness::{End, Host, Link, Process, wait_for};
use heartbeat::{Client, Observation, Prober, ProberConfig, VmmPages};

pub(crate) const SESSION: u64 = 0x0123_4567_89ab_cdef;
pub(crate) const GENERATION: KeyGeneration = KeyGeneration(1);
pub(crate) const PORT: u16 = 7879;

pub(crate) fn keys(side: Side) -> SessionKeys {
    SessionKeys::derive(b"a secret of the handshake", SESSION, GENERATION, side)
}

pub(crate) struct World {
    pub(crate) a: Host,
    pub(crate) b: Host,
    pub(crate) link: Link,
    directory: tempfile::TempDir,
}

impl World {
    pub(crate) fn new() -> Self {
        let (a, b) = (Host::new().unwrap(), Host::new().unwrap());
        let link = Link::between(&a, &b).unwrap();
        Self {
            a,
            b,
            link,
            directory: tempfile::tempdir().unwrap(),
        }
    }

    pub(crate) fn socket(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// `ftprobe run`, serving.
    pub(crate) fn ftprobe(&self, host: &Host, end: &End, name: &str, mode: &str) -> Process {
        self.serving(host, end, name, &["--mode", mode])
    }

    fn serving(&self, host: &Host, end: &End, name: &str, more: &[&str]) -> Process {
        let mut run = Command::new(env!("CARGO_BIN_EXE_ftprobe"));
        run.args(["run", "--interface", &end.interface, "--socket"])
            .arg(self.socket(name))
            .args(more);
        let mut process = host.spawn(&mut run).unwrap();
        process.wait_for_line("ready").unwrap();
        process
    }

    /// Both hosts with one.
    pub(crate) fn both(&self, mode: &str) -> (Process, Process) {
        (
            self.ftprobe(&self.a, &self.link.a, "a", mode),
            self.ftprobe(&self.b, &self.link.b, "b", mode),
        )
    }

    /// Both hosts with one, on the interface of the logging channel.
    pub(crate) fn both_beside_the_log(&self) -> [Process; 2] {
        [(&self.a, &self.link.a, "a"), (&self.b, &self.link.b, "b")].map(|(host, end, name)| {
            self.serving(host, end, name, &["--log-interface", &end.interface])
        })
    }
}

/// One side of the session as its VMM sees it; the VMM is this process.
pub(crate) struct Vmm {
    pub(crate) client: Client,
    pub(crate) pages: VmmPages,
}

impl Vmm {
    pub(crate) fn join(socket: &Path, epoch: u64, side: Side) -> Self {
        let mut client = Client::connect(socket).unwrap();
        let pages = client.join_vmm(SESSION, epoch).unwrap();
        client.set_keys(SESSION, GENERATION, &keys(side)).unwrap();
        Self { client, pages }
    }

    pub(crate) fn counter(&mut self, name: &str) -> u64 {
        counter(&mut self.client, name)
    }

    /// A prober of this VMM towards the other side.
    pub(crate) fn prober(&self, host: &Host, side: Side, peer: IpAddr) -> Prober {
        let pages = self.pages.clone();
        let config = prober_config(side, peer);
        host.run(|| Prober::new(config, pages.vmm, Some(pages.seen)).unwrap())
    }
}

pub(crate) fn counter(client: &mut Client, name: &str) -> u64 {
    client.status().unwrap().counters[name]
}

pub(crate) fn prober_config(side: Side, peer: IpAddr) -> ProberConfig {
    let peer = SocketAddr::new(peer, PORT);
    let mut config = ProberConfig::new(SESSION, 3, GENERATION, keys(side).ours, peer);
    // Longer than the tests' machine pauses a thread, so that no beat counts as a gap by chance.
    config.interval = Duration::from_millis(500);
    config
}

/// Beats until the observation is as wanted.
pub(crate) fn beat_until(
    what: &str,
    prober: &mut Prober,
    wanted: impl Fn(&Observation) -> bool,
) -> Observation {
    wait_for(what, || Some(prober.beat()).filter(&wanted)).unwrap()
}
