//! `pollux-bench channel`: what the logging channel takes and gives, beside bare TCP over the same cable.
//!
//! Two network namespaces of this machine and a veth; host A's threads and daemon on CPU 0, host B's on
//! CPU 1. Each run makes all cases in the same order, each with fresh daemons, and every bare loop that a
//! case is compared with; a slow spell of the machine so meets both.

mod bare;
mod closed;
mod cpu;
mod death;
mod open;
mod series;
mod world;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;

use crate::report::Report;
use series::Series;
use world::World;

/// A failure that can come from another thread.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// What to measure, and how much of it.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Runs of every case.
    #[arg(long, default_value_t = 10)]
    runs: u64,
    /// Seconds of every case in a run.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Cases to measure; all if not given.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Case>,
    /// GiB that a VMM-side process has touched when it is killed.
    #[arg(long, value_delimiter = ',', default_value = "1,4")]
    death_gib: Vec<u64>,
    /// The `vhost-ftlog` to measure; the one beside this program if not given.
    #[arg(long)]
    ftlog: Option<PathBuf>,
}

/// A group of figures with their baselines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Case {
    /// Latency of acknowledgements, one entry at a time.
    Ack,
    /// The same beside a busy thread on each CPU.
    Busy,
    /// Throughput, as fast as it goes.
    Throughput,
    /// Latency at a given rate of entries.
    Open,
    /// The death of a VMM-side process.
    Death,
    /// What the daemon's options of io_uring give, beside the default.
    Options,
}

/// How long a case is, and how long it is warmed up.
#[derive(Debug, Clone, Copy)]
struct Times {
    warm_up: Duration,
    case: Duration,
}

pub(crate) use death::{MemberOptions, member as run_member};

/// Measures all of it.
pub(crate) fn run(options: &Options, report: &mut Report) -> Result<(), crate::Failure> {
    measure(options, report).map_err(|failure| -> crate::Failure { failure })
}

fn measure(options: &Options, report: &mut Report) -> Result<(), Failure> {
    let ftlog = world::find_ftlog(options.ftlog.as_deref())?;
    let times = Times {
        warm_up: Duration::from_millis(100),
        case: Duration::from_secs_f64(options.seconds),
    };
    let wanted = |case| options.only.is_empty() || options.only.contains(&case);
    let world = World::new(&ftlog)?;
    let mut series = Series::default();
    let watchdog = Watchdog::start();
    for run in 1..=options.runs {
        eprintln!("run {run} of {}", options.runs);
        watchdog.feed();
        if wanted(Case::Ack) {
            closed::latency(&world, times, &mut series)?;
        }
        if wanted(Case::Busy) {
            closed::beside_busy_threads(&world, times, &mut series)?;
        }
        if wanted(Case::Throughput) {
            closed::throughput(&world, times, &mut series)?;
        }
        if wanted(Case::Open) {
            open::latency(&world, times, &mut series)?;
        }
        if wanted(Case::Death) {
            death::told(&world, &options.death_gib, &mut series)?;
        }
        if wanted(Case::Options) {
            closed::options(&world, times, &mut series)?;
        }
    }
    report.runs(options.runs);
    series.report(report);
    Ok(())
}

/// The longest time that a run may take.
const RUN_LIMIT: Duration = Duration::from_mins(10);

/// Ends the process where a run hangs: what is timed waits without limits, since a limit costs time.
struct Watchdog(mpsc::Sender<()>);

impl Watchdog {
    fn start() -> Self {
        let (feed, fed) = mpsc::channel();
        std::thread::spawn(move || {
            loop {
                match fed.recv_timeout(RUN_LIMIT) {
                    Ok(()) => {}
                    Err(mpsc::RecvTimeoutError::Disconnected) => return,
                    Err(mpsc::RecvTimeoutError::Timeout) => break,
                }
            }
            eprintln!("pollux-bench channel: a run takes more than {RUN_LIMIT:?}");
            std::process::exit(1);
        });
        Self(feed)
    }

    fn feed(&self) {
        // It ends with the process only.
        let _ = self.0.send(());
    }
}

/// The body of a VMM-side process that is to be killed.
pub(crate) fn member(options: &MemberOptions) -> ExitCode {
    match run_member(options) {
        Ok(never) => match never {},
        Err(failure) => {
            eprintln!("channel-member: {failure}");
            ExitCode::FAILURE
        }
    }
}
