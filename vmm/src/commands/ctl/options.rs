//! The command line of `pollux ctl`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use ft::HostId;

use crate::api::LimitsChange;

/// Options of `ctl`.
#[derive(Debug, Args)]
pub struct CtlOptions {
    /// Unix socket of the API: what --api of `run` or `standby` names
    #[arg(value_name = "SOCKET")]
    pub socket: PathBuf,
    /// How long to wait for an answer, in seconds
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 60,
        value_parser = clap::value_parser!(u64).range(1..=86_400)
    )]
    pub timeout: u64,
    /// What to do
    #[command(subcommand)]
    pub action: CtlAction,
}

impl CtlOptions {
    pub(super) fn limit(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }
}

/// What `ctl` does.
#[derive(Debug, Subcommand)]
pub enum CtlAction {
    /// Show how things stand
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what happens, as it happens
    Events(EventsOptions),
    /// Print counters in the text format of Prometheus
    Metrics,
    /// Find a backup, now and from now on
    Protect,
    /// Give the backup up, and find none
    Unprotect,
    /// Hand the VM over to the backup, without loss
    SwitchOver,
    /// Drill: give the session up as if the other host were lost
    Fail,
    /// Let the guest stand still
    Pause,
    /// Let the guest go on
    Resume,
    /// Switch the VM off, on both sides
    PowerOff,
    /// Reset the VM, on both sides
    Reset,
    /// Write a snapshot of the running VM
    Snapshot {
        /// Directory to write it to
        #[arg(value_name = "DIR")]
        dir: PathBuf,
    },
    /// Show or change limits while the VM runs
    Limits {
        /// New limits; without any, those in force are shown
        #[command(flatten)]
        change: LimitsChange,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// State that a host holds no state of the VM and writes no more: only if you made sure
    HostGone {
        /// The host
        #[arg(value_name = "HOST")]
        host: HostId,
    },
    /// State that the VM runs nowhere, and start it here: only if you made sure
    ForceStart {
        /// The epoch that `status` and the events name
        #[arg(value_name = "EPOCH")]
        epoch: u64,
    },
}

/// Options of `ctl events`.
#[derive(Debug, Args)]
pub struct EventsOptions {
    /// Print JSON, one object a line
    #[arg(long)]
    pub json: bool,
    /// Only what has happened lately
    #[arg(long, conflicts_with = "new")]
    pub recent: bool,
    /// Only what happens from now on
    #[arg(long)]
    pub new: bool,
}
