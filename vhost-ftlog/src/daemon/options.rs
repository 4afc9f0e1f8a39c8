//! The command line, validated into what the daemon runs with.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use thiserror::Error;

use super::tcp::SocketOptions;
use crate::config_space::{AckMode, BadRegister, Tuning};
use crate::handshake::{self, Key};

/// The logging channel of a fault-tolerant virtual machine: a vhost-user backend that carries the log
/// to the backup's host.
#[derive(Debug, Clone, Parser)]
#[command(name = "vhost-ftlog", version)]
pub struct Options {
    /// Unix socket on which the VMM is served (vhost-user)
    #[arg(long)]
    pub socket: PathBuf,
    /// Unix socket for metrics and limits
    #[arg(long)]
    pub admin: Option<PathBuf>,
    /// Socket of ftprobe: heartbeats then tell of this daemon
    #[arg(long)]
    pub probes: Option<PathBuf>,
    /// Address and port on which the peer's daemon is waited for; port 0: any
    #[arg(long)]
    pub listen: Option<SocketAddr>,
    /// File with the key that both daemons share, at least 16 bytes
    #[arg(long)]
    pub key_file: PathBuf,
    /// Network interface to bind to
    #[arg(long)]
    pub interface: Option<String>,
    /// TCP congestion control; empty: the system's
    #[arg(long, default_value = "cubic")]
    pub congestion: String,
    /// DSCP of the log's connection
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..64))]
    pub dscp: u8,
    /// DSCP of bulk streams (state transfer)
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u8).range(0..64))]
    pub bulk_dscp: u8,
    /// Unanswered data for this long ends a connection
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u64).range(1..))]
    pub user_timeout_ms: u64,
    /// Silence before a keep-alive probe, and between probes (whole seconds count)
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1000..))]
    pub keepalive_ms: u64,
    /// How long to go on delivering for a VMM that is dead, and to drain on SIGTERM
    #[arg(long, default_value_t = 5000)]
    pub linger_ms: u64,
    /// A batch is sent once it has this many bytes
    #[arg(long, default_value_t = Tuning::default().batch_bytes)]
    pub batch_bytes: u32,
    /// A batch is sent once its first append is this old, or with the acknowledgement that is then on its way, in us
    #[arg(long, default_value_t = Tuning::default().batch_us)]
    pub batch_us: u32,
    /// The longest time that one wait spins before it sleeps; 0: never spin
    #[arg(long, default_value_t = Tuning::default().spin_us)]
    pub spin_us: u32,
    /// Share of one CPU that spinning may take on average, in thousandths
    #[arg(long, default_value_t = Tuning::default().spin_permille)]
    pub spin_permille: u32,
    /// Spin without letting others on the CPU run: for a CPU of its own
    #[arg(long)]
    pub spin_hard: bool,
    /// Send large frames from the arena's pages (SENDMSG_ZC): for network cards that gather them; measure first
    #[arg(long)]
    pub send_zc: bool,
    /// Have a kernel thread take what the data thread submits (SQPOLL): for a host with a CPU to spare for it
    #[arg(long)]
    pub sqpoll: bool,
    /// Scheduling of the data thread
    #[arg(long, value_enum, default_value_t = Priority::Fifo)]
    pub priority: Priority,
    /// Run the data thread on this CPU
    #[arg(long)]
    pub cpu: Option<usize>,
    /// An existing control group to move into
    #[arg(long)]
    pub cgroup: Option<PathBuf>,
    /// End once the VMM is gone and its log is delivered
    #[arg(long)]
    pub once: bool,
    /// Stay in the session of the terminal
    #[arg(long)]
    pub foreground: bool,
    /// Print one line of JSON on standard output when ready
    #[arg(long)]
    pub announce: bool,
}

/// Scheduling of the data thread: it decides the worst latency beside busy threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Priority {
    /// Nice -20, where permitted
    Nice,
    /// SCHED_FIFO 1, where permitted, else nice -20: beside busy threads the fair scheduler can keep even
    /// nice -20 waiting for some milliseconds
    Fifo,
    /// As started
    None,
}

/// Why the options cannot be used.
#[derive(Debug, Error)]
pub enum OptionsError {
    /// The key file cannot be read.
    #[error("key file {path}")]
    KeyFile {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The key is no key.
    #[error(transparent)]
    Key(#[from] handshake::Error),
    /// A limit is out of its range.
    #[error(transparent)]
    Tuning(#[from] BadRegister),
}

impl Options {
    /// The socket options.
    #[must_use]
    pub fn sockets(&self) -> SocketOptions {
        SocketOptions {
            interface: self.interface.clone(),
            congestion: self.congestion.clone(),
            dscp: self.dscp,
            bulk_dscp: self.bulk_dscp,
            user_timeout: Duration::from_millis(self.user_timeout_ms),
            keepalive: Duration::from_millis(self.keepalive_ms),
        }
    }

    /// The limits that hold until the VMM or the operator changes them.
    ///
    /// # Errors
    /// Which one is out of its range.
    pub fn tuning(&self) -> Result<Tuning, OptionsError> {
        let tuning = Tuning {
            batch_bytes: self.batch_bytes,
            batch_us: self.batch_us,
            spin_us: self.spin_us,
            spin_permille: self.spin_permille,
            ack_mode: AckMode::Received,
        };
        tuning.validate()?;
        Ok(tuning)
    }

    /// The shared key.
    ///
    /// # Errors
    /// Where the file cannot be read or is too short.
    pub fn key(&self) -> Result<Key, OptionsError> {
        let bytes = std::fs::read(&self.key_file).map_err(|source| OptionsError::KeyFile {
            path: self.key_file.clone(),
            source,
        })?;
        Ok(Key::new(bytes)?)
    }
}
