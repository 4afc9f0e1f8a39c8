//! What must not be taken for a right replay, and what is left of a recording that was not closed.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use harness::privileges;
use integration::{Vm, pollux, run, stderr};

use crate::scene::{Scene, replay, text};

#[test]
fn a_program_that_executes_rdrand_unasked_leads_to_a_divergence_report() {
    let name = "a_program_that_executes_rdrand_unasked_leads_to_a_divergence_report";
    let Some(scene) = Scene::new(name) else {
        return;
    };
    let recording = scene.path("rdrand");
    let mut vm = scene.record(&recording, &[]);
    vm.ask("probe rdrand; probe rdrand; echo d-$((2+2))", "d-4");
    vm.stop();
    assert_diverges(&run(&["replay", text(&recording)]));
}

/// RDPID shows the number of the host's processor, unless the host keeps a value for the guest or refuses the
/// instruction: then every replica sees the same.
#[test]
fn a_program_that_executes_rdpid_unasked_diverges_on_another_cpu_or_sees_the_guests_own_value() {
    let name = "a_program_that_executes_rdpid_unasked_diverges_on_another_cpu_or_sees_the_guests_own_value";
    let cpus = std::thread::available_parallelism().unwrap().get();
    if cpus < 2 && !privileges::skip(name, "two CPUs") {
        return;
    }
    let Some(scene) = Scene::new(name) else {
        return;
    };
    let recording = scene.path("rdpid");
    let mut vm = scene.record_on_cpu(1, &recording);
    vm.ask("probe rdpid; echo d-$((2+1))", "d-3");
    let shown = vm.said();
    vm.stop();
    let mut replay = Command::new("taskset");
    replay.args(["-c", "0"]).arg(pollux());
    let output = replay.arg("replay").arg(&recording).output().unwrap();
    if shown.contains("rdpid 1") {
        eprintln!("{name}: it shows the host's processor");
        assert_diverges(&output);
    } else {
        eprintln!("{name}: it shows the guest's own value, or none");
        assert!(output.status.success(), "{shown}{}", stderr(&output));
    }
}

/// A divergence report that names the point.
fn assert_diverges(output: &Output) {
    assert!(!output.status.success(), "taken for a right replay");
    let report = stderr(output);
    for part in [
        "DIVERGENCE at exit",
        "last agreed at exit",
        "entries before it",
        "entries after it",
    ] {
        assert!(report.contains(part), "{report}");
    }
}

#[test]
fn a_recording_that_is_killed_replays_up_to_its_last_whole_frame() {
    let name = "a_recording_that_is_killed_replays_up_to_its_last_whole_frame";
    let Some(scene) = Scene::new(name) else {
        return;
    };
    let recording = scene.path("killed");
    let mut vm = scene.record(&recording, &[]);
    vm.ask("seq 2000 | sort | tail -n 1; echo d-$((3+2))", "d-5");
    Vm::kill(vm);
    assert!(
        !recording.exists(),
        "a name without .incomplete stands for a closed recording"
    );
    let left = scene.path("killed.incomplete");
    let report = replay(&left, &[]);
    assert_eq!(report["complete"], false);
    assert!(
        report["entries"].as_u64().is_some_and(|n| n > 0),
        "{report}"
    );
    damaged_and_cut_logs(&scene, &left);
}

/// A log that is cut replays up to its last whole frame; a damaged one, or one of another version, is refused.
fn damaged_and_cut_logs(scene: &Scene, recording: &Path) {
    let log = fs::read(recording.join("log")).unwrap();
    let cut = scene.path("cut");
    fs::create_dir(&cut).unwrap();
    fs::hard_link(recording.join("state"), cut.join("state")).unwrap();
    fs::write(cut.join("log"), &log[..log.len() / 2]).unwrap();
    assert_eq!(replay(&cut, &[])["complete"], false);
    let refused = |at: usize, bits: u8, why: &str| {
        let mut damaged = log.clone();
        damaged[at] ^= bits;
        fs::write(cut.join("log"), &damaged).unwrap();
        let output = run(&["replay", text(&cut)]);
        assert!(!output.status.success());
        assert!(stderr(&output).contains(why), "{}", stderr(&output));
    };
    refused(log.len() / 2, 0x40, "damaged log at byte");
    // The version stands behind the magic number, before any checksum.
    refused(4, 0x40, "log format version");
    let mut state = fs::read(recording.join("state")).unwrap();
    let middle = state.len() / 2;
    state[middle] ^= 0x40;
    fs::remove_file(cut.join("state")).unwrap();
    fs::write(cut.join("state"), &state).unwrap();
    let output = run(&["replay", text(&cut)]);
    assert!(!output.status.success());
    assert!(stderr(&output).contains("state"), "{}", stderr(&output));
}
