//! What the API asks of whoever runs the VM, and what it gets back.

use std::path::PathBuf;

use format::Epoch;
use ft::HostId;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

use super::events::EventRecord;
use super::limits::{Limits, LimitsChange};
use super::status::StatusReport;

/// The VM's session, as the API sees it. Called from several threads at once. Only
/// [`Control::command`] may take long.
pub trait Control: Send + Sync {
    /// How things stand.
    fn status(&self) -> StatusReport;

    /// Does something, or starts it: what comes of it is told as events.
    ///
    /// # Errors
    /// Why not, and what to do about it.
    fn command(&self, request: Request) -> Result<Reply, Refused>;

    /// What happened lately, and from there on what happens; see [`super::EventLog`].
    fn subscribe(&self) -> Subscription;

    /// Counters and gauges in the text format of Prometheus.
    fn metrics(&self) -> String;
}

/// Events: no event is in both parts, and none is missing between them.
#[derive(Debug)]
pub struct Subscription {
    /// The oldest first.
    pub recent: Vec<EventRecord>,
    /// Everything after them. A receiver that is too slow is told how many it missed.
    pub next: broadcast::Receiver<EventRecord>,
}

/// What an operator wants.
#[derive(Debug, Clone, PartialEq)]
pub enum Request {
    /// Look for a backup, now and from now on.
    Protect,
    /// Give the backup up, and look for none.
    Unprotect,
    /// Hand the VM over to the backup.
    SwitchOver,
    /// Give the session up as if the peer were lost: a drill.
    Fail,
    /// Let the guest stand still.
    Pause,
    /// Let it go on.
    Resume,
    /// Switch the VM off, on both sides.
    PowerOff,
    /// Reset the VM, on both sides.
    Reset,
    /// Write a snapshot of the running VM to this directory, an absolute path.
    Snapshot(PathBuf),
    /// Change limits. The answer carries those in force; a change of nothing only asks for them.
    Limits(LimitsChange),
    /// An operator states that this host holds no state of the VM and writes no more.
    HostGone(HostId),
    /// An operator states that nobody runs what the record of this epoch allows: start all the same.
    ForceStart(Epoch),
}

/// Something was done, or is under way.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// What, for people.
    pub message: String,
    /// The limits in force, where limits were asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
}

impl Reply {
    /// An answer for people.
    #[must_use]
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            limits: None,
        }
    }
}

/// Something was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{error}")]
pub struct Refused {
    /// What kind of refusal.
    pub reason: Reason,
    /// Why, for people.
    pub error: String,
    /// What to do about it, for people.
    pub remedy: String,
}

/// Kinds of refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The request makes no sense, ever.
    Invalid,
    /// It does not fit the present state.
    Conflict,
    /// Try again.
    Busy,
    /// It was tried, and failed.
    Failed,
}

impl Refused {
    /// A request that makes no sense.
    #[must_use]
    pub fn invalid(error: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Reason::Invalid, error, remedy)
    }

    /// A request that does not fit the present state.
    #[must_use]
    pub fn conflict(error: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Reason::Conflict, error, remedy)
    }

    /// A request that came at a bad time.
    #[must_use]
    pub fn busy(error: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Reason::Busy, error, remedy)
    }

    /// A request that was tried, and failed.
    #[must_use]
    pub fn failed(error: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Reason::Failed, error, remedy)
    }

    fn new(reason: Reason, error: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            reason,
            error: error.into(),
            remedy: remedy.into(),
        }
    }
}
