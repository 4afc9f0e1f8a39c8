//! `pollux-bench heartbeat`: how long a heartbeat takes on idle and on starved hosts, answered in the
//! kernel and in userspace, and how soon each cause of failure is seen.
//!
//! Two network namespaces of this machine and a veth; host A's processes on CPU 0, host B's on CPU 1.

mod channel;
mod cost;
mod detect;
pub(crate) mod hogs;
mod rtt;
mod scheduling;
mod soak;
mod stalls;
mod watch;
mod world;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use crate::Failure;
use crate::report::Report;
use crate::stage::StageOptions;

/// What to measure, and how much of it.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Round trips to measure in each of the kernel's cases.
    #[arg(long, default_value_t = 100_000)]
    probes: u64,
    /// Round trips to measure with a userspace responder, which takes longer for each.
    #[arg(long, default_value_t = 10_000)]
    userspace_probes: u64,
    /// Measure these cases of round trips only, by their names in the output.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    rtt_cases: Vec<String>,
    /// How often each cause of failure is made.
    #[arg(long, default_value_t = 100)]
    detections: u64,
    /// Seconds for which two healthy, starved pairs of hosts are watched for false failovers.
    #[arg(long, default_value_t = 1_800)]
    watch_seconds: u64,
    /// Busy threads on each CPU in the cases with hogs.
    #[arg(long, default_value_t = 10)]
    hogs: usize,
    /// Seconds for which stalls of the machine are looked for.
    #[arg(long, default_value_t = 10)]
    stall_seconds: u64,
    /// Minutes for which two protected VMs are watched on starved hosts, one with heartbeats of each kind.
    #[arg(long, value_name = "MINUTES", default_value_t = 30.0)]
    soak: f64,
    /// Measure these parts only; may be given again.
    #[arg(long, value_enum)]
    only: Vec<Part>,
    /// The `ftprobe` to measure; the one beside this program if not given.
    #[arg(long)]
    ftprobe: Option<PathBuf>,
    #[command(flatten)]
    stage: StageOptions,
}

/// Where a member finds its session.
#[derive(Debug, clap::Args)]
pub(crate) struct MemberOptions {
    /// Socket of `ftprobe`.
    #[arg(long)]
    socket: PathBuf,
    /// The session to join.
    #[arg(long)]
    session: u64,
}

/// A part of the benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Times in which the machine below does not run.
    Stalls,
    /// Round trips of heartbeats.
    Rtt,
    /// Times of detection by cause, on idle hosts.
    Detect,
    /// The same on starved hosts.
    DetectHogs,
    /// What the probes cost the channel, and whether the stages add up.
    Cost,
    /// Healthy, starved pairs that are watched.
    Watch,
    /// Protected VMs on starved hosts.
    Soak,
}

/// Measures all of it, or the parts that were asked for.
pub(crate) fn run(options: &Options, report: &mut Report) -> Result<(), Failure> {
    let ftprobe = world::find_ftprobe(options.ftprobe.as_deref())?;
    let wanted = |part| options.only.is_empty() || options.only.contains(&part);
    if wanted(Part::Stalls) {
        stalls::measure(Duration::from_secs(options.stall_seconds), report)?;
    }
    if wanted(Part::Rtt) {
        rtt::measure(options, &ftprobe, report)?;
    }
    if wanted(Part::Detect) {
        detect::measure(options, &ftprobe, 0, report)?;
    }
    if wanted(Part::DetectHogs) {
        detect::measure(options, &ftprobe, options.hogs, report)?;
    }
    if wanted(Part::Cost) {
        cost::measure(&ftprobe, report)?;
    }
    if wanted(Part::Watch) {
        detect::false_failovers(options, &ftprobe, report)?;
    }
    if wanted(Part::Soak) {
        soak::measure(options, report)?;
    }
    Ok(())
}

/// See [`crate::Bench::HeartbeatMember`].
pub(crate) fn member(options: &MemberOptions) -> ExitCode {
    match world::join_and_tick(&options.socket, options.session) {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!("member: {error}");
            ExitCode::FAILURE
        }
    }
}
