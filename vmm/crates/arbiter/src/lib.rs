//! Arbiters: test-and-set of epoch records (R14), with I/O.
//!
//! - [`DirectoryArbiter`]: a directory on storage that all hosts share.
//! - [`EtcdArbiter`]: a key for each epoch, for sites that run etcd.
//!
//! Both answer the protocol's questions ([`ft::ArbiterRequest`]) and may take as long as the storage
//! takes; [`ArbiterThread`] asks one on a thread of its own, so that a mount that hangs hangs nothing
//! else. What may compete, and what a record says, is decided in `ft`.

mod directory;
mod etcd;
mod thread;

pub use directory::{DirectoryArbiter, DirectoryError};
pub use etcd::{EtcdArbiter, EtcdConfig};
pub use thread::{ArbiterThread, Busy, MAX_QUESTIONS};

use ft::{ArbiterReply, ArbiterRequest, CallId};

/// Answers who owns an epoch.
///
/// An implementation must answer [`ArbiterReply::Won`] only when the record stands durably and can
/// never be replaced, [`ArbiterReply::Taken`] only when another one does, and
/// [`ArbiterReply::Unreachable`] whenever it does not know. The same record asked for again, after any
/// answer, must never become [`ArbiterReply::Taken`] because of itself.
pub trait Arbiter: Send {
    /// Answers one question. May block for ever.
    fn answer(&mut self, call: CallId, request: ArbiterRequest) -> ArbiterReply;
}
