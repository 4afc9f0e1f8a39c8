//! A protected VM on two hosts, as an operator runs it.

use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use harness::Stream;
use integration::pair::{Name, Pair};
use integration::{Site, Vm, copy_with_times, guest, pollux, stderr};
use rustix::process::Signal;

/// One VM at a time: two would keep each other waiting on a small machine.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A protected VM on host a.
fn protected(test: &str) -> Option<(Pair, std::fs::File)> {
    let mut pair = Pair::new(guest(test)?);
    pair.standby(Name::B);
    let keyboard = pair.primary(Name::A);
    pair.wait_for_protection(Name::A);
    Some((pair, keyboard))
}

#[test]
fn a_switch_over_loses_no_answer_and_the_old_primary_becomes_the_backup() {
    let _turn = turn();
    let name = "a_switch_over_loses_no_answer_and_the_old_primary_becomes_the_backup";
    let Some((mut pair, _keyboard)) = protected(name) else {
        return;
    };
    let mut counter = pair.connect();
    counter.count(5);
    // A snapshot of a protected VM stops nothing.
    let dir = tempfile::tempdir().unwrap();
    let snapshot = dir.path().join("snapshot");
    pair.ctl(Name::A, &["snapshot", snapshot.to_str().unwrap()])
        .unwrap();
    assert!(snapshot.join("state").metadata().unwrap().len() > 1 << 20);
    let status = pair.wait_for_protection(Name::A);
    assert!(
        status["last_transfer"]["bytes"].as_u64() > Some(1 << 20),
        "{status}"
    );
    counter.count(1);
    pair.ctl(Name::A, &["switch-over"]).unwrap();
    counter.count(5);
    let status = pair.wait_for_protection(Name::B);
    assert_eq!(status["peer"], "a");
    counter.count(5);
    let refused = pair.ctl(Name::A, &["switch-over"]).unwrap_err();
    assert!(refused.contains("primary"), "{refused}");
}

/// Beside the VM, with a copy of its disk; not with one that has moved on.
#[test]
fn a_snapshot_of_a_protected_vm_goes_on_with_the_disk_of_its_moment() {
    let _turn = turn();
    let name = "a_snapshot_of_a_protected_vm_goes_on_with_the_disk_of_its_moment";
    let Some((mut pair, _keyboard)) = protected(name) else {
        return;
    };
    let mut counter = pair.connect();
    counter.count(5);
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (snapshot, copy, later) = (path("snapshot"), path("copy.img"), path("later.img"));
    pair.ctl(Name::A, &["pause"]).unwrap();
    pair.ctl(Name::A, &["snapshot", snapshot.to_str().unwrap()])
        .unwrap();
    copy_with_times(&pair.disk(), &copy).unwrap();
    pair.ctl(Name::A, &["resume"]).unwrap();
    counter.count(5);
    std::fs::copy(&copy, &later).unwrap();
    let site = Site::new().unwrap();
    let restore = |disk: &Path| {
        let mut command = Command::new(pollux());
        command.arg("restore").arg(&snapshot).arg("--disk");
        command.arg(disk).args(["--tap", "tap0"]);
        command
    };
    let refused = site.output(&mut restore(&later));
    let said = stderr(&refused);
    assert!(
        !refused.status.success() && said.contains("has moved on"),
        "{said}"
    );
    let mut second = Vm::start(&site, &mut restore(&copy));
    second.insist("sync && echo up-$((40+2))", "up-42");
    Vm::stop(second);
    pair.wait_for_protection(Name::A);
    counter.count(5);
}

#[test]
fn a_killed_vmm_is_replaced_and_the_connection_goes_on() {
    let _turn = turn();
    let name = "a_killed_vmm_is_replaced_and_the_connection_goes_on";
    let Some((mut pair, _keyboard)) = protected(name) else {
        return;
    };
    let mut counter = pair.connect();
    counter.count(5);
    pair.ctl(Name::A, &["limits", "--lag-ms", "33"]).unwrap();
    pair.wait_for(Name::B, "the limits, which the log carries", |status| {
        status["limits"]["lag_ms"] == 33
    });
    pair.vmm(Name::A).signal(Signal::KILL).unwrap();
    counter.count(5);
    let status = pair.wait_for(Name::B, "a new primary", |s| s["role"] == "primary");
    let parts = status["last_failover"]["timeline"].as_array().unwrap();
    for part in ["log fixed", "log replayed", "epoch won", "VM runs"] {
        assert!(parts.iter().any(|p| p["name"] == part), "{part}: {status}");
    }
    assert_eq!(status["limits"]["lag_ms"], 33);
    // Redundancy comes back as soon as there is a host for it.
    pair.kill(Name::A);
    pair.standby(Name::A);
    pair.wait_for_protection(Name::B);
    pair.wait_for(Name::A, "the primary's limits", |status| {
        status["limits"]["lag_ms"] == 33
    });
    counter.count(5);
}

#[test]
fn a_guest_that_powers_itself_off_ends_both_sides_in_order() {
    let _turn = turn();
    let name = "a_guest_that_powers_itself_off_ends_both_sides_in_order";
    let Some((mut pair, mut keyboard)) = protected(name) else {
        return;
    };
    keyboard.write_all(b"poweroff\n").unwrap();
    for host in [Name::A, Name::B] {
        let status = pair.vmm(host).wait().unwrap();
        let said = pair.vmm(host).printed(Stream::Error);
        assert_eq!(status.code(), Some(0), "host {}: {said}", host.text());
        assert!(said.contains("PoweredOff"), "host {}: {said}", host.text());
    }
    // The record is closed: any host may start the VM again, and waits for nobody.
    pair.restore_disk();
    let _keyboard = pair.primary(Name::B);
    pair.wait_for(Name::B, "a primary", |status| status["role"] == "primary");
}

#[test]
fn after_the_loss_of_both_hosts_nothing_starts_by_itself_and_whoever_looks_is_told_what_to_do() {
    let _turn = turn();
    let name = "after_the_loss_of_both_hosts_nothing_starts_by_itself";
    let Some((mut pair, mut keyboard)) = protected(name) else {
        return;
    };
    pair.connect().count(5);
    let before = pair.disk_changed();
    keyboard.write_all(b"echo later > /data/b; sync\n").unwrap();
    harness::wait_for("a write to the disk", || {
        (pair.disk_changed() > before).then_some(())
    })
    .unwrap();
    pair.kill(Name::A);
    pair.kill(Name::B);
    for host in [Name::A, Name::B] {
        pair.standby(host);
    }
    for host in [Name::A, Name::B] {
        let status = pair.wait_for(host, "advice", |status| {
            let advice = status["advice"].as_array();
            advice.is_some_and(|all| all.iter().any(|a| a.to_string().contains("pollux run")))
        });
        assert_eq!(status["role"], "backup");
    }
    // A snapshot from before the loss does not fit the disk any more.
    pair.kill(Name::A);
    let _keyboard = pair.primary(Name::A);
    assert!(!pair.vmm(Name::A).wait().unwrap().success());
    let said = pair.vmm(Name::A).printed(Stream::Error);
    assert!(said.contains("has moved on"), "{said}");
    // One host alone does not know whether the other runs the VM.
    pair.kill(Name::B);
    pair.restore_disk();
    let _keyboard = pair.primary(Name::A);
    let status = pair.wait_for(Name::A, "a blocked start", |status| {
        status["advice"].to_string().contains("host-gone")
    });
    assert_eq!(status["role"], "booting");
    pair.ctl(Name::A, &["host-gone", "b"]).unwrap();
    pair.wait_for(Name::A, "a primary", |status| status["role"] == "primary");
}
