//! `pollux-bench cost`: what protection costs a guest, against the same guest unprotected.
//!
//! One VM on host a, with a standby on host b; each host has one CPU of the machine to itself, where there are
//! two. Protection is switched off and on again and again, and each time the same loads are run in the guest:
//! a client of its Redis server, programs that compute, and reads and writes of its disk. What is compared was
//! measured in the same run, on the same guest, minutes apart at most.

mod load;
mod meter;

use std::time::Duration;

use hdrhistogram::Histogram;

use crate::Failure;
use crate::kv_check;
use crate::report::{Measure, Report};
use crate::stage::{Client, GUEST_REDIS, Interrupt, SITES, Shell, Stage, StageOptions, Start};

use load::{LOADS, Load};
use meter::{Meter, Readings};

/// How long the VM may take to be protected, or not to be any more.
const PROTECTION_LIMIT: Duration = Duration::from_secs(120);
/// The same for its Redis server to answer.
const SERVER_LIMIT: Duration = Duration::from_secs(120);

/// What to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    stage: StageOptions,
    /// How often each load is run, protected and not.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=100))]
    runs: u16,
    /// For how long the Redis client asks, in seconds.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Its connections.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1024))]
    connections: u16,
}

/// What one load did in all runs, protected or not.
#[derive(Default)]
struct Series {
    /// Work done in a second, of each run.
    rates: Vec<f64>,
    readings: Readings,
}

/// All loads, protected or not.
#[derive(Default)]
struct Side {
    redis: Series,
    latency: Vec<Histogram<u64>>,
    loads: Vec<Series>,
}

/// Does it.
pub(crate) fn run(options: &Options, report: &mut Report) -> Result<(), Failure> {
    let interrupt = Interrupt::install()?;
    let mut bench = Bench::open(options, &interrupt)?;
    let (mut with, mut without) = (Side::new(), Side::new());
    for number in 1..=options.runs {
        for (protected, side) in [(false, &mut without), (true, &mut with)] {
            bench.protect(protected)?;
            let word = if protected {
                "protected"
            } else {
                "unprotected"
            };
            eprintln!("cost: run {number} of {}, {word}", options.runs);
            bench.measure(options, side)?;
        }
    }
    report.runs(options.runs.into());
    add(report, &with, &without);
    Ok(())
}

impl Side {
    fn new() -> Self {
        Self {
            loads: LOADS.iter().map(|_| Series::default()).collect(),
            ..Self::default()
        }
    }
}

struct Bench {
    shell: Shell,
    stage: Stage,
}

impl Bench {
    fn open(options: &Options, interrupt: &Interrupt) -> Result<Self, Failure> {
        let mut stage = Stage::new(&options.stage, interrupt)?;
        stage.pin();
        let patience = stage.patience().clone();
        let start = Start::prepare(&options.stage, &patience)?;
        let [a, b, _] = SITES;
        stage.start_standby(b)?;
        let keyboard = stage.start_primary_with_keyboard(a, &start)?;
        stage.wait_for_protection(None, PROTECTION_LIMIT)?;
        Client::wait_for_server(stage.client(), &patience, SERVER_LIMIT)?;
        let shell = Shell::new(keyboard);
        Ok(Self { shell, stage })
    }

    /// Switches protection on or off, and waits until it is.
    fn protect(&mut self, on: bool) -> Result<(), Failure> {
        let [a, ..] = SITES;
        let vmm = self.stage.vmm(a).ok_or("no VMM on host a")?;
        vmm.api()
            .command(if on { "protect" } else { "unprotect" })?;
        let what = if on { "protection" } else { "no protection" };
        self.stage
            .wait_for_status(what, PROTECTION_LIMIT, |id, status| {
                id == a && status.protected == on && (on || status.state == "alone")
            })?;
        Ok(())
    }

    fn measure(&mut self, options: &Options, side: &mut Side) -> Result<(), Failure> {
        let (outcome, readings) = {
            let [a, ..] = SITES;
            let meter = Meter::start(self.stage.vmm(a).ok_or("no VMM on host a")?.api().clone());
            let client = Client::start(
                self.stage.client(),
                kv_check::Options {
                    connections: options.connections,
                    seconds: options.seconds,
                    ..kv_check::Options::new(GUEST_REDIS)
                },
            );
            let outcome = client.wait()?;
            (outcome, meter.finish())
        };
        if let Some(fault) = outcome.faults().first() {
            return Err(format!("the guest's server: {fault}").into());
        }
        eprintln!("cost:   redis {:.1} requests/s", outcome.rate());
        side.redis.rates.push(outcome.rate());
        side.redis.readings.extend(readings);
        side.latency.push(outcome.latency);
        for (load, series) in LOADS.iter().zip(&mut side.loads) {
            self.run(load, series)?;
        }
        self.stage.check_processes()
    }

    fn run(&mut self, load: &Load, series: &mut Series) -> Result<(), Failure> {
        let [a, ..] = SITES;
        let patience = self.stage.patience().clone();
        let vmm = self.stage.vmm(a).ok_or("no VMM on host a")?;
        self.shell.run(vmm.process(), &patience, load.before)?;
        let meter = Meter::start(vmm.api().clone());
        let took = self.shell.run(vmm.process(), &patience, load.command)?;
        series.readings.extend(meter.finish());
        let rate = load.work / took.as_secs_f64();
        eprintln!("cost:   {} {rate:.3} {}", load.name, load.unit);
        series.rates.push(rate);
        Ok(())
    }
}

fn add(report: &mut Report, with: &Side, without: &Side) {
    let pairs = [("redis_ops", "1/s", &with.redis, &without.redis)];
    let loads = LOADS.iter().zip(with.loads.iter().zip(&without.loads));
    let loads = loads.map(|(load, (with, without))| (load.name, load.unit, with, without));
    for (name, unit, with, without) in pairs.into_iter().chain(loads) {
        let baseline = match name {
            "redis_ops" => "redis_ops_unprotected",
            name => LOADS
                .iter()
                .find(|load| load.name == name)
                .map_or("", |load| load.baseline),
        };
        let base = Measure::of_runs(baseline, unit, &without.rates);
        report.push(Measure::of_runs(name, unit, &with.rates).against(baseline, &base));
        report.push(base);
        let mbit = Measure::of_runs(
            format!("log_mbit_{}", name.trim_end_matches("_ops")),
            "Mbit/s",
            &with.readings.mbit,
        );
        report
            .push(mbit.noted("the log of the protected guest: lowest, middle and highest second"));
    }
    let base = Measure::microseconds_of_runs("redis_latency_unprotected", &without.latency);
    let latency = Measure::microseconds_of_runs("redis_latency", &with.latency);
    report.push(latency.against("redis_latency_unprotected", &base));
    report.push(base);
    let mut lag = Histogram::<u64>::new(3).expect("3 digits are legal");
    let readings = std::iter::once(&with.redis).chain(&with.loads);
    for ms in readings.flat_map(|series| &series.readings.lag_ms) {
        lag.record((ms * 1e6) as u64).expect("it grows as needed");
    }
    report.push(
        Measure::milliseconds("lag", &lag)
            .noted("run time that the backup has yet to run, under all loads"),
    );
}
