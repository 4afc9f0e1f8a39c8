//! A recording that is cut after a random entry and goes live from there: the guest answers on console and
//! network, switches itself off, and its file system is clean.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::process::Command;

use integration::{Random, Vm, amount, pollux};

use crate::scene::{self, Scene, assert_whole, replay};

#[test]
fn cut_at_random_entries_the_guest_goes_live_with_a_clean_disk() {
    let name = "cut_at_random_entries_the_guest_goes_live_with_a_clean_disk";
    let Some(mut scene) = Scene::new(name) else {
        return;
    };
    let mut random = Random::seeded(name);
    let recording = scene.path("recording");
    scene::record_traffic(&scene, &recording);
    let report = replay(&recording, &[]);
    assert_whole(&report);
    let entries = report["entries"].as_u64().unwrap();
    let cuts = amount("POLLUX_CUTS", 4);
    for done in 1..=cuts {
        let entry = 1 + random.below(entries - 1);
        let outcome = catch_unwind(AssertUnwindSafe(|| go_live(&scene, &recording, entry)));
        if let Err(panic) = outcome {
            scene.disk("disk.img");
            let kept = scene.keep().display().to_string();
            eprintln!(
                "cut after entry {entry} of {entries}\nrerun, with a TAP tap0 and a copy of \
                 {kept}/disk.img as DISK: pollux replay {kept}/recording --entries {entry} --live \
                 --tap tap0 --disk DISK"
            );
            resume_unwind(panic);
        }
        if done % 50 == 0 {
            eprintln!("{name}: {done} of {cuts} cuts went live");
        }
    }
    eprintln!("{name}: {cuts} cuts of {entries} entries went live");
}

fn go_live(scene: &Scene, recording: &Path, entry: u64) {
    let disk = scene.disk("live.img");
    let mut command = Command::new(pollux());
    command
        .arg("replay")
        .arg(recording)
        .args(["--entries", &entry.to_string()])
        .args(["--live", "--tap", "tap0", "--disk"])
        .arg(&disk);
    let mut vm = Vm::start(&scene.site, &mut command);
    vm.wait_for("identical");
    vm.insist("echo alive-$((6*7))", "alive-42");
    let pong = scene.site.redis().and_then(|mut redis| redis.ask("PING"));
    assert_eq!(pong.unwrap(), "+PONG", "{}", vm.said());
    // What `poweroff` does, without a process.
    vm.ask("kill -USR2 1", "init: stopped, disk unmounted");
    let status = vm.wait();
    assert!(status.success(), "{status}{}", vm.said());
    let checked = Command::new("e2fsck").arg("-fn").arg(&disk).output();
    let checked = checked.expect("e2fsprogs are installed (scripts/setup)");
    assert!(
        checked.status.success(),
        "{}{}",
        String::from_utf8_lossy(&checked.stdout),
        vm.said()
    );
}
