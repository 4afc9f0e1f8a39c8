//! `pollux run --protect` and `pollux standby`: a VM that survives its host.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use super::run::boot_or_load;
use super::{EXIT_RESET, Outcome};
use crate::api;
use crate::cli::StandbyOptions;
use crate::config::{VmOptions, merged};
use crate::config_ft::FtOptions;
use crate::io::{Disk, DiskMode};
use crate::session::{Cold, Devices, FtSettings, Session, SessionControl, SessionEnd};
use crate::vm;

/// Boots or restores a VM and protects it.
///
/// # Errors
/// It cannot be made, or is lost on this host.
pub fn protect(vm: &VmOptions, ft: &FtOptions, snapshot: Option<&Path>) -> Outcome {
    let settings = FtSettings::new(ft.check()?)?;
    let host = vm::probe_host()?;
    // Only looked at: it is opened for use once the epoch is won.
    let image = vm
        .disk
        .as_deref()
        .map(|path| Disk::open(path, DiskMode::Shared))
        .transpose()?;
    let machine = boot_or_load(vm, snapshot, &host, image.as_ref())?;
    // Until then another host may run the VM on it.
    let disk = match (snapshot, &image) {
        (Some(_), Some(image)) => Some(image.identity()?),
        _ => None,
    };
    drop(image);
    let cold = Cold { machine, disk };
    run(settings, vm, host, Some(cold))
}

/// Waits for work.
///
/// # Errors
/// What cannot be had.
pub fn standby(options: StandbyOptions) -> Outcome {
    let (vm, ft) = merged(options.vm, options.ft, options.config.as_deref())?;
    let ft = FtOptions {
        protect: true,
        ..ft
    };
    let settings = FtSettings::new(ft.check()?)?;
    run(settings, &vm, vm::probe_host()?, None)
}

fn devices(vm: &VmOptions) -> Devices {
    Devices {
        tap: vm.tap.clone(),
        disk: vm.disk.clone(),
        console: vm.console.clone(),
    }
}

fn run(settings: FtSettings, vm: &VmOptions, host: vm::Host, cold: Option<Cold>) -> Outcome {
    let api = settings.ft.api.clone();
    let session = Session::new(settings, devices(vm), host, cold)?;
    let handle = session.handle();
    let control = Arc::new(SessionControl::new(
        handle.sender.clone(),
        Arc::clone(&handle.log),
    ));
    let api = api
        .as_deref()
        .map(|path| api::Server::start(path, control))
        .transpose()?;
    super::signals::on_stop(move || handle.stop())?;
    let end = session.run();
    drop(api);
    let SessionEnd { leave, reset } = end?;
    eprintln!("pollux: ended: {leave:?}");
    if reset {
        eprintln!("pollux: the guest asked to be started again");
        return Ok(ExitCode::from(EXIT_RESET));
    }
    Ok(ExitCode::SUCCESS)
}
