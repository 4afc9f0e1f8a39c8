//! `pollux-bench failover`: failure after failure at random moments under load, and whether the VM and its
//! client came through each.
//!
//! A checking client writes and reads, the guest's Redis server writes it all to its disk. Each run waits for
//! a protected VM, lets one thing fail, sees who goes on and how long the client waited, makes everything whole
//! again, and waits until the VM is redundant. At the end all answers, all frames and the disk are checked.

mod cause;
mod epilogue;
mod run;
mod strike;

use std::time::Duration;

use hdrhistogram::Histogram;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::Failure;
use crate::kv_check;
use crate::report::{Measure, Report};
use crate::stage::{Client, GUEST_REDIS, Interrupt, SITES, Stage, StageOptions, Start};
use crate::wire::Watch;

use cause::{CAUSES, Cause};
use run::{Run, Scene};

/// How long the VM may take to be protected for the first time, its boot included.
const FIRST_LIMIT: Duration = Duration::from_secs(300);
/// The same for the Redis server in it.
const SERVER_LIMIT: Duration = Duration::from_secs(120);

/// What to do.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    stage: StageOptions,
    /// How many failures.
    #[arg(long, default_value_t = 100)]
    runs: usize,
    /// Seed of order and moments; drawn if it is not given.
    #[arg(long)]
    seed: Option<u64>,
    /// Only these causes.
    #[arg(long, value_enum, value_delimiter = ',')]
    causes: Vec<Cause>,
    /// Connections of the client.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1024))]
    connections: u16,
}

/// Does it.
pub(crate) fn run(options: &Options, report: &mut Report) -> Result<(), Failure> {
    let interrupt = Interrupt::install()?;
    let seed = options.seed.unwrap_or_else(|| rand::rng().random());
    eprintln!("failover: {} runs with seed {seed}", options.runs);
    report.detail("seed", seed.into());
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let causes = match options.causes.as_slice() {
        [] => &CAUSES[..],
        some => some,
    };
    let order = cause::order(causes, options.runs, &mut rng);
    let mut stage = Stage::new(&options.stage, &interrupt)?;
    let watch = Watch::start(&stage)?;
    let client = open(options, &mut stage)?;
    let mut runs = Vec::new();
    let mut scene = Scene {
        stage: &mut stage,
        client: &client,
        watch: &watch,
    };
    for (number, cause) in order.into_iter().enumerate() {
        eprint!("failover: {number:3} {:<30}", cause.name());
        let ran = scene.run(number, cause, &mut rng);
        let run = ran.inspect_err(|error| {
            eprintln!("FAILED: {error}\n{}", run::describe(scene.stage));
            // What was measured until here is worth telling.
            add_runs(report, &runs);
        })?;
        tell(&run, &client);
        runs.push(run);
    }
    add_runs(report, &runs);
    let outcome = client.finish()?;
    outcome.report(report);
    let disk = disk_agrees(&mut stage);
    watch.finish()?.report(report);
    disk
}

/// A protected VM on the first host, and a client at work.
fn open(options: &Options, stage: &mut Stage) -> Result<Client, Failure> {
    let patience = stage.patience().clone();
    let start = Start::prepare(&options.stage, &patience)?;
    let [a, b, c] = SITES;
    stage.start_standby(b)?;
    stage.start_standby(c)?;
    stage.start_primary(a, &start)?;
    stage.wait_for_protection(None, FIRST_LIMIT)?;
    Client::wait_for_server(stage.client(), &patience, SERVER_LIMIT)?;
    epilogue::write_to_disk(stage.client())?;
    let options = kv_check::Options {
        connections: options.connections,
        seconds: 7.0 * 24.0 * 3600.0,
        ..kv_check::Options::new(GUEST_REDIS)
    };
    Ok(Client::start(stage.client(), options))
}

fn disk_agrees(stage: &mut Stage) -> Result<(), Failure> {
    let (primary, _) = stage.primary().ok_or("no primary is left")?;
    epilogue::compare(stage, primary)
}

fn tell(run: &Run, client: &Client) {
    let redundancy = &run.redundancy;
    eprintln!(
        "{:6.0} ms pause (usually {:.0}), waits {:.0}, on {} ({}), redundant after {:.1} s; {}",
        run.takeover.pause_ms,
        run.usual_ms,
        run.takeover.wait_ms,
        run.takeover.to,
        run.takeover.cause.as_deref().unwrap_or("stays"),
        redundancy.after_ms / 1e3,
        client.live()
    );
}

fn add_runs(report: &mut Report, runs: &[Run]) {
    report.runs(runs.len() as u64);
    let usual = distribution("pause_usual", runs.iter().map(|r| r.usual_ms));
    report.push(usual.noted("longest time without any answer in the second before a failure"));
    for cause in CAUSES {
        let of = || runs.iter().filter(|r| r.cause == cause);
        if of().next().is_none() {
            continue;
        }
        let mut add = |what: &str, ms: &mut dyn Iterator<Item = f64>| {
            report.push(distribution(&format!("{what}_{}", cause.name()), ms));
        };
        add("pause", &mut of().map(|r| r.takeover.pause_ms));
        add("wait", &mut of().map(|r| r.takeover.wait_ms));
        if of().any(|r| r.takeover.live_ms().is_some()) {
            add("live", &mut of().filter_map(|r| r.takeover.live_ms()));
        }
    }
    let stops = runs.iter().filter_map(|r| r.redundancy.stop_ms);
    report.push(distribution("transfer_stop", stops));
    let again = runs.iter().map(|r| r.redundancy.after_ms);
    report.push(distribution("redundant_again", again));
    let divergences: u64 = runs.iter().map(|r| r.redundancy.divergences).sum();
    report.push(Measure::count("divergences", divergences));
    if divergences > 0 {
        report.fail("replicas went another way than their primary");
    }
    let runs = serde_json::to_value(runs).expect("runs are plain data");
    report.detail("runs", runs);
}

fn distribution(name: &str, ms: impl Iterator<Item = f64>) -> Measure {
    let mut all = Histogram::<u64>::new(3).expect("3 digits are legal");
    ms.for_each(|ms| all.record((ms * 1e6) as u64).expect("it grows as needed"));
    Measure::milliseconds(name, &all)
}
