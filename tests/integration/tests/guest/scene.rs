//! What the tests stand on: a directory, a host with a TAP, and the guest with its disk.

use std::path::{Path, PathBuf};
use std::process::Command;

use integration::{Guest, Site, Vm, amount, guest, pollux, run, stderr};

/// See the module.
pub(crate) struct Scene {
    dir: tempfile::TempDir,
    pub(crate) site: Site,
    pub(crate) guest: &'static Guest,
}

impl Scene {
    /// For `test`, which is skipped where this gives nothing.
    pub(crate) fn new(test: &str) -> Option<Self> {
        let guest = guest(test)?;
        Some(Self {
            // Not below /tmp, which is memory on some hosts.
            dir: tempfile::tempdir_in("/var/tmp").unwrap(),
            site: Site::new().unwrap(),
            guest,
        })
    }

    /// A file or directory of this name.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A copy of the guest's disk as it was when the snapshot was taken.
    pub(crate) fn disk(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        self.guest.place_disk(&path);
        path
    }

    /// Records the guest on a fresh copy of its disk; the console answers.
    pub(crate) fn record(&self, out: &Path, more: &[&str]) -> Vm {
        let disk = self.disk("recorded.img");
        let mut vm = Vm::record(&self.site, self.guest, &disk, out, more);
        vm.ask("echo up-$((40+2))", "up-42");
        vm
    }

    /// The same, with the program kept to one CPU.
    pub(crate) fn record_on_cpu(&self, cpu: usize, out: &Path) -> Vm {
        let mut command = Command::new("taskset");
        command.args(["-c", &cpu.to_string()]).arg(pollux());
        command.args(["record", "--tap", "tap0", "--disk"]);
        command.arg(self.disk("recorded.img"));
        command.arg("--out").arg(out);
        command.arg("--from-snapshot").arg(self.guest.snapshot());
        let mut vm = Vm::start(&self.site, &mut command);
        vm.ask("echo up-$((40+2))", "up-42");
        vm
    }

    /// Keeps the directory: something in it shows what failed.
    pub(crate) fn keep(&mut self) -> &Path {
        self.dir.disable_cleanup(true);
        self.dir.path()
    }
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("paths of tests are plain")
}

/// Replays and returns the JSON report.
pub(crate) fn replay(recording: &Path, more: &[&str]) -> serde_json::Value {
    let mut arguments = vec!["replay", text(recording), "--json"];
    arguments.extend(more);
    let output = run(&arguments);
    assert!(
        output.status.success(),
        "replay {more:?}: {}",
        stderr(&output)
    );
    serde_json::from_slice(&output.stdout).expect("the report is JSON")
}

/// Replays a closed recording on each CPU, and with guest memory taken away now and then. Each time it must
/// be identical up to the hashes at the end. Returns a report.
pub(crate) fn replay_everywhere(recording: &Path) -> serde_json::Value {
    for cpu in ["0", "1"] {
        let mut command = Command::new("taskset");
        command
            .args(["-c", cpu])
            .arg(pollux())
            .args(["replay", "--json"])
            .arg(recording);
        let output = command.output().expect("taskset is part of Debian");
        assert!(output.status.success(), "on CPU {cpu}: {}", stderr(&output));
        assert_whole(&serde_json::from_slice(&output.stdout).unwrap());
    }
    let report = replay(recording, &["--disturb"]);
    assert_whole(&report);
    report
}

/// The recording was closed in order, and the hashes at its end are those of the replay.
pub(crate) fn assert_whole(report: &serde_json::Value) {
    let whole = report["complete"] == true && report["end_compared"] == true;
    assert!(whole, "{report}");
}

/// Records some seconds of traffic on console, disk and network at the same time.
pub(crate) fn record_traffic(scene: &Scene, recording: &Path) {
    let mut vm = scene.record(recording, &[]);
    let mut redis = scene.site.redis().unwrap();
    vm.type_keys(
        "for i in 1 2 3 4 5 6 7 8 9; do echo line$i; done > /data/a; sync; \
         echo 3 > /proc/sys/vm/drop_caches; read x < /data/a; \
         i=0; while [ $i -lt 15000 ]; do i=$((i+1)); done; echo end-$((4+5))\n",
    );
    for number in 0..amount("POLLUX_TRAFFIC_REQUESTS", 25) {
        redis.set_and_get(number % 7, number).unwrap();
    }
    vm.wait_for("end-9");
    vm.stop();
}
