//! The series in which both hosts of the pair are lost at once, and come back: what they held is gone, and the
//! disk has moved on. No VM may start from what is out of date, and whoever looks must be told what to do.
//!
//! ```text
//! protected ── both killed ──> dark ──┬─ two standbys ──────────────────> nobody starts; both say what to do
//!    ▲                                └─ the primary's command again ──> refused: its snapshot is too old
//!    └── an operator puts disk and snapshot back, and starts the VM ──┬─ with the other host there
//!                                                                     └─ without it: blocked until told
//! ```
//! While nobody has started it no frame in the guest's name may be seen.

use std::time::{Duration, Instant};

use harness::Stream;
use hdrhistogram::Histogram;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{FIRST_LIMIT, Options, SERVER_LIMIT};
use crate::Failure;
use crate::kv_check;
use crate::report::{Measure, Report};
use crate::stage::{Client, GUEST_REDIS, Interrupt, SITES, SiteId, Stage, Start};
use crate::wire::Watch;

/// How long a program may take to say what it has to say.
const SAY_LIMIT: Duration = Duration::from_secs(60);
/// The same for the client's answers.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);
/// For how long nothing may happen after all was said: far longer than a start takes.
const STILL_FOR: Duration = Duration::from_secs(3);

/// How the hosts come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
enum Return {
    /// Both wait for work, as after a reboot.
    Standbys,
    /// The primary's command is given again, the other waits for work.
    SameCommand,
}

/// How the operator starts the VM again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
enum Again {
    /// With the other host there.
    Both,
    /// Without it, and saying so when asked.
    HostGone,
}

/// What a run is like.
#[derive(Debug, serde::Serialize)]
struct Run {
    number: usize,
    primary: String,
    backup: String,
    came_back: Return,
    /// What whoever looks was told.
    told: Vec<String>,
    started_again: Again,
    on: String,
    /// What that start was blocked by, if it was.
    blocked: Option<String>,
    /// From the operator's command until the VM was protected, in ms.
    protected_again_ms: f64,
}

struct Scene<'a> {
    stage: &'a mut Stage,
    start: &'a Start,
    watch: &'a Watch,
    connections: u16,
}

/// Does it.
pub(super) fn run(options: &Options, runs: usize, report: &mut Report) -> Result<(), Failure> {
    let interrupt = Interrupt::install()?;
    let seed = options.seed.unwrap_or_else(|| rand::rng().random());
    eprintln!("failover: {runs} losses of both hosts with seed {seed}");
    report.detail("seed", seed.into());
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut stage = Stage::new(&options.stage, &interrupt)?;
    let start = Start::prepare(&options.stage, &stage.patience().clone())?;
    start.needed_snapshot()?;
    let watch = Watch::start(&stage)?;
    let [a, b, _] = SITES;
    stage.start_standby(b)?;
    stage.start_primary(a, &start)?;
    let mut scene = Scene {
        stage: &mut stage,
        start: &start,
        watch: &watch,
        connections: options.connections,
    };
    let mut done = Vec::new();
    let ended = (0..runs).try_for_each(|number| {
        let run = scene.run(number, &mut rng).inspect_err(|error| {
            let all = super::run::describe(scene.stage);
            eprintln!("failover: {number:3} FAILED: {error}\n{all}");
        })?;
        eprintln!("failover: {number:3} {run:?}");
        done.push(run);
        Ok(())
    });
    add(&done, report);
    ended
}

impl Scene<'_> {
    fn run(&mut self, number: usize, rng: &mut ChaCha8Rng) -> Result<Run, Failure> {
        let (primary, backup) = self.work(rng.random_range(5..60))?;
        self.stage.kill_together(&[primary, backup])?;
        for id in [primary, backup] {
            self.stage.crash(id)?;
            self.stage.repair(id)?;
        }
        let frames = self.watch.frames();
        let came_back = match rng.random() {
            true => Return::Standbys,
            false => Return::SameCommand,
        };
        let told = match came_back {
            Return::Standbys => self.come_back_as_standbys([primary, backup])?,
            Return::SameCommand => self.come_back_as_before(primary, backup)?,
        };
        self.stay_still(frames)?;
        let (on, other) = match rng.random() {
            true => (primary, backup),
            false => (backup, primary),
        };
        let started_again = match rng.random() {
            true => Again::Both,
            false => Again::HostGone,
        };
        let asked = Instant::now();
        let blocked = match started_again {
            Again::Both => self.start_with(on, other)?,
            Again::HostGone => Some(self.start_without(on, other)?),
        };
        self.stage.wait_for_protection(None, FIRST_LIMIT)?;
        Ok(Run {
            number,
            primary: primary.to_string(),
            backup: backup.to_string(),
            came_back,
            told,
            started_again,
            on: on.to_string(),
            blocked,
            protected_again_ms: asked.elapsed().as_secs_f64() * 1e3,
        })
    }

    /// Has a protected VM work for so many answers. Who the pair is.
    fn work(&mut self, answers: u64) -> Result<(SiteId, SiteId), Failure> {
        let (primary, status) = self.stage.wait_for_protection(None, FIRST_LIMIT)?;
        let backup = status.peer.as_deref().and_then(SiteId::named);
        let backup = backup.ok_or("a protected primary names no backup")?;
        let patience = self.stage.patience().clone();
        Client::wait_for_server(self.stage.client(), &patience, SERVER_LIMIT)?;
        super::write_to_disk(self.stage.client())?;
        let options = kv_check::Options {
            connections: self.connections,
            seconds: 24.0 * 3600.0,
            ..kv_check::Options::new(GUEST_REDIS)
        };
        let client = Client::start(self.stage.client(), options);
        client.wait_for_answers(answers, &patience, ANSWER_LIMIT)?;
        Ok((primary, backup))
    }

    fn come_back_as_standbys(&mut self, hosts: [SiteId; 2]) -> Result<Vec<String>, Failure> {
        for id in hosts {
            self.stage.start_standby(id)?;
        }
        let told = hosts.map(|id| self.wait_for_advice(id, "pollux run"));
        told.into_iter().collect()
    }

    fn come_back_as_before(
        &mut self,
        primary: SiteId,
        backup: SiteId,
    ) -> Result<Vec<String>, Failure> {
        self.stage.start_standby(backup)?;
        self.stage.restart_primary(primary, self.start)?;
        self.stage.expect_end(primary);
        let patience = self.stage.patience().clone();
        let stage = &mut *self.stage;
        let said = patience.wait_for(
            "a start from an old snapshot to be refused",
            SAY_LIMIT,
            || {
                let vmm = stage.vmm(primary).ok_or("no VMM was started")?;
                let Some(status) = vmm.process().try_wait() else {
                    return Ok(None);
                };
                let said = vmm.process().printed(Stream::Error);
                let reason = said.lines().find(|line| line.contains("has moved on"));
                match reason {
                    Some(reason) if !status.success() => Ok(Some(reason.to_owned())),
                    _ => Err(format!("it ended with {status}: {said}").into()),
                }
            },
        )?;
        Ok(vec![said])
    }

    /// What this host advises, once it does so in these words.
    fn wait_for_advice(&mut self, id: SiteId, words: &str) -> Result<String, Failure> {
        let patience = self.stage.patience().clone();
        patience.wait_for("advice", SAY_LIMIT, || {
            self.stage.check_processes()?;
            let advice = self.stage.status(id).map(|status| status.advice);
            let mut advice = advice.unwrap_or_default().into_iter();
            Ok(advice.find(|advice| advice.contains(words)))
        })
    }

    /// For a while nobody may be primary, and nothing may come in the guest's name.
    fn stay_still(&mut self, frames: u64) -> Result<(), Failure> {
        let until = Instant::now() + STILL_FOR;
        let patience = self.stage.patience().clone();
        patience.wait_until("time to pass", STILL_FOR * 100, || {
            self.stage.check_processes()?;
            if let Some((id, _)) = self.stage.primary() {
                return Err(format!("host {id} has started a VM by itself").into());
            }
            Ok(Instant::now() >= until)
        })?;
        match self.watch.frames() - frames {
            0 => Ok(()),
            count => Err(format!("{count} frames of a VM that nobody started").into()),
        }
    }

    /// The operator starts the VM on one host while the other waits for work.
    fn start_with(&mut self, on: SiteId, other: SiteId) -> Result<Option<String>, Failure> {
        self.stage.start_standby(other)?;
        self.stage.start_primary(on, self.start)?;
        Ok(None)
    }

    /// The operator starts the VM while the other host is off, and says that it is gone for good.
    fn start_without(&mut self, on: SiteId, other: SiteId) -> Result<String, Failure> {
        self.stage.crash(other)?;
        let frames = self.watch.frames();
        self.stage.start_primary(on, self.start)?;
        let blocked = self.wait_for_advice(on, "pollux ctl")?;
        self.stay_still(frames)?;
        let vmm = self.stage.vmm(on).ok_or("no VMM was started")?;
        vmm.api().host_gone(&other.to_string())?;
        self.stage
            .wait_for_status("the VM to start", FIRST_LIMIT, |id, _| id == on)?;
        self.stage.repair(other)?;
        self.stage.start_standby(other)?;
        Ok(blocked)
    }
}

fn add(runs: &[Run], report: &mut Report) {
    report.runs(runs.len() as u64);
    let count =
        |wanted: &dyn Fn(&Run) -> bool| runs.iter().filter(|run| wanted(run)).count() as u64;
    let of = |back: Return| count(&|run: &Run| run.came_back == back && !run.told.is_empty());
    let note = "nobody started a VM, and every host said what to do";
    report.push(Measure::count("cold_standbys", of(Return::Standbys)).noted(note));
    let note = "the old command was refused, with the reason";
    report.push(Measure::count("cold_same_command", of(Return::SameCommand)).noted(note));
    let blocked = count(&|run: &Run| run.blocked.is_some());
    let note =
        "starts while the other host was off: blocked until the operator said that it is gone";
    report.push(Measure::count("cold_blocked", blocked).noted(note));
    let mut again = Histogram::<u64>::new(3).expect("3 digits are legal");
    for run in runs {
        let ns = (run.protected_again_ms * 1e6) as u64;
        again.record(ns).expect("it grows as needed");
    }
    let note =
        "from the operator's command to a protected VM, what was waited for on purpose included";
    report.push(Measure::milliseconds("cold_protected_again", &again).noted(note));
    let runs = serde_json::to_value(runs).expect("runs are plain data");
    report.detail("cold_runs", runs);
}
