//! Protected VMs on starved hosts, for long: how often a live host, or a live VMM, is given up.
//!
//! The whole product, twice side by side: three hosts, the VM on the first, its backup and a standby on the
//! others, default time-outs; busy threads on every CPU. In one world the kernel answers heartbeats; in the
//! other `ftprobe` does not start, so that the VMMs answer themselves. Both stand the same at the same time,
//! and each is a load of the other's.

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
    let userspace = StageOptions {
        programs: Some(without.path().to_owned()),
        ..options.stage.clone()
    };
    let mut trials = [
        Trial::start("soak", &options.stage, &interrupt)?,
        Trial::start("soak_userspace", &userspace, &interrupt)?,
    ];
    // What has happened to the first while the second began is none of it.
    for trial in &mut trials {
        trial.known = trial.stage.wait_for_protection(None, PROTECTION_LIMIT)?;
    }
    eprintln!("{} s, {} hogs a CPU", length.as_secs(), options.hogs);
    let watched = watch(&mut trials, options.hogs, length, &interrupt);
    for trial in trials {
        let Verdicts {
            failovers,
            backups_lost,
        } = trial.verdicts;
        let note = format!(
            "a protected VM for {} s beside another one, {} busy threads a CPU; heartbeats answered by: {}",
            length.as_secs(),
            options.hogs,
            trial.answered_by
        );
        let failovers = Measure::count(format!("{}_false_failovers", trial.name), failovers);
        report.push(failovers.noted(note));
        report.push(Measure::count(
            format!("{}_backups_lost", trial.name),
            backups_lost,
        ));
    }
    watched
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

/// Watches until the time is over and every VM is protected; one that fails does not end the other's trial.
fn watch(
    trials: &mut [Trial],
    hogs: usize,
    length: Duration,
    interrupt: &Interrupt,
) -> Result<(), Failure> {
    let cpus: Vec<usize> = (0..std::thread::available_parallelism()?.get()).collect();
    let _hogs = Hogs::start(hogs, &cpus)?;
    let started = Instant::now();
    let mut told = started;
    while started.elapsed() < length || trials.iter().any(Trial::is_recovering) {
        interrupt.check()?;
        std::thread::sleep(LOOK_EVERY);
        for trial in trials.iter_mut().filter(|trial| trial.failure.is_none()) {
            trial.failure = trial.look(started).err();
        }
        if told.elapsed() > TELL_EVERY {
            told = Instant::now();
            for trial in trials.iter() {
                trial.tell(started);
            }
        }
    }
    let failed = trials.iter_mut().find_map(|trial| {
        let failure = trial.failure.take()?;
        Some(format!("{}: {failure}", trial.name))
    });
    failed.map_or(Ok(()), |failure| Err(failure.into()))
}

/// A protected VM that is watched.
struct Trial {
    name: &'static str,
    stage: Stage,
    /// The primary of the last epoch that is known.
    known: (SiteId, Status),
    /// Since when no protected primary of an epoch that is not older has been seen.
    unprotected: Option<Instant>,
    /// A verdict was counted, and the VM is not protected again yet.
    is_judged: bool,
    answered_by: String,
    verdicts: Verdicts,
    failure: Option<Failure>,
}

impl Trial {
    fn start(
        name: &'static str,
        options: &StageOptions,
        interrupt: &Interrupt,
    ) -> Result<Self, Failure> {
        let options = StageOptions {
            keep: options.keep.as_ref().map(|keep| keep.join(name)),
            ..options.clone()
        };
        let mut stage = Stage::new(&options, interrupt)?;
        let start = Start::prepare(&options, &stage.patience().clone())?;
        let [a, b, c] = SITES;
        stage.start_standby(b)?;
        stage.start_standby(c)?;
        stage.start_primary(a, &start)?;
        let known = stage.wait_for_protection(None, PROTECTION_LIMIT)?;
        Ok(Self {
            name,
            stage,
            answered_by: known.1.answered_by(),
            known,
            unprotected: None,
            is_judged: false,
            verdicts: Verdicts::default(),
            failure: None,
        })
    }

    fn is_recovering(&self) -> bool {
        self.unprotected.is_some() && self.failure.is_none()
    }

    /// Counts what is new. After a verdict, what follows until the VM is protected again is its consequence.
    fn look(&mut self, started: Instant) -> Result<(), Failure> {
        self.stage.check_processes()?;
        let epoch = self.known.1.epoch;
        // A primary that has been replaced may not know it yet.
        let now = self.stage.primary();
        let now = now.filter(|(_, status)| status.epoch >= epoch);
        let protected = now.as_ref().is_some_and(|(_, status)| status.protected);
        if let Some(now) = now {
            if !self.is_judged && self.verdicts.take(&self.known, &now) {
                self.is_judged = true;
                self.tell(started);
            }
            self.known = now;
        }
        if protected {
            (self.is_judged, self.unprotected) = (false, None);
            return Ok(());
        }
        let since = *self.unprotected.get_or_insert_with(Instant::now);
        if since.elapsed() > PROTECTION_LIMIT {
            let (limit, events) = (PROTECTION_LIMIT.as_secs(), self.stage.last_events());
            return Err(format!("waited {limit} s for protection{events}").into());
        }
        Ok(())
    }

    fn tell(&self, started: Instant) {
        let (name, verdicts) = (self.name, self.verdicts);
        let after = started.elapsed().as_secs();
        eprintln!("      {after} s, {name}: {verdicts:?}");
    }
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
