//! What other threads ask of the data thread, and how they reach it.

use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::time::Duration;

use ebpf_events::maps::DaemonPage;
use format::Seq;
use heartbeat::Page;
use ring::VringLayout;
use thiserror::Error;

use super::stats::Stats;
use crate::config_space::{BulkId, SessionParams, Status, Tuning};
use crate::daemon::memory::DeviceMemory;
use crate::handshake::{Purpose, Refusal, Request};

/// Why the data thread refuses.
#[derive(Debug, Error)]
pub enum Refused {
    /// The shared memory or a ring is not acceptable.
    #[error(transparent)]
    Ring(#[from] ring::Error),
    /// The kernel refused.
    #[error("the kernel refused")]
    Io(#[from] std::io::Error),
    /// It makes no sense in this state.
    #[error("not now: {0}")]
    State(&'static str),
    /// The data thread is gone or hangs.
    #[error("the data thread does not answer")]
    Gone,
}

/// A queue as the VMM described it.
pub struct QueueSetup {
    /// Which.
    pub index: usize,
    /// The memory that it is in.
    pub memory: Arc<DeviceMemory>,
    /// Where in it.
    pub layout: VringLayout,
    /// The index before which all is used.
    pub base: u16,
    /// Whether in-order use was negotiated.
    pub in_order: bool,
    /// Eventfd of the VMM's kicks.
    pub kick: Option<OwnedFd>,
    /// Eventfd of calls to the VMM.
    pub call: Option<OwnedFd>,
}

/// A connection to adopt needs this first: the old connection is gone, the resume point fixed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prepared {
    /// Which preparation: a later one invalidates it.
    pub generation: u64,
    /// The receiver's resume point, if this side is the receiver; else zero.
    pub next: Seq,
}

/// Where an answer goes.
pub type Reply<T> = SyncSender<T>;

/// What other threads ask for.
#[allow(missing_docs)] // The fields are what the variants say.
pub enum Command {
    /// Use this memory from now on, and let go of what was used before.
    SetMemory(Arc<DeviceMemory>, Reply<Result<(), Refused>>),
    /// Use a queue.
    StartQueue(Box<QueueSetup>, Reply<Result<(), Refused>>),
    /// Let go of a queue and of all memory that it names; its used index is the answer.
    StopQueue(usize, Reply<u16>),
    /// Let go of the shared memory, queues and session of the last VMM.
    Forget(Reply<Result<(), Refused>>),
    /// The VMM's vhost-user connection has ended.
    FrontendGone,
    /// Begin or continue a session.
    Open(SessionParams, Reply<Result<(), Refused>>),
    /// End it (R13).
    Close(Reply<()>),
    /// Change the limits.
    Tune(Tuning),
    /// A peer asks for a connection of the session; or, without a request, this side dials.
    Prepare(
        Option<Purpose>,
        SessionParamsOf,
        Reply<Result<Prepared, Refusal>>,
    ),
    /// The connection that was prepared is up; the peer's resume point with it.
    Adopt(u64, TcpStream, Seq),
    /// A bulk stream can be fetched.
    BulkReady(BulkId),
    /// The peer's daemon says that the VMM behind it is dead.
    PeerVmmDead(SessionParamsOf),
    /// What is measured.
    Snapshot(Reply<Box<Snapshot>>),
    /// The state of the session, and the limits in force.
    Status(Reply<(Status, Tuning)>),
    /// Tick this page of `ftprobe` too.
    Beat(Page<DaemonPage>),
    /// Acknowledge what is published, then end (SIGTERM).
    Drain,
}

/// Which session a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionParamsOf {
    /// The pairing.
    pub session: format::SessionId,
    /// Its epoch.
    pub epoch: format::Epoch,
}

impl From<&Request> for SessionParamsOf {
    fn from(request: &Request) -> Self {
        Self {
            session: request.session,
            epoch: request.epoch,
        }
    }
}

impl From<&SessionParams> for SessionParamsOf {
    fn from(params: &SessionParams) -> Self {
        Self {
            session: params.session,
            epoch: params.epoch,
        }
    }
}

/// A copy of what the data thread measures.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Counters and histograms.
    pub stats: Stats,
    /// The state of the session.
    pub status: Status,
    /// Appends that are not acknowledged.
    pub queue_depth: u64,
    /// Bytes in the delivery ring that the VMM has not consumed.
    pub delivery_backlog: u64,
    /// The limits in force.
    pub tuning: Tuning,
}

/// What the data thread tells the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Report {
    /// A session is open (again): connect.
    Opened(SessionParams),
    /// The connection of this generation is lost; connect again.
    Lost,
    /// The session is over.
    Closed,
    /// All is done that was still to be done for a VMM that is dead, or for a drain.
    Finished,
}

/// The longest time that the data thread may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// The other threads' handle on the data thread.
#[derive(Clone)]
pub struct EngineHandle {
    commands: Sender<Command>,
    doorbell: Arc<OwnedFd>,
}

impl EngineHandle {
    /// A handle, and the end for the data thread.
    ///
    /// # Errors
    /// Where there is no eventfd to be had.
    pub fn new() -> std::io::Result<(Self, Receiver<Command>, OwnedFd)> {
        let doorbell = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?;
        let (commands, inbox) = mpsc::channel();
        let theirs = doorbell.try_clone()?;
        let handle = Self {
            commands,
            doorbell: Arc::new(doorbell),
        };
        Ok((handle, inbox, theirs))
    }

    /// Sends a command that has no answer.
    ///
    /// # Errors
    /// [`Refused::Gone`].
    pub fn tell(&self, command: Command) -> Result<(), Refused> {
        self.commands.send(command).map_err(|_| Refused::Gone)?;
        rustix::io::write(&*self.doorbell, &1u64.to_ne_bytes()).map_err(|_| Refused::Gone)?;
        Ok(())
    }

    /// Sends a command and waits for its answer.
    ///
    /// # Errors
    /// [`Refused::Gone`].
    pub fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Refused> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.tell(command(reply))?;
        answer
            .recv_timeout(ANSWER_LIMIT)
            .map_err(|error| match error {
                RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected => Refused::Gone,
            })
    }
}
