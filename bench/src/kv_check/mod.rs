//! The checking client of a Redis server: whether every answer can be that of one copy of the data.
//!
//! ```text
//! options ─> client: one thread, many connections ── requests, answers ──> server
//!              │ keyspace: what to ask for, on own and shared keys
//!              │ history:  what was asked and answered, for each key
//!              └ check:    after the last answer on a key ──> outcome ──> report
//! ```
//! A connection is opened once and never again: one that breaks is counted. Values are unique, so that
//! every answer tells which write it saw. A key is given up after [`keyspace::OPERATIONS_OF_A_KEY`]
//! operations, read a last time, and its history is checked and dropped, so that memory does not grow with
//! time; what it held is read once more at the end. All times are those of [`crate::monotonic`].
#![allow(dead_code)] // parts of it are for benchmarks to come

pub(crate) mod check;
mod client;
mod connection;
mod history;
mod journal;
mod keyspace;
mod live;
mod outcome;
pub(crate) mod resp;
mod value;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

pub(crate) use live::Live;
pub(crate) use outcome::Outcome;

use crate::Failure;
use crate::report::Report;

/// What to do to which server.
///
/// Many connections write, read, count and append, each on keys of its own and on shared ones. At the end
/// all answers are checked for linearizability: whether they can be those of one copy of the data on which
/// one operation after the other was done. The exit code is 0 only if no acknowledged write was lost, no
/// answer contradicts others, none was refused and no connection broke.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// Address of the server.
    #[arg(long, value_name = "IP:PORT")]
    pub(crate) addr: SocketAddr,
    /// How many TCP connections.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub(crate) connections: u16,
    /// For how long requests are sent.
    #[arg(long, default_value_t = 10.0, value_parser = positive_seconds)]
    pub(crate) seconds: f64,
    /// How many requests a connection has on their way at a time.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) pipeline: u16,
    /// Bytes of a value that is set.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(16..=65536))]
    pub(crate) value_bytes: u32,
    /// Seed of the choice of requests; drawn if it is not given.
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// Writes every request and answer to this file, one JSON object a line.
    #[arg(long, value_name = "FILE")]
    pub(crate) history: Option<PathBuf>,
    /// How long the last answers are waited for before their connection counts as broken.
    #[arg(long, default_value_t = 30.0, value_parser = positive_seconds)]
    pub(crate) patience: f64,
}

impl Options {
    /// The defaults, for a server at this address.
    pub(crate) fn new(addr: SocketAddr) -> Self {
        Self {
            addr,
            connections: 16,
            seconds: 10.0,
            pipeline: 1,
            value_bytes: 64,
            seed: None,
            history: None,
            patience: 30.0,
        }
    }
}

fn positive_seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if seconds > 0.0 && seconds <= 1e6 {
        Ok(seconds)
    } else {
        Err("must be more than 0 and at most 1000000".to_owned())
    }
}

/// Why nothing could be checked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KvError {
    /// A connection was refused at the start.
    #[error("cannot connect to {addr}: {source}")]
    Connect {
        /// The server.
        addr: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file for the history cannot be written.
    #[error("cannot write the history: {0}")]
    Journal(std::io::Error),
    /// Waiting for answers failed.
    #[error("waiting for answers: {0}")]
    Wait(std::io::Error),
    /// The client's host cannot be entered.
    #[error("{0}")]
    Host(String),
    /// [`Live::abort`].
    #[error("the check was ended before its time")]
    Aborted,
}

/// Runs the check against a server; `live` tells how it stands, and can end it.
///
/// # Errors
/// [`KvError`]. Whatever the server says, or a connection that breaks later, is no error but a part of
/// the outcome.
pub(crate) fn check_server(options: &Options, live: &Live) -> Result<Outcome, KvError> {
    client::Client::connect(options, live)?.run()
}

/// `pollux-bench kv-check`.
pub(crate) fn run(options: &Options, report: &mut Report) -> Result<(), Failure> {
    eprintln!(
        "kv-check: {} connections to {} for {} s",
        options.connections, options.addr, options.seconds
    );
    let live = Live::new(options.connections);
    let outcome = with_progress(&live, || check_server(options, &live))?;
    outcome.report(report);
    Ok(())
}

/// Tells on standard error how a check stands, while it goes on.
pub(crate) fn with_progress<T: Send>(live: &Live, job: impl FnOnce() -> T + Send) -> T {
    const EVERY: Duration = Duration::from_secs(5);
    std::thread::scope(|scope| {
        let (done, is_done) = std::sync::mpsc::channel::<()>();
        scope.spawn(move || {
            while is_done.recv_timeout(EVERY) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                eprintln!("kv-check: {live}");
            }
        });
        let result = job();
        drop(done);
        result
    })
}

#[cfg(test)]
mod tests;
