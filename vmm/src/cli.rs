//! The command line.

use std::io::IsTerminal;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use tracing_subscriber::EnvFilter;

use crate::commands::CtlOptions;
use crate::config::VmOptions;
use crate::config_ft::FtOptions;
use crate::preflight::PreflightArgs;

/// Runs virtual machines that survive the loss of their host.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, max_term_width = 100)]
pub struct Cli {
    /// How the program logs
    #[command(flatten)]
    pub log: LogOptions,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// How the program logs: to standard error.
#[derive(Debug, Args)]
pub struct LogOptions {
    /// What is logged: a level (error, warn, info, debug, trace), or `module=level` pairs
    #[arg(
        long,
        global = true,
        env = "POLLUX_LOG",
        default_value = "warn",
        value_name = "FILTER"
    )]
    pub log: String,
    /// Log format
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

/// Log formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot a VM and give its console: Ctrl-A x leaves
    Run(RunOptions),
    /// Boot a VM and record it, so that `replay` can run it again exactly
    Record(RecordOptions),
    /// Run a recording again and compare every register and every output with it
    Replay(ReplayOptions),
    /// Boot a VM, wait for a text on its console, and write a snapshot of it
    Snapshot(SnapshotOptions),
    /// Go on with a VM from a snapshot
    Restore(RestoreOptions),
    /// Make shared storage ready for a VM that is to be protected: once, with the storage mounted
    Init(InitOptions),
    /// Wait for work: take over a protected VM when its primary is lost
    Standby(StandbyOptions),
    /// Look after a running VM: its status, its events, commands to it
    Ctl(CtlOptions),
    /// Look into what this host can do, and what to do about what it cannot
    Preflight(PreflightArgs),
    /// Look into a log
    #[command(subcommand)]
    Log(LogCommand),
}

/// Options of `init`.
#[derive(Debug, Args)]
pub struct InitOptions {
    /// Directory on shared storage that decides who may run the VM
    #[arg(long, value_name = "DIR")]
    pub shared: PathBuf,
}

/// Options of `run`.
#[derive(Debug, Args)]
pub struct RunOptions {
    /// Configuration file (TOML); flags win over it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The VM
    #[command(flatten)]
    pub vm: VmOptions,
    /// Go on from this snapshot instead of booting
    #[arg(long, value_name = "DIR")]
    pub from_snapshot: Option<PathBuf>,
    /// Protection
    #[command(flatten)]
    pub ft: FtOptions,
}

/// Options of `snapshot`.
#[derive(Debug, Args)]
pub struct SnapshotOptions {
    /// Snapshot to write: a directory
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Text on the console to wait for
    #[arg(long, value_name = "TEXT", default_value = "READY")]
    pub at: String,
    /// How long to wait for it, in s
    #[arg(long, value_name = "S", default_value_t = 600)]
    pub timeout_s: u64,
    /// Write where the kernel spent the time until then to this file
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
    /// Configuration file (TOML); flags win over it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The VM
    #[command(flatten)]
    pub vm: VmOptions,
}

/// Options of `standby`.
#[derive(Debug, Args)]
pub struct StandbyOptions {
    /// Configuration file (TOML); flags win over it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The VM's devices on this host
    #[command(flatten)]
    pub vm: VmOptions,
    /// Protection
    #[command(flatten)]
    pub ft: FtOptions,
}

/// Options of `record`.
#[derive(Debug, Args)]
pub struct RecordOptions {
    /// Recording to write: a directory, `.incomplete` until it is closed in order
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Kick the vCPU at random moments, to show that the recording does not depend on it
    #[arg(long)]
    pub disturb: bool,
    /// Go on from this snapshot instead of booting
    #[arg(long, value_name = "DIR")]
    pub from_snapshot: Option<PathBuf>,
    /// Configuration file (TOML); flags win over it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The VM
    #[command(flatten)]
    pub vm: VmOptions,
}

/// Options of `replay`.
#[derive(Debug, Args)]
pub struct ReplayOptions {
    /// The recording
    #[arg(value_name = "DIR")]
    pub recording: PathBuf,
    /// Stop after this exit
    #[arg(long, value_name = "EXIT")]
    pub until: Option<u64>,
    /// Stop after so many entries
    #[arg(long, value_name = "COUNT")]
    pub entries: Option<u64>,
    /// Go live where the log ends (or at --until, or after --entries), with this console and these devices
    #[arg(long)]
    pub live: bool,
    /// Take the host's mapping of guest memory away now and then, to show that it does not matter
    #[arg(long)]
    pub disturb: bool,
    /// Save the state at this exit to a snapshot
    #[arg(long, value_name = "DIR", requires = "until")]
    pub save: Option<PathBuf>,
    /// Begin from this state (one that --save wrote) instead of the recording's own
    #[arg(long, value_name = "DIR")]
    pub from: Option<PathBuf>,
    /// Save at this many random exits, and replay the rest from each in a process of its own
    #[arg(long, value_name = "COUNT", conflicts_with_all = ["until", "entries", "live", "from"])]
    pub saves: Option<u32>,
    /// Seed of --saves
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    pub seed: u64,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
    /// Devices for --live. The disk must be as it was when the recording began (a copy): what the
    /// recording is known to have written is written to it
    #[command(flatten)]
    pub vm: VmOptions,
}

/// Options of `restore`.
#[derive(Debug, Args)]
pub struct RestoreOptions {
    /// The snapshot
    #[arg(value_name = "DIR")]
    pub snapshot: PathBuf,
    /// Write where the guest's kernel spent the time to this file; needs --kernel
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
    /// Devices
    #[command(flatten)]
    pub vm: VmOptions,
}

/// Ways to look into a log.
#[derive(Debug, Subcommand)]
pub enum LogCommand {
    /// Print every entry, one a line
    Dump(LogOne),
    /// Count entries and bytes by kind
    Stat(LogStat),
    /// Show where two logs begin to differ
    Diff {
        /// A recording
        #[arg(value_name = "DIR")]
        left: PathBuf,
        /// Another
        #[arg(value_name = "DIR")]
        right: PathBuf,
    },
    /// Print entries of a kind, or between two exits
    Grep(LogGrep),
}

/// One log.
#[derive(Debug, Args)]
pub struct LogOne {
    /// The recording
    #[arg(value_name = "DIR")]
    pub recording: PathBuf,
}

/// Options of `log stat`.
#[derive(Debug, Args)]
pub struct LogStat {
    /// The recording
    #[arg(value_name = "DIR")]
    pub recording: PathBuf,
    /// Leave out the first seconds of virtual time
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub after_s: u64,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `log grep`.
#[derive(Debug, Args)]
pub struct LogGrep {
    /// The recording
    #[arg(value_name = "DIR")]
    pub recording: PathBuf,
    /// Kind of entry: Time, Entropy, NetRx, ConsoleRx, DiskDone, Output, Reached, Delta, Control
    #[arg(long)]
    pub kind: Option<String>,
    /// First exit
    #[arg(long, default_value_t = 0)]
    pub from: u64,
    /// Last exit
    #[arg(long, default_value_t = u64::MAX)]
    pub to: u64,
    /// Only entries whose data contains this text
    #[arg(long)]
    pub text: Option<String>,
}

/// Starts logging to standard error.
pub fn start_log(options: &LogOptions) {
    let filter = EnvFilter::try_new(&options.log).unwrap_or_else(|error| {
        eprintln!("pollux: --log {:?}: {error}; logging warnings", options.log);
        EnvFilter::new("warn")
    });
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // Where nobody reads standard error any more, telling that would panic.
        .log_internal_errors(false)
        .with_ansi(std::io::stderr().is_terminal());
    match options.log_format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
}
