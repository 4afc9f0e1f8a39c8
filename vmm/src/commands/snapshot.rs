//! `pollux snapshot`: boots a VM, waits until it is ready, and writes a snapshot of it.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use hypervisor::Vcpu;
use replay::NoLog;
use rustix::fs::{MemfdFlags, memfd_create};

use super::Outcome;
use super::profiling::{self, Profiling};
use super::run::{disk, others};
use super::signals::stop_on_signal;
use crate::cli::SnapshotOptions;
use crate::config::merged;
use crate::config_ft::FtOptions;
use crate::io::DiskIdentity;
use crate::vm::{self, Command, SnapshotError, SnapshotMeta, VcpuSender};

/// How often the console is looked at, and progress shown.
const LOOK_EVERY: Duration = Duration::from_millis(50);
const SHOW_EVERY: Duration = Duration::from_secs(10);

/// Boots, waits, writes.
///
/// # Errors
/// The VM cannot be made, is not ready in time, or the snapshot cannot be written.
pub fn snapshot(options: SnapshotOptions) -> Outcome {
    let (mut vm, _) = merged(options.vm, FtOptions::default(), options.config.as_deref())?;
    let host = vm::probe_host()?;
    // Without a name in any directory: nothing is left behind, however this ends.
    let unnamed = memfd_create("console", MemfdFlags::CLOEXEC)?;
    let ours = || PathBuf::from(format!("/proc/self/fd/{}", unnamed.as_raw_fd()));
    let console = vm.console.get_or_insert_with(ours).clone();
    let open = disk(&vm)?;
    let disk = open
        .as_ref()
        .map(|disk| (disk.path().to_owned(), disk.sectors()));
    let machine = vm::boot(&vm, &host, open.as_ref())?;
    let backends = others(&vm, open)?;
    let profiling = Profiling::start(options.profile.as_deref(), vm.kernel.as_deref(), || {
        machine.vcpu().kicker()
    })?;
    let sampling = profiling.as_ref().map(Profiling::command);
    let (done, outcome) = channel();
    let tap = vm.tap.clone();
    let out = options.out.clone();
    let wait = Wait {
        console,
        text: options.at,
        limit: options.timeout_s,
    };
    let ran = vm::run_live(machine, backends, NoLog, 0, Vec::new(), |sender| {
        if let Err(error) = stop_on_signal(sender) {
            tracing::warn!(%error, "signals are not handled");
        }
        if let Some(command) = sampling {
            sender.command(command);
        }
        watch(sender.clone(), wait, out, tap, disk, done);
    });
    let (_, runner) = ran?;
    profiling::end(profiling, runner.emulated_instructions())?;
    match outcome.try_recv() {
        Ok(Ok(())) => {
            eprintln!("pollux: snapshot written to {}", options.out.display());
            Ok(ExitCode::SUCCESS)
        }
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err("the VM ended before its snapshot was written".into()),
    }
}

struct Wait {
    console: PathBuf,
    text: String,
    limit: u64,
}

fn watch(
    sender: VcpuSender<Command>,
    wait: Wait,
    out: PathBuf,
    tap: Option<String>,
    disk: Option<(PathBuf, u64)>,
    done: Sender<Result<(), SnapshotError>>,
) {
    std::thread::spawn(move || {
        if !shown(&wait) {
            eprintln!("pollux: {:?} did not come in {} s", wait.text, wait.limit);
            sender.command(Command::Stop);
            return;
        }
        let stop = sender.clone();
        sender.command(Command::Save(Box::new(move |state, memory| {
            let written = identity(disk.as_ref()).and_then(|identity| {
                let disk_path = disk.map(|(path, _)| path);
                let meta = SnapshotMeta {
                    disk: identity,
                    disk_path,
                    tap,
                    ..SnapshotMeta::default()
                };
                vm::write_snapshot(&out, &meta, state, memory)
            });
            let _ = done.send(written);
            stop.command(Command::Stop);
        })));
    });
}

fn identity(disk: Option<&(PathBuf, u64)>) -> Result<Option<DiskIdentity>, SnapshotError> {
    let Some((path, sectors)) = disk else {
        return Ok(None);
    };
    Ok(Some(DiskIdentity::of_path(path, *sectors)?))
}

/// Waits until the console shows the text.
fn shown(wait: &Wait) -> bool {
    let started = Instant::now();
    let mut told = started;
    while started.elapsed() < Duration::from_secs(wait.limit) {
        if console_has(&wait.console, &wait.text) {
            let seconds = started.elapsed().as_secs_f64();
            eprintln!("pollux: {:?} came after {seconds:.1} s", wait.text);
            return true;
        }
        if told.elapsed() >= SHOW_EVERY {
            told = Instant::now();
            let last = last_line(&wait.console);
            eprintln!(
                "pollux: {:.0} s, the console says: {last}",
                started.elapsed().as_secs_f64()
            );
        }
        std::thread::sleep(LOOK_EVERY);
    }
    false
}

fn console_has(path: &Path, text: &str) -> bool {
    let bytes = std::fs::read(path).unwrap_or_default();
    !text.is_empty()
        && bytes
            .windows(text.len())
            .any(|window| window == text.as_bytes())
}

fn last_line(path: &Path) -> String {
    let bytes = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    text.lines()
        .rev()
        .find(|line| !line.trim().is_empty())
        .unwrap_or("nothing yet")
        .to_owned()
}
