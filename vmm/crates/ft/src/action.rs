//! What a replica wants done. Actions of one call are done in their order; each may be slow, and the
//! process may stop for ever between any two.

use std::collections::VecDeque;

use format::{ControlOp, Epoch, Seq, SessionId};

use crate::arbiter::{ArbiterRequest, CallId};
use crate::detector::Cause;
use crate::event::Quiesce;
use crate::fingerprint::Difference;
use crate::gate::GateMode;
use crate::names::HostId;
use crate::peer::{DivergenceReport, PeerMessage};
use crate::quarantine::Quarantine;
use crate::record::EpochRecord;

/// The most actions that one event causes.
pub const MAX_ACTIONS: usize = 256;

/// Something to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Ask the arbiter; the answer is [`Event::Arbiter`](crate::Event::Arbiter). One at a time.
    Arbiter {
        /// Names the question.
        call: CallId,
        /// The question.
        request: ArbiterRequest,
    },
    /// Send a message, if there is a connection; connect if there is none.
    Send {
        /// To whom.
        to: HostId,
        /// What.
        message: PeerMessage,
    },
    /// Send heartbeats to this host's kernel when [`Action::Probe`] says so, and report its traffic.
    Watch {
        /// The host.
        peer: HostId,
        /// The session whose keys sign them.
        session: SessionId,
    },
    /// Send this heartbeat.
    Probe {
        /// The host.
        peer: HostId,
        /// Its number.
        probe: u64,
    },
    /// No more heartbeats.
    Unwatch,
    /// Set the gate's mode. For [`GateMode::Holding`] answer [`Event::GateHolds`](crate::Event).
    Gate(GateMode),

    /// Primary: open the session's channel, save the state at the next numbered exit, stream it to
    /// `to`, and log from there: [`Event::TransferStarted`](crate::Event).
    StartTransfer {
        /// The standby.
        to: HostId,
        /// The session.
        session: SessionId,
        /// The epoch that frames carry.
        epoch: Epoch,
    },
    /// Primary: frames carry this epoch from now on.
    SetEpoch(Epoch),
    /// Primary: the session is over: stop streaming, close the channel, log no more.
    EndSession(SessionId),
    /// Primary: put this into the log at the next execution point, and let the guest feel it there.
    Inject(ControlOp, Vec<u8>),
    /// Primary: bring the guest to rest: stop the vCPU at a numbered exit, complete all disk I/O with
    /// `DiskDone` logged, and for a switch-over append `SwitchOver` as the last entry. Answer
    /// [`Event::Quiesced`](crate::Event).
    Quiesce(Quiesce),
    /// Primary: the guest goes on; a [`Action::Quiesce`] in the making is off.
    Resume,
    /// Primary: copy the quarantined sectors from their side files into the image, durably, while
    /// guest writes to them wait: [`Event::Folded`](crate::Event).
    Fold(Quarantine),
    /// Primary: the quarantine is over: all sectors are in the image; waiting writes go on.
    Unquarantine,

    /// Backup: take the state and the log of this session: [`Event::StateReceived`](crate::Event),
    /// [`Event::Replayed`](crate::Event).
    LoadState {
        /// The primary.
        from: HostId,
        /// The session.
        session: SessionId,
        /// The primary's epoch: frames of an older one are not taken.
        epoch: Epoch,
    },
    /// Backup: let no acknowledgement leave any more, then fix the end of the log:
    /// [`Event::SessionClosed`](crate::Event). Never opened again.
    CloseSession(SessionId),
    /// Backup: replay to the last whole entry below `end`: [`Event::Drained`](crate::Event).
    Drain {
        /// The session.
        session: SessionId,
        /// The end of its log.
        end: Seq,
    },
    /// Backup: see whether image and TAP could be opened, without opening them for use:
    /// [`Event::WorldProbed`](crate::Event).
    ProbeWorld,

    /// Have the storage cut `host` off, and wait until its I/O is over: [`Event::Fenced`](crate::Event).
    Fence(HostId),
    /// Act on the world as the owner of `record`: see [`GoLive`].
    GoLive(GoLive),
    /// Drop outputs, state and session; wait for I/O; close TAP and image:
    /// [`Event::Discarded`](crate::Event).
    Discard(Leave),
    /// The process has nothing left to do for this VM. Nothing follows.
    End(Leave),
    /// Something that people want to know.
    Notice(Notice),
}

/// How to act on the world. In this order: open image (with the quarantine of the record in force) and
/// TAP; issue every outstanding disk request again, writes with the data captured when they were
/// submitted; put the effects at and above `released` into the (still shut) gate in their order;
/// let virtual time go on (R6); announce the MAC; run; answer [`Event::Live`](crate::Event::Live).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GoLive {
    /// The record that was won.
    pub record: EpochRecord,
    /// Where the state comes from.
    pub origin: Origin,
}

/// Where the state of a new primary comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The driver brings it: first boot, cold start, restore.
    Cold,
    /// The session that this replica followed.
    TakeOver {
        /// The session.
        session: SessionId,
        /// The old primary has released the effects of everything below.
        released: Seq,
        /// Why.
        cause: Cause,
    },
}

/// Why a role ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Leave {
    /// Another host owns a newer epoch.
    Superseded,
    /// The VM is powered off, and the record closed.
    PoweredOff,
    /// The primary ended the session.
    Dropped,
    /// The primary was lost before this replica was complete, or before a record named it.
    Incomplete,
    /// The replica diverged.
    Diverged,
    /// The state could not be loaded.
    LoadFailed,
}

/// Something that people want to know: for events, logs and counters.
#[derive(Debug, Clone, PartialEq)]
pub enum Notice {
    /// A cold start waits: the record is open.
    StartBlocked {
        /// The record.
        record: EpochRecord,
        /// Hosts that have not said that they hold nothing; empty where only an operator helps.
        waiting_for: Vec<HostId>,
    },
    /// The arbiter cannot be reached.
    ArbiterUnreachable(String),
    /// Protection begins to be set up with this standby.
    ProtectionStarting(HostId),
    /// The standby differs and is not used.
    StandbyDiffers {
        /// The standby.
        standby: HostId,
        /// How.
        differences: Vec<Difference>,
    },
    /// Setting up failed.
    ProtectionFailed {
        /// The standby.
        standby: HostId,
        /// Why.
        cause: String,
    },
    /// The VM is protected.
    Protected {
        /// By this host.
        backup: HostId,
        /// In this epoch.
        epoch: Epoch,
    },
    /// The peer is taken for lost.
    PeerLost {
        /// The peer.
        peer: HostId,
        /// Why.
        cause: Cause,
    },
    /// This replica drained its log and competes.
    Competing,
    /// This replica won.
    Won {
        /// The epoch.
        epoch: Epoch,
        /// Ranges of sectors under quarantine.
        quarantined: usize,
    },
    /// The VM runs unprotected.
    Alone(Epoch),
    /// A replica diverged.
    Diverged(DivergenceReport),
    /// The old primary's late writes are impossible now; the side files are folded back.
    QuarantineOver(Epoch),
    /// This backup could not reach image or TAP, and does not compete.
    WorldUnusable,
    /// The role ends.
    Leaving(Leave),
    /// A command that does not fit the state.
    CommandRefused(&'static str),
}

/// Actions in their order; bounded by [`MAX_ACTIONS`].
#[derive(Debug, Default)]
pub struct Actions(VecDeque<Action>);

impl Actions {
    /// None.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    pub(crate) fn push(&mut self, action: Action) {
        assert!(
            self.0.len() < MAX_ACTIONS,
            "the driver takes all actions before the next event"
        );
        self.0.push_back(action);
    }

    /// The next one to do.
    pub fn pop(&mut self) -> Option<Action> {
        self.0.pop_front()
    }

    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Iterator for Actions {
    type Item = Action;

    fn next(&mut self) -> Option<Action> {
        self.pop()
    }
}
