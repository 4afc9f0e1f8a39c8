//! `pollux-bench failover`: failure after failure at random moments under load, and whether the VM and its
//! client came through each.
//!
//! A checking client writes and reads, the guest's Redis server writes it all to its disk. Each run waits for
//! a protected VM, lets one thing fail, sees who goes on and how long the client waited, makes everything whole
//! again, and waits until the VM is redundant. At the end all answers, all frames and the disk are checked.

mod cause;
mod clock;
mod cold;
mod epilogue;
mod merge;
mod plan;
mod results;
mod run;
mod strike;

use std::time::{Duration, Instant};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::Failure;
use crate::kv_check;
use crate::report::Report;
use crate::stage::{Client, GUEST_REDIS, Interrupt, SITES, Stage, StageOptions, Start};
use crate::storage;
use crate::wire::Watch;

pub(crate) use epilogue::write_to_disk;
pub(crate) use merge::{Options as MergeOptions, run as merge};

use cause::Cause;
use plan::Series;
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
    /// What fails.
    #[arg(long, value_enum, default_value_t = Series::Mixed)]
    series: Series,
    /// How many failures; as many as the series asks for if it is not given.
    #[arg(long)]
    runs: Option<usize>,
    /// Begin no failure after so many minutes, however many have been.
    #[arg(long, value_name = "MINUTES")]
    within: Option<f64>,
    /// Seed of order and moments; drawn if it is not given.
    #[arg(long)]
    seed: Option<u64>,
    /// Only these causes.
    #[arg(long, value_enum, value_delimiter = ',')]
    causes: Vec<Cause>,
    /// Give the hosts the storage itself: what they write is not watched, and not disturbed.
    #[arg(long)]
    plain_storage: bool,
    /// Connections of the client.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1024))]
    connections: u16,
}

/// Does it.
pub(crate) fn run(options: &Options, report: &mut Report) -> Result<(), Failure> {
    let runs = options.runs.unwrap_or(options.series.runs());
    if options.series == Series::Cold {
        return cold::run(options, runs, report);
    }
    if !options.plain_storage {
        // Before any thread is started.
        storage::own_mounts()?;
    }
    let interrupt = Interrupt::install()?;
    let seed = options.seed.unwrap_or_else(|| rand::rng().random());
    eprintln!("failover: {runs} runs with seed {seed}");
    report.detail("seed", seed.into());
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let causes = match options.causes.as_slice() {
        [] => options.series.causes().to_vec(),
        some => some.to_vec(),
    };
    let watched = |cause: &Cause| !options.plain_storage || !cause.needs_storage();
    let causes: Vec<Cause> = causes.into_iter().filter(watched).collect();
    if causes.is_empty() {
        return Err("none of these causes can be had with --plain-storage".into());
    }
    let order = cause::order(&causes, runs, &mut rng);
    let mut stage = Stage::new(&options.stage, &interrupt)?;
    if !options.plain_storage {
        stage.watch_storage()?;
    }
    let watch = Watch::start(&stage)?;
    let client = open(options, &mut stage)?;
    let host = stage.client().clone();
    let clock_off = clock::guest_is_off_ms(&host)?;
    let until = options
        .within
        .map(|minutes| Instant::now() + Duration::from_secs_f64(minutes * 60.0));
    let mut runs = Vec::new();
    let mut scene = Scene {
        stage: &mut stage,
        client: &client,
        watch: &watch,
    };
    for (number, cause) in order.into_iter().enumerate() {
        if until.is_some_and(|until| Instant::now() >= until) {
            break;
        }
        eprint!("failover: {number:3} {:<30}", cause.name());
        let ran = scene.run(number, cause, &mut rng);
        let run = ran.inspect_err(|error| {
            eprintln!("FAILED: {error}\n{}", run::describe(scene.stage));
            // What was measured until here is worth telling.
            results::report(&runs, report);
        })?;
        tell(&run, &client);
        runs.push(serde_json::to_value(run).expect("runs are plain data"));
    }
    results::report(&runs, report);
    let outcome = client.finish()?;
    outcome.report(report);
    clock::report((clock::guest_is_off_ms(&host)? - clock_off).abs(), report);
    let disk = disk_agrees(&mut stage);
    watch.finish()?.report(report);
    if let Some(storage) = stage.storage() {
        storage.verdict().report(report);
    }
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
    write_to_disk(stage.client())?;
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
