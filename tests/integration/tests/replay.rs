//! Record and replay of a Debian guest, as a user does it.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use integration::{Recording, pollux, run, snapshot, stderr};

fn path(dir: &tempfile::TempDir, name: &str) -> PathBuf {
    dir.path().join(name)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("paths of tests are plain")
}

/// Replays and returns the JSON report.
fn replay(recording: &Path, more: &[&str]) -> serde_json::Value {
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

fn whole(report: &serde_json::Value) -> bool {
    report["complete"] == true && report["end_compared"] == true
}

#[test]
fn a_mix_of_programs_replays_identically_under_disturbance_and_on_each_cpu() {
    let name = "a_mix_of_programs_replays_identically_under_disturbance_and_on_each_cpu";
    let Some(guest) = snapshot(name) else { return };
    let dir = tempfile::tempdir().unwrap();
    let recording = path(&dir, "mix");
    let mut session = Recording::start(guest, &recording, &["--disturb"]);
    session.type_and_wait("echo up-$((40+2))", "up-42");
    session.type_and_wait(
        "probe rdtsc 3; probe cpuid 1; seq 50 | sort -r | gzip | wc -c; echo d-$((1+1))",
        "d-2",
    );
    session.type_and_wait("probe busy 20; echo d-$((1+2))", "d-3");
    session.stop();
    let report = replay(&recording, &[]);
    assert!(whole(&report), "{report}");
    assert!(
        report["exits"].as_u64().is_some_and(|exits| exits > 1000),
        "{report}"
    );
    assert!(whole(&replay(&recording, &["--disturb"])));
    for cpu in ["0", "1"] {
        let pinned = Command::new("taskset")
            .args(["-c", cpu])
            .arg(pollux())
            .arg("replay")
            .arg(&recording)
            .output();
        let pinned = pinned.expect("taskset is part of Debian");
        assert!(pinned.status.success(), "on CPU {cpu}: {}", stderr(&pinned));
    }
    damaged_and_cut_logs(&dir, &recording);
}

/// A recording that is cut replays up to its last whole frame; a damaged one is refused.
fn damaged_and_cut_logs(dir: &tempfile::TempDir, recording: &Path) {
    let log = fs::read(recording.join("log")).unwrap();
    let cut = path(dir, "cut");
    fs::create_dir(&cut).unwrap();
    fs::hard_link(recording.join("state"), cut.join("state")).unwrap();
    fs::write(cut.join("log"), &log[..log.len() / 2]).unwrap();
    assert_eq!(replay(&cut, &[])["complete"], false);
    let mut damaged = log;
    let middle = damaged.len() / 2;
    damaged[middle] ^= 0x40;
    fs::write(cut.join("log"), &damaged).unwrap();
    let output = run(&["replay", text(&cut)]);
    assert!(!output.status.success());
    assert!(
        stderr(&output).contains("damaged log at byte"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_program_that_executes_rdrand_unasked_leads_to_a_divergence_report() {
    let name = "a_program_that_executes_rdrand_unasked_leads_to_a_divergence_report";
    let Some(guest) = snapshot(name) else { return };
    let dir = tempfile::tempdir().unwrap();
    let recording = path(&dir, "rdrand");
    let mut session = Recording::start(guest, &recording, &[]);
    session.type_and_wait("probe rdrand; probe rdrand; echo d-$((2+2))", "d-4");
    session.stop();
    let output = run(&["replay", text(&recording)]);
    assert!(!output.status.success());
    let report = stderr(&output);
    for part in [
        "DIVERGENCE at exit",
        "last agreed at exit",
        "entries before it",
    ] {
        assert!(report.contains(part), "{report}");
    }
}

#[test]
fn a_recording_that_is_killed_replays_up_to_its_last_whole_frame() {
    let name = "a_recording_that_is_killed_replays_up_to_its_last_whole_frame";
    let Some(guest) = snapshot(name) else { return };
    let dir = tempfile::tempdir().unwrap();
    let recording = path(&dir, "killed");
    let mut session = Recording::start(guest, &recording, &[]);
    session.type_and_wait("seq 2000 | sort | tail -n 1; echo d-$((3+2))", "d-5");
    session.kill();
    assert!(
        !recording.exists(),
        "a name without .incomplete stands for a closed recording"
    );
    let report = replay(&path(&dir, "killed.incomplete"), &[]);
    assert_eq!(report["complete"], false);
    assert!(
        report["entries"]
            .as_u64()
            .is_some_and(|entries| entries > 0),
        "{report}"
    );
}
