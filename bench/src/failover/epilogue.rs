//! After the last run: whether the disk holds what the guest believes.
//!
//! The guest's Redis server has written every change to its disk. It is asked for all its keys and to have its
//! disk hold them, and the guest is switched off, as by pulling its plug. Then the journal of its file system is
//! replayed and the file system checked, in a copy, and another Redis server loads the same file: it must hold
//! the same.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use harness::Host;

use crate::Failure;
use crate::stage::{GUEST_REDIS, SiteId, Stage};

/// How long a guest may take to power off, and a quarantine to end.
const LIMIT: Duration = Duration::from_secs(120);
/// A key whose write is the last, and on the disk before it is answered.
const LAST_KEY: &str = "pollux-bench:last";
/// Where the guest's Redis server keeps its files, in the file system of the disk.
const REDIS_DIRECTORY: &str = "/";
/// Address of the server that loads the file.
const CHECK_REDIS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 6379);
/// Keys read at a time.
const KEYS_AT_A_TIME: usize = 100;

/// Makes the guest's Redis server write every change to its disk.
pub(crate) fn write_to_disk(client: &Host) -> Result<(), Failure> {
    for (name, value) in [
        ("auto-aof-rewrite-min-size", "8mb"),
        ("appendfsync", "everysec"),
        ("appendonly", "yes"),
    ] {
        redis(client, GUEST_REDIS, &["CONFIG", "SET", name, value])?;
    }
    Ok(())
}

/// Powers the guest off and compares. `primary` is where it runs.
pub(super) fn compare(stage: &mut Stage, primary: SiteId) -> Result<(), Failure> {
    let client = stage.client().clone();
    redis(
        &client,
        GUEST_REDIS,
        &["CONFIG", "SET", "appendfsync", "always"],
    )?;
    redis(&client, GUEST_REDIS, &["SET", LAST_KEY, "written"])?;
    let believed = all_keys(&client, GUEST_REDIS)?;
    let patience = stage.patience().clone();
    patience.wait_until("the quarantine of old writes to end", LIMIT, || {
        Ok(stage
            .status(primary)
            .is_some_and(|status| !status.quarantine))
    })?;
    stage.power_off(primary)?;
    patience.wait_until("the guest to power off", LIMIT, || {
        let vmm = stage.vmm(primary);
        Ok(vmm.is_none_or(|vmm| vmm.process().try_wait().is_some()))
    })?;
    let directory = tempfile::tempdir()?;
    let disk = directory.path().join("disk.img");
    std::fs::copy(stage.disk(), &disk)?;
    check_file_system(&disk)?;
    let directory = tempfile::tempdir()?;
    extract(&disk, directory.path())?;
    let held = load(&client, directory.path())?;
    if believed == held {
        eprintln!(
            "failover: the disk holds the {} keys that the guest believes in",
            held.len()
        );
        return Ok(());
    }
    let same = believed
        .iter()
        .filter(|(k, v)| held.get(*k) == Some(v))
        .count();
    let (all, on_disk) = (believed.len(), held.len());
    Err(format!("the disk does not hold what the guest believed: {all} keys believed, {on_disk} on the disk, {same} the same").into())
}

/// Replays the journal, as the guest would on its next start; then nothing may be wrong.
fn check_file_system(disk: &Path) -> Result<(), Failure> {
    // 1 is "errors were corrected", which is what replaying a journal counts as.
    let (replay, check) = (&["-y", "-E", "journal_only"][..], &["-f", "-n"][..]);
    for (options, right) in [(replay, [0, 1]), (check, [0, 0])] {
        let output = Command::new("e2fsck").args(options).arg(disk).output()?;
        if !output
            .status
            .code()
            .is_some_and(|code| right.contains(&code))
        {
            let (status, said) = (output.status, String::from_utf8_lossy(&output.stdout));
            let damaged = "the guest's file system is damaged: e2fsck";
            return Err(format!("{damaged} {}: {status}\n{said}", options.join(" ")).into());
        }
    }
    Ok(())
}

/// Copies the files of the disk's file system.
fn extract(disk: &Path, to: &Path) -> Result<(), Failure> {
    let dump = format!("rdump {REDIS_DIRECTORY} {}", to.display());
    let output = Command::new("debugfs")
        .args(["-R", &dump])
        .arg(disk)
        .output()?;
    if output.status.success() && to.join("appendonlydir").is_dir() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("no Redis files can be read from the disk: {said}").into())
}

/// What another Redis server makes of these files.
fn load(host: &Host, directory: &Path) -> Result<BTreeMap<String, String>, Failure> {
    // Debian's redis-tools holds the server under another name: it goes by the one that it is called by.
    let mut command = Command::new("redis-check-rdb");
    command
        .arg0("redis-server")
        .args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "yes"])
        .arg("--dir")
        .arg(directory);
    let mut server = host.spawn(&mut command)?;
    server.wait_for_line("Ready to accept connections")?;
    all_keys(host, CHECK_REDIS)
}

fn all_keys(host: &Host, server: SocketAddr) -> Result<BTreeMap<String, String>, Failure> {
    let said = redis(host, server, &["KEYS", "*"])?;
    let keys: Vec<&str> = said.lines().filter(|key| !key.is_empty()).collect();
    let mut all = BTreeMap::new();
    for some in keys.chunks(KEYS_AT_A_TIME) {
        let said = redis(host, server, &[&["MGET"], some].concat())?;
        let values = said.lines().map(str::to_owned);
        all.extend(some.iter().map(|key| (*key).to_owned()).zip(values));
    }
    if all.is_empty() {
        return Err(format!("the server at {server} holds no keys").into());
    }
    Ok(all)
}

fn redis(host: &Host, server: SocketAddr, words: &[&str]) -> Result<String, Failure> {
    let (address, port) = (server.ip().to_string(), server.port().to_string());
    // One value a line: no value of ours holds a line end.
    let to = ["-h", &address, "-p", &port, "--raw", "-e"];
    Ok(host.command("redis-cli", &[&to, words].concat())?)
}
