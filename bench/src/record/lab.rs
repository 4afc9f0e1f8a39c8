//! A guest on a host of its own: run, recorded, replayed.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use harness::{Host, Process, Stream};
use rustix::process::Signal;
use serde_json::Value;

use crate::Failure;
use crate::stage::{Patience, Programs, Shell, StageOptions, Start, with_keyboard};

/// How long a VM may take to end, and a replay at the most.
const LIMIT: Duration = Duration::from_secs(300);

/// The first seconds are left out: what a guest does when it goes on from a snapshot is not idling.
const SETTLE_S: u64 = 5;

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
        let snapshot = start.needed_snapshot()?.to_owned();
        let host = Host::new()?;
        host.disable_ipv6()?;
        host.add_bridge("br0")?;
        host.add_tap("tap0", "br0")?;
        Ok(Self {
            snapshot,
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

fn number(json: &Value, name: &str) -> Result<f64, Failure> {
    json[name]
        .as_f64()
        .ok_or_else(|| format!("no {name} in {json}").into())
}
