//! A protected VM on starved hosts, for long: how often a live host, or a live VMM, is given up.
//!
//! The whole product: three hosts, the VM on the first, its backup and a standby on the others, busy threads
//! on every CPU, default time-outs. Once with heartbeats that the kernel answers; once, in the same
//! conditions, with an `ftprobe` that does not start, so that the VMMs answer themselves.

use std::path::Path;
use std::time::{Duration, Instant};

use super::Options;
use super::hogs::Hogs;
use crate::Failure;
use crate::report::{Measure, Report};
use crate::stage::{Interrupt, SITES, SiteId, Stage, StageOptions, Start, Status};

/// How long the VM may take to be protected for the first time, its boot included, and again when it was
/// not while the hosts are starved.
const PROTECTION_LIMIT: Duration = Duration::from_secs(300);
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Between two words.
const TELL_EVERY: Duration = Duration::from_secs(60);

/// What went wrong in a run.
#[derive(Debug, Default, Clone, Copy)]
struct Verdicts {
    /// A backup took over from a live primary.
    failovers: u64,
    /// A primary gave a live backup up.
    backups_lost: u64,
}

pub(super) fn measure(options: &Options, report: &mut Report) -> Result<(), Failure> {
    let interrupt = Interrupt::install()?;
    let length = Duration::from_secs_f64(options.soak * 60.0);
    let without = without_ftprobe(&options.stage)?;
    let programs = Some(without.path().to_owned());
    let userspace = StageOptions {
        programs,
        ..options.stage.clone()
    };
    for (name, stage) in [("soak", &options.stage), ("soak_userspace", &userspace)] {
        eprintln!(
            "{name}: {} s, {} hogs a CPU",
            length.as_secs(),
            options.hogs
        );
        let (verdicts, answered_by) = watch(stage, options.hogs, length, &interrupt)?;
        let note = format!(
            "a protected VM for {} s, {} busy threads a CPU; heartbeats answered by: {answered_by}",
            length.as_secs(),
            options.hogs
        );
        let failovers = Measure::count(format!("{name}_false_failovers"), verdicts.failovers);
        report.push(failovers.noted(note));
        let lost = Measure::count(format!("{name}_backups_lost"), verdicts.backups_lost);
        report.push(lost);
    }
    Ok(())
}

/// The same programs, but an `ftprobe` that ends at once.
fn without_ftprobe(stage: &StageOptions) -> Result<tempfile::TempDir, Failure> {
    let own = std::env::current_exe()?;
    let beside = own.parent().ok_or("this program is in no directory")?;
    let from = stage.programs.as_deref().unwrap_or(beside);
    let directory = tempfile::tempdir()?;
    for name in ["pollux", "vhost-ftlog"] {
        let to = directory.path().join(name);
        std::fs::copy(from.join(name), &to)?;
        // A snapshot belongs to a program, which it knows by its size and time.
        let modified = std::fs::metadata(from.join(name))?.modified()?;
        let times = std::fs::FileTimes::new().set_modified(modified);
        std::fs::File::options()
            .write(true)
            .open(&to)?
            .set_times(times)?;
    }
    std::os::unix::fs::symlink(Path::new("/bin/false"), directory.path().join("ftprobe"))?;
    Ok(directory)
}

fn watch(
    options: &StageOptions,
    hogs: usize,
    length: Duration,
    interrupt: &Interrupt,
) -> Result<(Verdicts, String), Failure> {
    let mut stage = Stage::new(options, interrupt)?;
    let patience = stage.patience().clone();
    let start = Start::prepare(options, &patience)?;
    let [a, b, c] = SITES;
    stage.start_standby(b)?;
    stage.start_standby(c)?;
    stage.start_primary(a, &start)?;
    let mut known = stage.wait_for_protection(None, PROTECTION_LIMIT)?;
    let answered_by = known.1.answered_by();
    let cpus: Vec<usize> = (0..std::thread::available_parallelism()?.get()).collect();
    let _hogs = Hogs::start(hogs, &cpus)?;
    let mut verdicts = Verdicts::default();
    let started = Instant::now();
    let mut told = started;
    while started.elapsed() < length {
        interrupt.check()?;
        stage.check_processes()?;
        std::thread::sleep(LOOK_EVERY);
        if let Some(now) = stage.primary()
            && verdicts.take(&known, &now)
        {
            let after = started.elapsed().as_secs_f64();
            eprintln!("      after {after:.0} s: {verdicts:?}");
            known = stage.wait_for_protection(known.1.epoch, PROTECTION_LIMIT)?;
        }
        if told.elapsed() > TELL_EVERY {
            told = Instant::now();
            eprintln!(
                "      {:.0} s: {verdicts:?}",
                started.elapsed().as_secs_f64()
            );
        }
    }
    Ok((verdicts, answered_by))
}

impl Verdicts {
    /// Whether something has changed: every verdict begins an epoch.
    fn take(&mut self, known: &(SiteId, Status), now: &(SiteId, Status)) -> bool {
        if now.1.epoch <= known.1.epoch {
            return false;
        }
        if now.0 == known.0 {
            self.backups_lost += 1;
        } else {
            self.failovers += 1;
        }
        true
    }
}
