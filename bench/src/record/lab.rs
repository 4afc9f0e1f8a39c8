//! A guest on a host of its own: run, recorded, replayed, restored.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use harness::{Host, Process, Stream, wait_until};
use rustix::process::Signal;
use serde_json::Value;

use crate::Failure;
use crate::stage::{
    GUEST_ADDRESS, GUEST_REDIS, Patience, Programs, Shell, StageOptions, Start, with_keyboard,
};

/// How long a VM may take to end, and a replay at the most.
const LIMIT: Duration = Duration::from_secs(300);

/// The MAC address that a guest has unless it is given another.
const GUEST_MAC: &str = "02:50:4c:58:00:01";
/// In the first seconds the guest is not idle: the snapshot was taken before its shell began.
const SETTLE_S: u64 = 5;
/// How long one attempt to reach the guest's Redis server may take.
const ATTEMPT: Duration = Duration::from_millis(50);

/// What a VM did.
pub(super) struct Ran {
    exits: f64,
    pub(super) seconds: f64,
    /// How long the load took, as the host sees it.
    pub(super) load: Duration,
}

impl Ran {
    pub(super) fn exits_per_s(&self) -> f64 {
        self.exits / self.seconds
    }
}

/// What a recording came to.
pub(super) struct Recorded {
    pub(super) ran: Ran,
    /// By kind of entry.
    pub(super) bytes_per_exit: BTreeMap<String, f64>,
    pub(super) replay_seconds: f64,
}

/// See the module.
pub(super) struct Lab {
    host: Host,
    start: Start,
    snapshot: PathBuf,
    programs: Programs,
    patience: Patience,
}

impl Lab {
    pub(super) fn new(options: &StageOptions, patience: Patience) -> Result<Self, Failure> {
        let start = Start::prepare(options, &patience)?;
        let snapshot = start
            .snapshot()
            .ok_or("this needs a snapshot: not --boot")?;
        let host = Host::new()?;
        host.disable_ipv6()?;
        host.add_bridge("br0")?;
        host.add_tap("tap0", "br0")?;
        host.command("ip", &["addr", "add", "10.77.0.1/24", "dev", "br0"])?;
        // Known, so that the first packet is not an ARP request, which is repeated once a second only.
        let guest = GUEST_ADDRESS.to_string();
        let neighbour = ["neigh", "add", &guest, "lladdr", GUEST_MAC, "dev", "br0"];
        host.command("ip", &neighbour)?;
        Ok(Self {
            snapshot: snapshot.to_owned(),
            start,
            host,
            programs: Programs::find(options.programs.as_deref())?,
            patience,
        })
    }

    /// Runs the load without a recording.
    pub(super) fn run(&self, load: &str) -> Result<Ran, Failure> {
        let dir = tempfile::tempdir()?;
        let mut command = self.programs.pollux();
        command.arg("run");
        self.ran(dir.path(), command, load)
    }

    /// Records the load and replays it.
    pub(super) fn record(&self, load: &str) -> Result<Recorded, Failure> {
        let dir = tempfile::tempdir()?;
        let out = dir.path().join("recording");
        let mut command = self.programs.pollux();
        command.arg("record").arg("--out").arg(&out);
        let ran = self.ran(dir.path(), command, load)?;
        let stat = self.json(&["log", "stat"], &out)?;
        let kinds = stat["kinds"].as_object().ok_or("log stat without kinds")?;
        let bytes_per_exit = kinds.iter().filter_map(|(kind, figures)| {
            Some((kind.clone(), figures["bytes_per_exit"].as_f64()?))
        });
        let report = self.json(&["replay"], &out)?;
        if report["end_compared"] != true {
            return Err("the replay did not come to the recording's end".into());
        }
        Ok(Recorded {
            ran,
            bytes_per_exit: bytes_per_exit.collect(),
            replay_seconds: number(&report, "seconds")?,
        })
    }

    /// Mbit/s of the log of a guest that has nothing to do.
    pub(super) fn record_idle(&self, time: Duration) -> Result<f64, Failure> {
        let dir = tempfile::tempdir()?;
        let out = dir.path().join("recording");
        let mut command = self.programs.pollux();
        command.arg("record").arg("--out").arg(&out);
        let (mut vmm, _keyboard) = self.begin(dir.path(), command)?;
        let end = Instant::now() + time + Duration::from_secs(SETTLE_S);
        self.patience.wait_until("time to pass", time + LIMIT, || {
            Ok(Instant::now() >= end || vmm.try_wait().is_some())
        })?;
        self.end(&mut vmm)?;
        number(
            &self.json(&["log", "stat", "--after-s", &SETTLE_S.to_string()], &out)?,
            "mbit_per_virtual_second",
        )
    }

    /// From the start of the program to an answer of the guest.
    pub(super) fn restore(&self) -> Result<Duration, Failure> {
        let dir = tempfile::tempdir()?;
        let disk = dir.path().join("disk.img");
        self.start.place_disk(&disk)?;
        let mut command = self.programs.pollux();
        command.arg("restore").arg(&self.snapshot);
        command.args(["--tap", "tap0", "--disk"]).arg(&disk);
        let since = Instant::now();
        let mut vmm = self.host.spawn(&mut command)?;
        let answered = self
            .host
            .run(|| wait_until("an answer of the guest", || ping().is_ok_and(|pong| pong)));
        let took = since.elapsed();
        answered.map_err(|error| format!("{error}: {}", vmm.printed(Stream::Error)))?;
        self.end(&mut vmm)?;
        Ok(took)
    }

    fn ran(&self, dir: &Path, command: Command, load: &str) -> Result<Ran, Failure> {
        let (mut vmm, keyboard) = self.begin(dir, command)?;
        let took = Shell::new(keyboard).run(&vmm, &self.patience, load)?;
        self.end(&mut vmm)?;
        let said = vmm.printed(Stream::Error);
        // "pollux: ran 1234 exits in 5.678 s"
        let line = said.lines().find_map(|l| l.strip_prefix("pollux: ran "));
        let words: Vec<&str> = line.unwrap_or_default().split(' ').collect();
        let [exits, "exits", "in", seconds, "s"] = words[..] else {
            return Err(format!("pollux did not say how far it ran: {said}").into());
        };
        Ok(Ran {
            exits: exits.parse()?,
            seconds: seconds.parse()?,
            load: took,
        })
    }

    /// Starts a VM from the snapshot, with a disk of its own.
    fn begin(&self, dir: &Path, mut command: Command) -> Result<(Process, File), Failure> {
        let disk = dir.join("disk.img");
        self.start.place_disk(&disk)?;
        command.arg("--from-snapshot").arg(&self.snapshot);
        command.args(["--tap", "tap0", "--disk"]).arg(&disk);
        let (mut command, keyboard) = with_keyboard(&command, &dir.join("keys"))?;
        Ok((self.host.spawn(&mut command)?, keyboard))
    }

    fn end(&self, vmm: &mut Process) -> Result<(), Failure> {
        vmm.signal(Signal::TERM)?;
        let status = self
            .patience
            .wait_for("the VM to end", LIMIT, || Ok(vmm.try_wait()))?;
        if status.success() {
            return Ok(());
        }
        Err(format!("pollux: {status}: {}", vmm.printed(Stream::Error)).into())
    }

    /// Runs a `pollux` command on a recording, which prints JSON.
    fn json(&self, words: &[&str], recording: &Path) -> Result<Value, Failure> {
        let mut command = self.programs.pollux();
        let output = command.args(words).arg("--json").arg(recording).output()?;
        if output.status.success() {
            return Ok(serde_json::from_slice(&output.stdout)?);
        }
        Err(format!("{words:?}: {}", String::from_utf8_lossy(&output.stderr)).into())
    }
}

/// Whether the guest's Redis server answers a PING.
fn ping() -> std::io::Result<bool> {
    let mut server = TcpStream::connect_timeout(&GUEST_REDIS, ATTEMPT)?;
    server.set_read_timeout(Some(LIMIT))?;
    server.write_all(b"PING\r\n")?;
    let mut answer = [0; 7];
    server.read_exact(&mut answer)?;
    Ok(answer == *b"+PONG\r\n")
}

fn number(json: &Value, name: &str) -> Result<f64, Failure> {
    json[name]
        .as_f64()
        .ok_or_else(|| format!("no {name} in {json}").into())
}
