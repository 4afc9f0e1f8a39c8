//! `pollux run --protect` and `pollux standby`: a VM that survives its host.

use std::process::ExitCode;
use std::sync::Arc;

use super::run::{boot_or_load, merged};
use super::{EXIT_RESET, Outcome};
use crate::api;
use crate::cli::{RunOptions, StandbyOptions};
use crate::config::{self, VmOptions};
use crate::config_ft::FtOptions;
use crate::io::{Disk, DiskMode};
use crate::session::{Cold, Devices, FtSettings, Session, SessionControl, SessionEnd};
use crate::vm;

/// Boots or restores a VM and protects it.
///
/// # Errors
/// It cannot be made, or is lost on this host.
pub fn protect(options: RunOptions) -> Outcome {
    let (vm_options, ft) = both(options.vm, options.ft, options.config.as_deref())?;
    let settings = FtSettings::new(ft.check()?, vm_options.api.as_deref())?;
    let host = vm::probe_host()?;
    // Only looked at: it is opened for use once the epoch is won.
    let image = vm_options
        .disk
        .as_deref()
        .map(|path| Disk::open(path, DiskMode::Shared))
        .transpose()?;
    let snapshot = options.from_snapshot.as_deref();
    let machine = boot_or_load(&vm_options, snapshot, &host, image.as_ref())?;
    // Until then another host may run the VM on it.
    let disk = match (snapshot, &image) {
        (Some(_), Some(image)) => Some(image.identity()?),
        _ => None,
    };
    drop(image);
    let cold = Cold { machine, disk };
    run(
        Session::new(settings, devices(&vm_options), host, Some(cold))?,
        &vm_options,
    )
}

/// Waits for work.
///
/// # Errors
/// What cannot be had.
pub fn standby(options: StandbyOptions) -> Outcome {
    let (vm_options, ft) = both(options.vm, options.ft, options.config.as_deref())?;
    let settings = FtSettings::new(
        FtOptions {
            protect: true,
            ..ft
        }
        .check()?,
        vm_options.api.as_deref(),
    )?;
    let host = vm::probe_host()?;
    run(
        Session::new(settings, devices(&vm_options), host, None)?,
        &vm_options,
    )
}

fn both(
    vm: VmOptions,
    ft: FtOptions,
    file: Option<&std::path::Path>,
) -> Result<(VmOptions, FtOptions), config::ConfigError> {
    let from_file = file.map(config::read_file::<config::File>).transpose()?;
    let ft = match from_file {
        Some(from_file) => ft.over(from_file.ft),
        None => ft,
    };
    Ok((merged(vm, file)?, ft))
}

fn devices(vm: &VmOptions) -> Devices {
    Devices {
        tap: vm.tap.clone(),
        disk: vm.disk.clone(),
        console: vm.console.clone(),
    }
}

fn run(session: Session, vm: &VmOptions) -> Outcome {
    let handle = session.handle();
    let control = Arc::new(SessionControl::new(
        handle.sender.clone(),
        Arc::clone(&handle.log),
    ));
    let api = vm
        .api
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
