//! What a VM must not be given: refused with a message that names the cause.

use std::fs;
use std::path::Path;
use std::process::Command;

use integration::{Vm, pollux};

use crate::scene::{Scene, text};

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
    refused(
        &scene,
        &scene.path("recorded.img"),
        &["--tap", "tap1"],
        "in use",
    );
    refused(&scene, &other, &["--tap", "tap0"], "tap0");
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
