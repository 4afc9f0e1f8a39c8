//! `pollux replay`: runs a recording again and compares.

use std::path::Path;
use std::process::ExitCode;

use devices::{Effect, RequestId};
use format::{ControlOp, DiskStatus, Entry, EntryReader, Event, ExitNumber, Tail};
use hypervisor::kvm::{KvmVcpu, KvmVm};
use replay::{
    NoLog, RecordingError, RecordingId, RecordingReader, ReplayError, Replayed, Replayer,
};
use serde::Serialize;
use thiserror::Error;

use super::Outcome;
use super::run::{check_size, disk, others, tell};
use super::saves;
use super::signals::stop_on_signal;
use crate::cli::ReplayOptions;
use crate::io::{Disk, DiskError};
use crate::vm::{self, EndState, STATE_FILE, SnapshotMeta, host_ns};

/// Why a replay did not come to its end.
#[derive(Debug, Error)]
enum Failure {
    #[error(transparent)]
    Recording(#[from] RecordingError),
    #[error(transparent)]
    Replay(#[from] ReplayError),
    #[error(transparent)]
    Machine(#[from] replay::MachineError),
    #[error(transparent)]
    Memory(#[from] hypervisor::RamError),
    #[error("the recording's end state does not decode: {0}")]
    End(#[from] postcard::Error),
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The log is shorter than it was when the state was saved.
    #[error(
        "the state lies behind {entries} entries of the recording, which has {missing} less: \
         it was cut since, replay it from its own state"
    )]
    Short { entries: u64, missing: u64 },
    /// Not a failure: --until or --entries is reached.
    #[error("the point asked for is reached")]
    Reached,
}

/// What a replay came to.
#[derive(Debug, Serialize)]
struct Report {
    exits: u64,
    entries: u64,
    log_bytes: usize,
    seconds: f64,
    virtual_seconds: f64,
    /// Whether the replay came to the end of a recording that was closed in order. Otherwise it stopped where it
    /// was asked to, or at the last whole frame of a recording that was cut.
    complete: bool,
    /// Whether it stopped where it was asked to.
    stopped: bool,
    /// Whether the hashes of memory, registers, FPU and devices were compared at the end.
    end_compared: bool,
}

/// Replays a recording.
///
/// # Errors
/// It cannot be read, or diverges.
pub fn replay(options: &ReplayOptions) -> Outcome {
    if let Some(count) = options.saves {
        return saves::run(options, count);
    }
    let reader = RecordingReader::open(&options.recording)?;
    let state = match &options.from {
        Some(dir) => dir.join(STATE_FILE),
        None => reader.state_path(),
    };
    let id = id_of(&reader, &state)?;
    let host = vm::probe_host()?;
    let (machine, meta) = vm::load_state(&state, &host)?;
    let disk = if options.live {
        let disk = disk(&options.vm)?;
        check_size(disk.as_ref(), machine.board())?;
        disk
    } else {
        None
    };
    let mut run = Run {
        disk,
        first: machine.exit(),
        replayer: Replayer::new(machine),
        options,
        behind: meta.entries,
        entries: 0,
        end_compared: false,
        started: host_ns(),
    };
    let tail = match reader.for_each_body(|_, body| run.body(body)) {
        Ok(tail) => Some(tail),
        Err(Failure::Reached) => None,
        Err(Failure::Replay(ReplayError::Divergence(mut divergence))) => {
            divergence.after = entries_from(&reader, meta.entries + run.entries);
            return Err(ReplayError::Divergence(divergence).into());
        }
        Err(error) => return Err(error.into()),
    };
    if run.behind > 0 {
        return Err(Failure::Short {
            entries: meta.entries,
            missing: run.behind,
        }
        .into());
    }
    let report = Report {
        exits: run.replayer.machine().exit().0 - run.first.0,
        entries: run.entries,
        log_bytes: reader.log_bytes(),
        seconds: (host_ns() - run.started) as f64 / 1e9,
        virtual_seconds: run.replayer.machine().board().now().0 as f64 / 1e9,
        complete: tail == Some(Tail::Closed),
        stopped: tail.is_none(),
        end_compared: run.end_compared,
    };
    tell_report(&report, options.json)?;
    if let Some(dir) = &options.save {
        save(&mut run.replayer, id, meta.entries + run.entries, dir)?;
    }
    if options.live {
        return go_live(run.replayer, run.disk, options);
    }
    Ok(ExitCode::SUCCESS)
}

/// How many entries after a divergence are shown.
const ENTRIES_AFTER: usize = 8;

/// Some entries of the log, from this one on, for a report.
fn entries_from(reader: &RecordingReader, first: u64) -> Vec<String> {
    let mut left = first;
    let mut lines = Vec::new();
    // Damage further on does not hide what the report is of.
    let _ = reader.for_each_body(|_, body| {
        for entry in EntryReader::new(body) {
            let entry = entry.map_err(ReplayError::from)?;
            if left > 0 {
                left -= 1;
            } else if lines.len() < ENTRIES_AFTER {
                lines.push(replay::line(&entry));
            } else {
                return Err(Failure::Reached);
            }
        }
        Ok(())
    });
    lines
}

/// The id of the recording, which must be that of the state it is replayed from. No host is needed for that.
///
/// # Errors
/// The state is bad, or another recording's.
pub(super) fn id_of(
    reader: &RecordingReader,
    state: &Path,
) -> Result<Option<RecordingId>, Box<dyn std::error::Error>> {
    let id = vm::read_meta(state)?.recording;
    reader.check_state(state, id)?;
    Ok(id)
}

/// Saves the state where the replay of this recording stands: behind so many of its entries.
fn save(
    replayer: &mut Replayer<KvmVm, KvmVcpu>,
    recording: Option<RecordingId>,
    entries: u64,
    dir: &Path,
) -> Result<(), Box<dyn std::error::Error>> {
    let Some(state) = replayer.save()? else {
        return Err(
            "no state can be saved within an access of several exits: choose a later exit".into(),
        );
    };
    let memory = replayer.machine().memory();
    let meta = SnapshotMeta::of_recording(recording, entries);
    vm::write_snapshot(dir, &meta, &state, memory)?;
    eprintln!(
        "pollux: saved at exit {} to {}",
        state.exit(),
        dir.display()
    );
    Ok(())
}

struct Run<'a> {
    /// Gets what the recording is known to have written.
    disk: Option<Disk>,
    replayer: Replayer<KvmVm, KvmVcpu>,
    options: &'a ReplayOptions,
    first: ExitNumber,
    /// Entries of the log that are behind the state from which the replay began, and still to be passed over.
    behind: u64,
    entries: u64,
    end_compared: bool,
    started: u64,
}

impl Run<'_> {
    fn body(&mut self, body: &[u8]) -> Result<(), Failure> {
        for entry in EntryReader::new(body) {
            let entry = entry.map_err(ReplayError::from)?;
            if self.behind > 0 {
                self.behind -= 1;
                continue;
            }
            if self.options.until.is_some_and(|until| entry.exit.0 > until) {
                let until = ExitNumber(self.options.until.unwrap_or_default());
                self.replayer.advance(until, &|| false)?;
                return Err(Failure::Reached);
            }
            if self.options.entries == Some(self.entries) {
                return Err(Failure::Reached);
            }
            self.write_to_disk(&entry)?;
            self.entries += 1;
            let replayed = self.replayer.entry(&entry, &|| false)?;
            if let Replayed::Control(ControlOp::Mark, bytes) = replayed {
                self.compare_end(&postcard::from_bytes(&bytes)?)?;
            }
            if self.options.disturb && self.entries.is_multiple_of(53) {
                self.replayer.machine().memory().drop_mappings()?;
            }
        }
        Ok(())
    }

    /// Before the completion of a write is replayed: brings the write to the disk.
    fn write_to_disk(&mut self, entry: &Entry<'_>) -> Result<(), Failure> {
        let Some(disk) = &self.disk else {
            return Ok(());
        };
        let Event::DiskDone {
            request,
            status: DiskStatus::Ok,
            ..
        } = entry.event
        else {
            return Ok(());
        };
        self.replayer.advance(entry.exit, &|| false)?;
        for effect in self.replayer.machine().board().outstanding() {
            if let Effect::DiskWrite { id, sector, data } = effect
                && id == RequestId(request)
            {
                disk.write(sector, &data)?;
            }
        }
        Ok(())
    }

    fn compare_end(&mut self, expected: &EndState) -> Result<(), Failure> {
        let machine = self.replayer.machine_mut();
        while !machine.come_to_rest()? {}
        let found = EndState::of(machine)?;
        for ((what, expected), (_, found)) in expected.parts().into_iter().zip(found.parts()) {
            self.replayer.compare_end(what, expected, found)?;
        }
        self.end_compared = true;
        Ok(())
    }
}

fn tell_report(report: &Report, json: bool) -> Result<(), serde_json::Error> {
    if json {
        println!("{}", serde_json::to_string(report)?);
        return Ok(());
    }
    if !report.complete && !report.stopped {
        eprintln!("pollux: the recording was cut: replayed up to its last whole frame");
    }
    println!(
        "replayed {} exits and {} entries in {:.3} s ({:.3} s of virtual time): identical{}",
        report.exits,
        report.entries,
        report.seconds,
        report.virtual_seconds,
        if report.end_compared {
            ", memory, registers, FPU and devices at the end too"
        } else {
            ""
        }
    );
    Ok(())
}

fn go_live(
    replayer: Replayer<KvmVm, KvmVcpu>,
    disk: Option<Disk>,
    options: &ReplayOptions,
) -> Outcome {
    let backends = others(&options.vm, disk)?;
    let (machine, recent, unconfirmed) = replayer.into_live();
    let pending = recent.into_iter().chain(unconfirmed).collect();
    let (ended, _) = vm::run_live(machine, backends, NoLog, 0, pending, |sender| {
        if let Err(error) = stop_on_signal(sender) {
            tracing::warn!(%error, "signals are not handled");
        }
    })?;
    let _ = tell(ended);
    Ok(ExitCode::SUCCESS)
}
