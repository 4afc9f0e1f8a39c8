//! A VM that is switched off and started again from its kernel: what was written to its disk is there. The
//! second start is recorded from its first instruction to power-off, and replayed.

use std::process::Command;

use integration::{Guest, Vm, pollux};

use crate::scene::{Scene, assert_whole, replay};

/// Has the guest switch itself off, as `poweroff` does but without a process.
fn power_off(vm: &mut Vm) {
    vm.ask("kill -USR2 1", "init: stopped, disk unmounted");
    let status = vm.wait();
    assert!(status.success(), "{status}{}", vm.said());
}

#[test]
fn a_file_on_the_disk_survives_a_restart_and_a_boot_to_power_off_replays_identically() {
    let name = "a_file_on_the_disk_survives_a_restart_and_a_boot_to_power_off_replays_identically";
    let Some(scene) = Scene::new(name) else {
        return;
    };
    let disk = scene.disk("disk.img");
    let mut command = Command::new(pollux());
    command.arg("restore").arg(scene.guest.snapshot());
    command.args(["--tap", "tap0", "--disk"]).arg(&disk);
    let mut vm = Vm::start(&scene.site, &mut command);
    vm.ask("echo ke''pt-$((5*5)) > /data/a; echo w-$((1+1))", "w-2");
    power_off(&mut vm);

    let recording = scene.path("recording");
    let mut command = Command::new(pollux());
    command
        .args(["record", "--memory", "128", "--append", "pollux.redis=off"])
        .args(Guest::boot_flags())
        .arg("--disk")
        .arg(&disk)
        .arg("--out")
        .arg(&recording);
    let mut vm = Vm::start(&scene.site, &mut command);
    vm.wait_for("READY");
    vm.ask("cat /data/a", "kept-25");
    power_off(&mut vm);
    let report = replay(&recording, &["--disturb"]);
    eprintln!("{name}: {report}");
    assert_whole(&report);
}
