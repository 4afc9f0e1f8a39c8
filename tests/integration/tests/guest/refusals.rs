//! What a VM must not be given: refused with a message that names the cause.

use std::fs;
use std::path::Path;
use std::process::Command;

use integration::{Vm, pollux, run, stderr};

use crate::scene::{Scene, assert_whole, replay, text};

/// Goes on from the snapshot with these devices, and expects that it is refused because of `why`.
fn refused(scene: &Scene, disk: &Path, more: &[&str], why: &str) {
    let mut command = Command::new(pollux());
    command
        .arg("restore")
        .arg(scene.guest.snapshot())
        .args(["--disk", text(disk)])
        .args(more);
    let output = scene.site.output(&mut command);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "not refused: {said}");
    assert!(said.contains(why), "{said}");
}

#[test]
fn disk_and_tap_of_a_running_vm_are_refused_to_another() {
    let name = "disk_and_tap_of_a_running_vm_are_refused_to_another";
    let Some(scene) = Scene::new(name) else {
        return;
    };
    let vm = scene.record(&scene.path("recording"), &[]);
    let other = scene.disk("other.img");
    let image = scene.path("recorded.img");
    let in_use = format!("disk image {} is in use by another process", text(&image));
    refused(&scene, &image, &["--tap", "tap1"], &in_use);
    let in_use = "TAP tap0 is in use by another process";
    refused(&scene, &other, &["--tap", "tap0"], in_use);
    Vm::stop(vm);
}

#[test]
fn a_disk_that_has_moved_on_is_refused_by_restore_and_record() {
    let name = "a_disk_that_has_moved_on_is_refused_by_restore_and_record";
    let Some(scene) = Scene::new(name) else {
        return;
    };
    let disk = scene.disk("moved.img");
    let bytes = fs::read(&disk).unwrap();
    fs::write(&disk, bytes).unwrap();
    refused(&scene, &disk, &["--tap", "tap0"], "has moved on");
    let out = scene.path("recording");
    let mut vm = Vm::record(&scene.site, scene.guest, &disk, &out, &[]);
    assert!(!vm.wait().success());
    assert!(vm.said().contains("has moved on"), "{}", vm.said());
    assert!(!out.with_extension("incomplete").exists());
}

/// Each of its requests would fail, or those behind the image's end.
#[test]
fn a_guest_with_a_disk_is_refused_without_one_or_with_one_of_another_size() {
    let name = "a_guest_with_a_disk_is_refused_without_one_or_with_one_of_another_size";
    let Some(scene) = Scene::new(name) else {
        return;
    };
    let recording = scene.path("recording");
    Vm::stop(scene.record(&recording, &[]));
    let image = scene.disk("image.img");
    let sectors = fs::metadata(&image).unwrap().len() / 512;
    let small = scene.path("small.img");
    fs::write(&small, [0; 4096]).unwrap();
    let other = format!("has 8 sectors, and the guest has a disk of {sectors} sectors");
    let none = format!("the guest has a disk of {sectors} sectors, and no image was given");

    refused(&scene, &small, &["--tap", "tap0"], &other);
    let pollux = |arguments: &[&str], why: &str| {
        let output = scene.site.output(Command::new(pollux()).args(arguments));
        let said = stderr(&output);
        assert!(!output.status.success(), "{arguments:?}: {said}");
        assert!(said.contains(why), "{arguments:?}: {said}");
    };
    let live = ["replay", text(&recording), "--live", "--tap", "tap0"];
    pollux(&live, &none);
    pollux(&[&live[..], &["--disk", text(&small)]].concat(), &other);
    let snapshot = scene.guest.snapshot();
    let run = ["run", "--tap", "tap0", "--from-snapshot", text(&snapshot)];
    pollux(&run, &none);
    pollux(&[&run[..], &["--disk", text(&small)]].concat(), &other);
}

#[test]
fn a_state_saved_by_a_replay_goes_with_its_own_recording_only() {
    let name = "a_state_saved_by_a_replay_goes_with_its_own_recording_only";
    let Some(scene) = Scene::new(name) else {
        return;
    };
    let (first, second) = (scene.path("first"), scene.path("second"));
    Vm::stop(scene.record(&first, &[]));
    Vm::stop(scene.record(&second, &[]));
    let saved = scene.path("saved");
    save_on_the_way(&first, &saved);
    assert_whole(&replay(&first, &["--from", text(&saved)]));
    let refused = |from: &Path, recording: &Path| {
        let output = run(&["replay", text(recording), "--from", text(from)]);
        let said = stderr(&output);
        assert!(!output.status.success(), "not refused: {said}");
        let (log, state) = (recording.join("log"), from.join("state"));
        for part in [text(&log), "is the log of recording", text(&state)] {
            assert!(said.contains(part), "{said}");
        }
    };
    refused(&saved, &second);
    refused(&scene.guest.snapshot(), &first);
    // The log may have lost what is behind the state.
    let log = first.join("log");
    let bytes = fs::read(&log).unwrap();
    fs::write(&log, &bytes[..bytes.len() / 4]).unwrap();
    let output = run(&["replay", text(&first), "--from", text(&saved)]);
    let said = stderr(&output);
    assert!(
        !output.status.success() && said.contains("it was cut since"),
        "{said}"
    );
}

/// Saves where a replay has half of the log behind it: at the first exit from there on at which that is possible.
fn save_on_the_way(recording: &Path, to: &Path) {
    let dump = run(&["log", "dump", text(recording)]).stdout;
    let lines: Vec<_> = std::str::from_utf8(&dump).unwrap().lines().collect();
    let middle = lines[lines.len() / 2].split_whitespace().nth(1).unwrap();
    let middle: u64 = middle.parse().unwrap();
    let saved = (middle..middle + 16).any(|exit| {
        let exit = exit.to_string();
        let arguments = [
            "replay",
            text(recording),
            "--until",
            &exit,
            "--save",
            text(to),
        ];
        let output = run(&arguments);
        let said = stderr(&output);
        let later = said.contains("choose a later exit");
        assert!(output.status.success() || later, "{arguments:?}: {said}");
        !later
    });
    assert!(saved, "no state can be saved from exit {middle} on");
}
