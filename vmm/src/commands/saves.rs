//! `pollux replay --saves`: saves a replay at random exits, and replays the rest from each saved state
//! in a process of its own.
//!
//! What a saved state lacks shows as a divergence, or as other hashes at the end. The exits are drawn
//! from a seed; the report says at how many of them the guest waited for I/O.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, ExitCode};

use devices::{Board, Effect};
use format::{EntryReader, ExitNumber};
use hypervisor::kvm::{KvmVcpu, KvmVm};
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use replay::{RecordingReader, ReplayError, Replayer};
use serde::Serialize;

use super::Outcome;
use super::replay::id_of;
use crate::cli::ReplayOptions;
use crate::vm::{self, Host, STATE_FILE, SnapshotMeta};

type Error = Box<dyn std::error::Error>;

/// What a run came to.
#[derive(Debug, Default, Serialize)]
struct Report {
    saves: u32,
    /// Of them, with a disk request outstanding.
    with_disk_outstanding: u32,
    /// Of them, in HLT.
    halted: u32,
    /// Exits at which an access was not complete: nothing can be saved there.
    skipped: u32,
    seed: u64,
}

/// Saves `count` times and replays from each.
///
/// # Errors
/// The recording cannot be read, or a replay from a saved state does not come to the recording's end.
pub fn run(options: &ReplayOptions, count: u32) -> Outcome {
    let reader = RecordingReader::open(&options.recording)?;
    let id = id_of(&reader, &reader.state_path())?;
    let host = vm::probe_host()?;
    let machine = vm::load_state(&reader.state_path(), &host)?.0;
    let first = machine.exit();
    let mut points = choose(first, &exits(&reader, &host)?, count, options.seed);
    let mut replayer = Replayer::new(machine);
    let dir = std::env::temp_dir().join(format!("pollux-saves-{}", std::process::id()));
    std::fs::create_dir(&dir)?;
    let mut report = Report {
        seed: options.seed,
        ..Report::default()
    };
    let mut behind = 0;
    reader.for_each_body::<Error>(|_, body| {
        for entry in EntryReader::new(body) {
            let entry = entry.map_err(ReplayError::from)?;
            while let Some(point) = points.first().copied().filter(|at| *at < entry.exit.0) {
                points.pop_first();
                replayer.advance(ExitNumber(point), &|| false)?;
                let meta = SnapshotMeta::of_recording(id, behind);
                one(&mut replayer, &meta, options, &dir, &mut report)?;
            }
            replayer.entry(&entry, &|| false)?;
            behind += 1;
        }
        Ok(())
    })?;
    std::fs::remove_dir(&dir)?;
    if options.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!(
            "saved at {} random exits ({} with a disk request outstanding, {} halted): the rest replays \
             identically from each",
            report.saves, report.with_disk_outstanding, report.halted
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Exits of which the log tells.
struct Exits {
    last: u64,
    /// Those with entries at which the guest waited for its disk.
    waiting: Vec<u64>,
}

/// Replays it once: only the board knows whether a request is outstanding.
fn exits(reader: &RecordingReader, host: &Host) -> Result<Exits, Error> {
    let machine = vm::load_state(&reader.state_path(), host)?.0;
    let mut exits = Exits {
        last: machine.exit().0,
        waiting: Vec::new(),
    };
    let mut replayer = Replayer::new(machine);
    reader.for_each_body::<Error>(|_, body| {
        for entry in EntryReader::new(body) {
            let entry = entry.map_err(ReplayError::from)?;
            // All entries of the exit before are applied.
            if entry.exit.0 > exits.last && waits_for_disk(replayer.machine().board()) {
                exits.waiting.push(exits.last);
            }
            exits.last = entry.exit.0;
            replayer.entry(&entry, &|| false)?;
        }
        Ok(())
    })?;
    Ok(exits)
}

fn waits_for_disk(board: &Board) -> bool {
    let is_disk = |effect: &Effect| !matches!(effect, Effect::EntropyWanted { .. });
    board.outstanding().iter().any(is_disk)
}

/// Random exits; a quarter of them, as far as there are such, at which the guest waits for its disk.
fn choose(first: ExitNumber, exits: &Exits, count: u32, seed: u64) -> BTreeSet<u64> {
    let room = exits.last.saturating_sub(first.0);
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let wanted = u64::from(count).min(room);
    let mut points = BTreeSet::new();
    for _ in 0..wanted.div_ceil(4) {
        points.extend(exits.waiting.choose(&mut random));
    }
    while (points.len() as u64) < wanted {
        points.insert(first.0 + random.random_range(0..room));
    }
    points
}

/// Saves where the replay of this recording stands, and replays the rest from there.
fn one(
    replayer: &mut Replayer<KvmVm, KvmVcpu>,
    meta: &SnapshotMeta,
    options: &ReplayOptions,
    dir: &Path,
    report: &mut Report,
) -> Result<(), Error> {
    let machine = replayer.machine();
    let disk = waits_for_disk(machine.board());
    let halted = machine.is_halted();
    if machine.wants_time() {
        report.skipped += 1;
        return Ok(());
    }
    let Some(state) = replayer.save()? else {
        report.skipped += 1;
        return Ok(());
    };
    let saved = dir.join(format!("exit-{}", state.exit().0));
    std::fs::create_dir(&saved)?;
    // It need not be on the disk, so it is no whole snapshot.
    let memory = replayer.machine().memory();
    vm::write_state(&saved.join(STATE_FILE), meta, &state, memory)?;
    let output = Command::new(std::env::current_exe()?)
        .args(["replay", "--json", "--from"])
        .arg(&saved)
        .arg(&options.recording)
        .output()?;
    let whole = output.status.success()
        && serde_json::from_slice::<serde_json::Value>(&output.stdout)
            .is_ok_and(|rest| rest["end_compared"] == true);
    if !whole {
        return Err(format!(
            "from the state saved at exit {} (seed {}) the rest does not replay: {}{}",
            state.exit(),
            options.seed,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
        .into());
    }
    std::fs::remove_dir_all(&saved)?;
    report.saves += 1;
    report.with_disk_outstanding += u32::from(disk);
    report.halted += u32::from(halted);
    if report.saves.is_multiple_of(50) {
        eprintln!("pollux: {} saved and replayed", report.saves);
    }
    Ok(())
}
