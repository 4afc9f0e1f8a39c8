//! `pollux record`: a VM and its log in a directory.

use std::process::ExitCode;

use hypervisor::Vcpu;
use replay::{RecordingId, RecordingWriter};
use rustix::rand::{GetRandomFlags, getrandom};

use super::Outcome;
use super::run::{Clocked, boot_or_load, disk, others, tell};
use super::signals::stop_on_signal;
use crate::cli::RecordOptions;
use crate::config::merged;
use crate::config_ft::FtOptions;
use crate::vm::{self, SnapshotMeta};

/// Boots or restores a VM, records it to its end, and closes the recording.
///
/// # Errors
/// It cannot be made, run or written. What was recorded stays as an incomplete recording.
pub fn record(options: RecordOptions) -> Outcome {
    let (vm, _) = merged(options.vm, FtOptions::default(), options.config.as_deref())?;
    let host = vm::probe_host()?;
    let disk = disk(&vm)?;
    let mut machine = boot_or_load(&vm, options.from_snapshot.as_deref(), &host, disk.as_ref())?;
    let backends = others(&vm, disk)?;
    let writer = RecordingWriter::create(&options.out, new_id()?)?;
    let state = machine
        .save()?
        .expect("a machine that has not run is at rest");
    let meta = SnapshotMeta::of_recording(Some(writer.id()), 0);
    vm::write_state(&writer.state_path(), &meta, &state, machine.memory())?;
    drop(state);
    machine.set_dirty_log(true)?;
    let kicker = machine.vcpu().kicker();
    let disturbed = options.disturb.then(|| disturb(kicker)).transpose()?;
    let clocked = Clocked::start(machine.exit().0);
    let (ended, runner) = vm::run_live(machine, backends, writer, 0, Vec::new(), |sender| {
        if let Err(error) = stop_on_signal(sender) {
            tracing::warn!(%error, "signals are not handled");
        }
    })?;
    drop(disturbed);
    clocked.tell(runner.position().exit());
    let (end, recorder) = runner.close_log()?;
    let stats = recorder.stats();
    let (_, _, writer) = recorder.into_parts();
    let path = writer.close()?;
    let _ = tell(ended);
    eprintln!(
        "pollux: recorded {} deltas with {} pages, {} kicks, {} bytes of log, end \
         state {:016x}: {}",
        stats.deltas,
        stats.delta_pages,
        stats.kicks,
        stats.log_bytes,
        end.memory,
        path.display()
    );
    Ok(ExitCode::SUCCESS)
}

fn new_id() -> std::io::Result<RecordingId> {
    let mut id = [0; 16];
    getrandom(&mut id[..], GetRandomFlags::empty())?;
    Ok(RecordingId(id))
}

/// Kicks the vCPU at random moments until it is dropped.
struct Disturbance {
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

fn disturb(kicker: hypervisor::Kicker) -> std::io::Result<Disturbance> {
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let theirs = std::sync::Arc::clone(&stop);
    let thread = std::thread::Builder::new()
        .name("disturb".to_owned())
        .spawn(move || {
            let mut random = vm::host_ns() | 1;
            while !theirs.load(std::sync::atomic::Ordering::Relaxed) {
                // Marsaglia's xorshift: only the moments have to be irregular.
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                std::thread::sleep(std::time::Duration::from_micros(random % 3_000));
                kicker.kick();
            }
        })?;
    Ok(Disturbance {
        stop,
        thread: Some(thread),
    })
}

impl Drop for Disturbance {
    fn drop(&mut self) {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
