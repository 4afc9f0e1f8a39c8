//! What reaches the session's thread.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use format::SessionId;
use ft::{ArbiterReply, CallId, Command};
use vhost_ftlog::frontend::ChannelEvent;

use super::probes::ProbeNews;
use crate::api::{Limits, LimitsChange, Refused, StatusReport};
use crate::link::LinkEvent;
use crate::vm::{FromBackup, FromPrimary};
use transfer::fork::Child;

/// Something for the session's thread.
pub enum SessionEvent {
    /// From the VM that went live as the so-many-th of this process.
    Primary(u64, FromPrimary),
    /// From the replica of this session.
    Backup(SessionId, FromBackup),
    /// From another VMM.
    Link(LinkEvent),
    /// From the arbiter.
    Arbiter(CallId, ArbiterReply),
    /// Image and TAP were tried: whether this host can use them.
    WorldProbed(bool),
    /// The newest record, which an idle standby asked for.
    Record(ArbiterReply),
    /// From the logging channel.
    Channel(ChannelEvent),
    /// A state transfer began, with the VM stopped for so long (in ns), or failed.
    Transfer(SessionId, Result<TransferBegun, String>),
    /// The child that streamed the state has ended: how many bytes it sent, or why not all.
    TransferEnded(SessionId, Result<u64, String>),
    /// An operator's command, and where to say why it is refused.
    Command(Command, Sender<Result<(), &'static str>>),
    /// Somebody wants to know.
    Status(Sender<StatusReport>),
    /// Write a snapshot to this directory.
    Snapshot(PathBuf, Sender<Result<(), String>>),
    /// Change limits; those in force are the answer.
    Limits(LimitsChange, Sender<Result<Limits, Refused>>),
    /// Stop the vCPU, or let it run. False: no VM runs here.
    Pause(bool, Sender<bool>),
    /// The probe daemon came or went.
    Probes(ProbeNews),
    /// Nothing: asks whether the session is still there.
    Nothing,
    /// This process is asked to end.
    Stop,
}

/// The start of a state transfer.
#[derive(Debug, Clone)]
pub struct TransferBegun {
    /// How long the VM stood still, in ns.
    pub stop_ns: u64,
    /// The exit that the log begins at.
    pub exit: format::ExitNumber,
    /// The process that streams the state.
    pub child: Arc<Child>,
}
