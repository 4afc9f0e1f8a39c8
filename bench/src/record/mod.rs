//! `pollux-bench record`: what recording costs a guest, how much it writes, and how fast it replays.
//!
//! The same load runs in the same guest, recorded and not, in turns; each recording is replayed. Besides: what
//! the log of an idle guest takes.

mod lab;

use std::collections::BTreeMap;
use std::time::Duration;

use crate::Failure;
use crate::report::{Measure, Report};
use crate::stage::{Interrupt, Patience, StageOptions};

use lab::{Lab, Recorded};

/// What to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    stage: StageOptions,
    /// How often the load runs, recorded and not.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=100))]
    runs: u16,
    /// What the guest's shell runs.
    #[arg(long, value_name = "COMMAND", default_value = "workload 1")]
    load: String,
    /// For how long an idle guest is recorded, in seconds.
    #[arg(long, default_value_t = 20.0)]
    idle_seconds: f64,
}

/// What the runs of the load came to.
#[derive(Default)]
struct Series {
    recorded: Vec<Recorded>,
    unrecorded: Vec<f64>,
    replay_over_record: Vec<f64>,
    load_recorded: Vec<f64>,
    load_unrecorded: Vec<f64>,
}

/// Does it.
pub(crate) fn run(options: &Options, report: &mut Report) -> Result<(), Failure> {
    let lab = Lab::new(&options.stage, Patience::new(Interrupt::install()?))?;
    let mut series = Series::default();
    for number in 1..=options.runs {
        eprintln!("record: run {number} of {}", options.runs);
        // In turns, so that a machine that gets slower or faster does it to both.
        let pair = if number % 2 == 0 {
            [true, false]
        } else {
            [false, true]
        };
        for recorded in pair {
            if recorded {
                series.record(&lab, &options.load)?;
            } else {
                let ran = lab.run(&options.load)?;
                series.unrecorded.push(ran.exits_per_s());
                series.load_unrecorded.push(ran.load.as_secs_f64());
            }
        }
    }
    report.runs(options.runs.into());
    series.add(report);
    eprintln!("record: an idle guest, {} s", options.idle_seconds);
    let idle = lab.record_idle(Duration::from_secs_f64(options.idle_seconds))?;
    report.push(Measure::value("idle_mbit_s", "Mbit/s", idle));
    Ok(())
}

impl Series {
    fn record(&mut self, lab: &Lab, load: &str) -> Result<(), Failure> {
        let recorded = lab.record(load)?;
        self.load_recorded.push(recorded.ran.load.as_secs_f64());
        self.replay_over_record
            .push(recorded.replay_seconds / recorded.ran.seconds);
        self.recorded.push(recorded);
        Ok(())
    }

    fn add(&self, report: &mut Report) {
        let of = |figure: &dyn Fn(&Recorded) -> f64| -> Vec<f64> {
            self.recorded.iter().map(figure).collect()
        };
        let bare = Measure::of_runs("exits_per_s_unrecorded", "1/s", &self.unrecorded);
        let rates = of(&|recorded| recorded.ran.exits_per_s());
        let recorded = Measure::of_runs("exits_per_s", "1/s", &rates);
        report.push(recorded.against("exits_per_s_unrecorded", &bare));
        report.push(bare);
        let bare = Measure::of_runs("load_unrecorded", "s", &self.load_unrecorded);
        let load = Measure::of_runs("load", "s", &self.load_recorded);
        report.push(load.against("load_unrecorded", &bare));
        report.push(bare);
        let bytes = of(&|recorded| recorded.bytes_per_exit.values().sum());
        report.push(Measure::of_runs("log_bytes_per_exit", "B", &bytes));
        for kind in self.kinds().into_keys() {
            let bytes = of(&|recorded| recorded.bytes_per_exit.get(&kind).copied().unwrap_or(0.0));
            let name = format!("log_bytes_per_exit_{}", kind.to_lowercase());
            report.push(Measure::of_runs(name, "B", &bytes));
        }
        let ratios = &self.replay_over_record;
        report.push(Measure::of_runs("replay_over_record", "1", ratios));
    }

    /// Kinds of entries that any log has.
    fn kinds(&self) -> BTreeMap<String, f64> {
        let all = self.recorded.iter().flat_map(|r| r.bytes_per_exit.clone());
        all.collect()
    }
}
