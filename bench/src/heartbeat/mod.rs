//! `pollux-bench heartbeat`: how long a heartbeat takes on idle and on starved hosts, answered in the
//! kernel and in userspace, and how soon each cause of failure is seen.
//!
//! Two network namespaces of this machine and a veth; host A's processes on CPU 0, host B's on CPU 1.

mod detect;
mod hogs;
mod rtt;
mod watch;
mod world;

use std::path::PathBuf;
use std::process::ExitCode;

use crate::Failure;
use crate::report::Measure;

/// What to measure, and how much of it.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Round trips to measure in each of the kernel's cases.
    #[arg(long, default_value_t = 100_000)]
    probes: u64,
    /// Round trips to measure with a userspace responder, which takes longer for each.
    #[arg(long, default_value_t = 10_000)]
    userspace_probes: u64,
    /// How often each cause of failure is made.
    #[arg(long, default_value_t = 100)]
    detections: u64,
    /// Seconds for which two healthy, starved pairs of hosts are watched for false failovers.
    #[arg(long, default_value_t = 1_800)]
    watch_seconds: u64,
    /// Busy threads on each CPU in the cases with hogs.
    #[arg(long, default_value_t = 10)]
    hogs: usize,
    /// The `ftprobe` to measure; the one beside this program if not given.
    #[arg(long)]
    ftprobe: Option<PathBuf>,
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

/// Measures all of it.
pub(crate) fn run(options: &Options) -> Result<Vec<Measure>, Failure> {
    let ftprobe = world::find_ftprobe(options.ftprobe.as_deref())?;
    let mut results = rtt::measure(options, &ftprobe)?;
    results.extend(detect::measure(options, &ftprobe)?);
    results.extend(detect::false_failovers(options, &ftprobe)?);
    Ok(results)
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
