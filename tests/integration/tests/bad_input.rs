//! Bad input: a clear message that names the cause, and an exit code that is not 0.

use std::fs;

use harness::privileges;
use integration::{pollux, run, stderr};

/// Runs and expects failure with a message that contains `part`.
fn refused(arguments: &[&str], part: &str) {
    let output = run(arguments);
    assert!(!output.status.success(), "{arguments:?} succeeded");
    assert!(
        stderr(&output).contains(part),
        "{arguments:?}: {}",
        stderr(&output)
    );
}

#[test]
fn what_is_missing_is_named() {
    refused(&["replay", "/nowhere/recording"], "/nowhere/recording");
    refused(&["log", "stat", "/nowhere/recording"], "/nowhere/recording");
    refused(&["ctl", "/nowhere/api.sock", "status"], "/nowhere/api.sock");
    refused(&["standby"], "host");
    refused(
        &["run", "--config", "/nowhere/pollux.toml"],
        "/nowhere/pollux.toml",
    );
}

#[test]
fn a_guest_that_cannot_be_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (empty, foreign, archive) = (path("empty"), path("foreign"), path("archive"));
    fs::write(&empty, []).unwrap();
    fs::copy(std::env::current_exe().unwrap(), &foreign).unwrap();
    fs::write(&archive, []).unwrap();
    let boot = |kernel: &str, why: &str| {
        refused(&["run", "--kernel", kernel, "--initramfs", &archive], why);
    };
    if !privileges::kvm("a_guest_that_cannot_be_is_refused_with_the_reason") {
        return;
    }
    boot("/nowhere/vmlinuz", "/nowhere/vmlinuz");
    let empty_why = format!("{empty}: not a Linux kernel for x86-64: the file is empty");
    boot(&empty, &empty_why);
    // This test is a program.
    boot(&foreign, &format!("{foreign}: no kallsyms token table"));
    let small = [
        "run",
        "--memory",
        "16",
        "--kernel",
        &empty,
        "--initramfs",
        &archive,
    ];
    refused(&small, "96 to");
    let disk = ["run", "--disk", "/nowhere/disk.img", "--kernel", &empty];
    refused(&disk, "/nowhere/disk.img");
    refused(&["restore", "/nowhere/snapshot"], "/nowhere/snapshot");
}

#[test]
fn a_host_without_kvm_is_named_as_such() {
    if !privileges::root("a_host_without_kvm_is_named_as_such") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // A mount namespace of its own, in which /dev has nothing.
    let output = std::process::Command::new("unshare")
        .args([
            "-m",
            "sh",
            "-c",
            r#"mount -t tmpfs none /dev && exec "$0" restore "$1""#,
        ])
        .arg(pollux())
        .arg(dir.path())
        .output()
        .expect("unshare is part of Debian");
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(said.contains("/dev/kvm does not exist"), "{said}");
}

#[test]
fn a_configuration_with_an_unknown_key_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pollux.toml");
    fs::write(&file, "[vm]\nmemroy = 256\n").unwrap();
    refused(&["run", "--config", file.to_str().unwrap()], "memroy");
}

/// Were the table not looked at, this would be a VM on its own, on a disk that others may have.
#[test]
fn a_configuration_alone_asks_for_protection() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pollux.toml");
    fs::write(&file, "[vm]\nkernel = '/nowhere'\n[ft]\nprotect = true\n").unwrap();
    refused(&["run", "--config", file.to_str().unwrap()], "--host NAME");
}

#[test]
fn a_log_of_something_else_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("log"), vec![7; 4096]).unwrap();
    refused(
        &["log", "dump", dir.path().to_str().unwrap()],
        "not a Pollux log",
    );
}

#[test]
fn an_unknown_kind_of_entry_is_answered_with_those_that_there_are() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("log"), []).unwrap();
    refused(
        &["log", "grep", dir.path().to_str().unwrap(), "--kind", "Tme"],
        "NetRx",
    );
}
