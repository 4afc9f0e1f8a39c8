//! The VMM's side of the logging channel: driver of the rings, frontend of vhost-user.
//!
//! [`Channel::start`] connects to a daemon, or starts one, and keeps it: a daemon that dies is started
//! or connected again and goes on from the rings. [`Channel::open`] begins a session and gives its
//! parts, which may go to different threads:
//!
//! - [`LogProducer`] copies an append into the arena once and publishes it at once; no system call
//!   unless the daemon asked to be woken.
//! - [`Acks`] says what is replicated, by reading the used ring; it can sleep until something is.
//! - [`LogConsumer`] reads delivered frames in place, without the daemon.
//!
//! Each session has an arena of its own; the parts of an old session stay readable until dropped.

mod acks;
mod channel;
mod consumer;
mod owner;
mod producer;
mod session;
mod spawn;
mod wake;
mod watchdog;
mod wire;

pub use acks::Acks;
pub use channel::{Channel, ChannelConfig, ChannelEvent, Events};
pub use consumer::{Delivered, LogConsumer, ReplayProgress};
pub use producer::{LogProducer, ProducerStats};
pub use session::Session;
#[cfg(test)]
pub(crate) use session::SessionMemory;
pub use spawn::{Daemon, SpawnConfig};
pub use wire::check_daemon;

use thiserror::Error;

/// What goes wrong in the VMM's side of the channel.
#[derive(Debug, Error)]
pub enum Error {
    /// The arena cannot be made, or the daemon broke the rings.
    #[error(transparent)]
    Ring(#[from] ring::Error),
    /// The daemon refused, or its connection broke.
    #[error("vhost-user: {what}")]
    Vhost {
        /// What was asked.
        what: &'static str,
        /// Why it failed.
        source: vhost::Error,
    },
    /// The daemon is another device, or another version of it.
    #[error(transparent)]
    Device(#[from] crate::config_space::BadRegister),
    /// The daemon lacks a feature.
    #[error("the daemon lacks {0}")]
    Feature(&'static str),
    /// The daemon cannot be started.
    #[error("start {program}: {why}")]
    Spawn {
        /// The program.
        program: String,
        /// What happened.
        why: String,
    },
    /// The kernel refused.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// There is no session, or no daemon at the moment.
    #[error("not now: {0}")]
    State(&'static str),
    /// The log that was delivered does not decode: the daemon is broken.
    #[error(transparent)]
    Format(#[from] format::Error),
    /// An append that is empty or longer than [`format::MAX_APPEND_LEN`].
    #[error("an append of {0} bytes")]
    AppendLen(usize),
    /// It took longer than the caller would wait.
    #[error("timed out")]
    TimedOut,
}

pub(crate) fn io_error(what: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::Io { what, source }
}
