//! `pollux-bench endure`: a protected VM for a long time, under mixed load, while a CPU is taken by others.
//!
//! The guest serves a checking client, which rests now and then, and works by itself in turns: processes, disk,
//! nothing. Nothing fails and nobody is told to do anything: a failover, a lost backup or a divergence is a
//! fault of the product. The memory of every process is looked at all the time, and must not grow.

mod guest;
mod memory;
mod pulse;
mod watch;

use std::time::{Duration, Instant};

use crate::Failure;
use crate::failover::write_to_disk;
use crate::heartbeat::hogs::Hogs;
use crate::kv_check;
use crate::report::Report;
use crate::stage::{Client, GUEST_REDIS, Interrupt, SITES, Stage, StageOptions, Start};

use guest::Turns;
use memory::Memory;
use pulse::Pulse;
use watch::Watch;

/// How long the VM may take to be protected for the first time, its boot included.
const FIRST_LIMIT: Duration = Duration::from_secs(300);
/// The same for the Redis server in it.
const SERVER_LIMIT: Duration = Duration::from_secs(120);
/// Between two looks at every VMM.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Between two words.
const TELL_EVERY: Duration = Duration::from_secs(60);
/// For how long the client asks, and then rests.
const ASKS: Duration = Duration::from_secs(50);
const RESTS: Duration = Duration::from_secs(25);

/// What to do.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    stage: StageOptions,
    /// For how long.
    #[arg(long, default_value_t = 60.0)]
    minutes: f64,
    /// The CPU that a busy thread takes from the hosts.
    #[arg(long, default_value_t = 0)]
    busy_cpu: usize,
    /// Seconds between two looks at the memory of all processes.
    #[arg(long, default_value_t = 10.0)]
    memory_every: f64,
    /// Connections of the client.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1024))]
    connections: u16,
}

/// Does it.
pub(crate) fn run(options: &Options, report: &mut Report) -> Result<(), Failure> {
    let interrupt = Interrupt::install()?;
    let mut stage = Stage::new(&options.stage, &interrupt)?;
    let patience = stage.patience().clone();
    let start = Start::prepare(&options.stage, &patience)?;
    let [a, b, c] = SITES;
    stage.start_standby(b)?;
    stage.start_standby(c)?;
    let keyboard = stage.start_primary_with_keyboard(a, &start)?;
    let first = stage.wait_for_protection(None, FIRST_LIMIT)?;
    Client::wait_for_server(stage.client(), &patience, SERVER_LIMIT)?;
    write_to_disk(stage.client())?;
    let mut turns = Turns::begin(keyboard)?;
    let client = Client::start(
        stage.client(),
        kv_check::Options {
            connections: options.connections,
            seconds: 30.0 * 24.0 * 3600.0,
            ..kv_check::Options::new(GUEST_REDIS)
        },
    );
    let _hogs = Hogs::start(1, &[options.busy_cpu])?;
    let pulse = Pulse::start();
    let (mut watch, mut memory) = (Watch::new(&first), Memory::default());
    let ended = endure(
        options,
        &mut stage,
        &client,
        (&mut watch, &mut memory, &mut turns),
    );
    watch.report(report);
    memory.report(report);
    turns.report(report);
    pulse.finish().report(report);
    ended?;
    let outcome = client.finish()?;
    outcome.report(report);
    Ok(())
}

/// Looks, until the time is over.
fn endure(
    options: &Options,
    stage: &mut Stage,
    client: &Client,
    (watch, memory, turns): (&mut Watch, &mut Memory, &mut Turns),
) -> Result<(), Failure> {
    let length = Duration::from_secs_f64(options.minutes * 60.0);
    let memory_every = Duration::from_secs_f64(options.memory_every);
    let started = Instant::now();
    let (mut told, mut weighed) = (started, None::<Instant>);
    let patience = stage.patience().clone();
    while started.elapsed() < length {
        let round = started.elapsed().as_secs_f64() % (ASKS + RESTS).as_secs_f64();
        client.live().rest(round > ASKS.as_secs_f64());
        client.check()?;
        stage.check_processes()?;
        watch.look(stage, started.elapsed());
        turns.look(stage);
        if weighed.is_none_or(|at| at.elapsed() >= memory_every) {
            weighed = Some(Instant::now());
            memory.look(stage, started.elapsed())?;
        }
        if told.elapsed() > TELL_EVERY {
            told = Instant::now();
            let minutes = started.elapsed().as_secs_f64() / 60.0;
            eprintln!(
                "endure: {minutes:.0} min: {watch}; {turns}; {}",
                client.live()
            );
        }
        let next = Instant::now() + LOOK_EVERY;
        patience.wait_until("the next look", LOOK_EVERY * 100, || {
            Ok(Instant::now() >= next)
        })?;
    }
    client.live().rest(false);
    Ok(())
}
