//! `pollux run` and `pollux restore`: a VM on its own, unless it is to be protected.

use std::path::Path;
use std::process::ExitCode;

use devices::Board;
use hypervisor::Vcpu;
use replay::NoLog;

use super::profiling::{self, Profiling};
use super::protect::protect;
use super::signals::stop_on_signal;
use super::{EXIT_RESET, Outcome};
use crate::cli::{RestoreOptions, RunOptions};
use crate::config::{VmOptions, merged};
use crate::console::Console;
use crate::io::{Disk, DiskError, DiskMode, Storage, Tap};
use crate::vm::{self, Backends, Ended, Host, KvmMachine, SnapshotMeta};

/// Boots a VM and runs it to its end.
///
/// # Errors
/// It cannot be made or run.
pub fn run(options: RunOptions) -> Outcome {
    let (vm, ft) = merged(options.vm, options.ft, options.config.as_deref())?;
    let snapshot = options.from_snapshot.as_deref();
    if ft.is_given() {
        return protect(&vm, &ft, snapshot);
    }
    let host = vm::probe_host()?;
    let disk = disk(&vm)?;
    let machine = boot_or_load(&vm, snapshot, &host, disk.as_ref())?;
    let backends = others(&vm, disk)?;
    let clocked = Clocked::start(machine.exit().0);
    let (ended, runner) = vm::run_live(machine, backends, NoLog, 0, Vec::new(), |sender| {
        if let Err(error) = stop_on_signal(sender) {
            tracing::warn!(%error, "signals are not handled");
        }
    })?;
    clocked.tell(runner.position().exit());
    Ok(tell(ended))
}

/// How many exits a VM made, and in which time.
pub struct Clocked {
    first_exit: u64,
    since_ns: u64,
}

impl Clocked {
    /// It begins to run, at this exit.
    pub fn start(first_exit: u64) -> Self {
        Self {
            first_exit,
            since_ns: vm::host_ns(),
        }
    }

    /// It has run up to this exit: tells the person.
    pub fn tell(&self, last_exit: u64) {
        eprintln!(
            "pollux: ran {} exits in {:.3} s",
            last_exit - self.first_exit,
            (vm::host_ns() - self.since_ns) as f64 / 1e9
        );
    }
}

/// Goes on with a VM from a snapshot.
///
/// # Errors
/// It cannot be read or run.
pub fn restore(options: &RestoreOptions) -> Outcome {
    let (machine, meta) = vm::restore_snapshot(&options.snapshot)?;
    let mut vm = options.vm.clone();
    vm.disk = vm.disk.or_else(|| meta.disk_path.clone());
    vm.tap = vm.tap.or_else(|| meta.tap.clone());
    let disk = disk(&vm)?;
    check_size(disk.as_ref(), machine.board())?;
    check_disk(disk.as_ref(), &meta)?;
    let backends = others(&vm, disk)?;
    let profiling = Profiling::start(options.profile.as_deref(), vm.kernel.as_deref(), || {
        machine.vcpu().kicker()
    })?;
    let sampling = profiling.as_ref().map(Profiling::command);
    let (ended, runner) = vm::run_live(machine, backends, NoLog, 0, Vec::new(), |sender| {
        if let Err(error) = stop_on_signal(sender) {
            tracing::warn!(%error, "signals are not handled");
        }
        if let Some(command) = sampling {
            sender.command(command);
        }
    })?;
    profiling::end(profiling, runner.emulated_instructions())?;
    Ok(tell(ended))
}

/// A machine from its kernel, or from a snapshot that `disk` belongs to.
///
/// # Errors
/// It cannot be made, or the disk is not the guest's, or not as it was.
pub fn boot_or_load(
    vm: &VmOptions,
    snapshot: Option<&Path>,
    host: &Host,
    disk: Option<&Disk>,
) -> Result<KvmMachine, Box<dyn std::error::Error>> {
    let Some(dir) = snapshot else {
        return Ok(vm::boot(vm, host, disk)?);
    };
    let (machine, meta) = vm::load_snapshot(dir, host)?;
    check_size(disk, machine.board())?;
    check_disk(disk, &meta)?;
    Ok(machine)
}

/// Refuses a VM whose guest has a disk to go on without one, or with one of another size: all of its requests
/// would fail, or those behind the image's end. An image for a guest that has no disk is a mistake, too.
///
/// # Errors
/// [`DiskError::None`], [`DiskError::OtherSize`], [`DiskError::Unwanted`].
pub fn check_size(disk: Option<&Disk>, board: &Board) -> Result<(), DiskError> {
    match (disk, &board.config().disk) {
        (Some(disk), Some(guests)) => disk.check_sectors(guests.sectors),
        (None, Some(guests)) => Err(DiskError::None {
            expected: guests.sectors,
        }),
        (Some(disk), None) => Err(DiskError::Unwanted(disk.path().to_owned())),
        (None, None) => Ok(()),
    }
}

/// Refuses a disk that has moved on since the snapshot.
fn check_disk(disk: Option<&Disk>, meta: &SnapshotMeta) -> Result<(), DiskError> {
    match (disk, &meta.disk) {
        (Some(disk), Some(identity)) => disk.check_identity(identity),
        _ => Ok(()),
    }
}

/// Opens the VM's disk.
///
/// # Errors
/// It cannot be opened.
pub fn disk(vm: &VmOptions) -> Result<Option<Disk>, crate::io::DiskError> {
    vm.disk
        .as_deref()
        .map(|path| Disk::open(path, DiskMode::Cached))
        .transpose()
}

/// Opens the files behind the VM's other devices.
///
/// # Errors
/// One cannot be opened.
pub fn others(vm: &VmOptions, disk: Option<Disk>) -> Result<Backends, Box<dyn std::error::Error>> {
    let tap = vm.tap.as_deref().map(Tap::open).transpose()?;
    let console = match &vm.console {
        Some(path) => Console::file(path)?,
        None => Console::stdio()?,
    };
    Ok(Backends {
        tap,
        disk: disk.map(Storage::new),
        console: Some(console),
        gap: None,
    })
}

/// Tells the person how the VM ended, and the exit code that says it to programs.
pub fn tell(ended: Ended) -> ExitCode {
    match ended {
        Ended::ByGuest => eprintln!("pollux: the guest has switched itself off"),
        Ended::ByCommand => eprintln!("pollux: stopped"),
        Ended::Reset => {
            eprintln!("pollux: the guest asked to be started again");
            return ExitCode::from(EXIT_RESET);
        }
    }
    ExitCode::SUCCESS
}

#[cfg(test)]
mod tests {
    use devices::{BoardConfig, DiskCache, DiskConfig};

    use super::*;

    fn board(sectors: Option<u64>) -> Board {
        let disk = sectors.map(|sectors| DiskConfig {
            sectors,
            identity: "pollux".to_owned(),
            cache: DiskCache::WriteBack,
        });
        Board::new(&BoardConfig {
            wall_clock_base_s: 0,
            net: None,
            disk,
            entropy: false,
        })
        .unwrap()
    }

    #[test]
    fn a_guest_goes_on_with_a_disk_of_its_size_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        std::fs::write(&path, [0; 4096]).unwrap();
        let disk = Disk::open(&path, DiskMode::Cached).unwrap();
        check_size(Some(&disk), &board(Some(8))).unwrap();
        check_size(None, &board(None)).unwrap();
        let unwanted = check_size(Some(&disk), &board(None)).unwrap_err();
        assert!(unwanted.to_string().contains("without a disk"));
        let said = |disk, sectors| {
            check_size(disk, &board(Some(sectors)))
                .unwrap_err()
                .to_string()
        };
        let without = said(None, 16);
        assert!(
            without.contains("16 sectors") && without.contains("--disk"),
            "{without}"
        );
        for sectors in [7, 9] {
            let other = said(Some(&disk), sectors);
            let (found, expected) = ("has 8 sectors", format!("of {sectors} sectors"));
            assert!(
                other.contains(found) && other.contains(&expected),
                "{other}"
            );
        }
    }
}
