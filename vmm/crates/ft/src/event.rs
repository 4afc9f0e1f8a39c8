//! What a replica is told: everything that it knows of the outside.
//!
//! Events about a session name it; those of a session that is over change nothing. The driver need not
//! remember what it has told.

use format::{AckRecord, ControlOp, Epoch, Seq, SessionId};

use crate::acks::Mark;
use crate::arbiter::{ArbiterReply, CallId};
use crate::detector::HeartbeatReply;
use crate::gate::ClockGap;
use crate::names::HostId;
use crate::peer::{DivergenceReport, PeerMessage};
use crate::quarantine::SectorRange;

/// Something happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Time passed: at [`Replica::next_deadline`](crate::Replica::next_deadline) or whenever.
    Tick,
    /// An operator wants something.
    Command(Command),
    /// The arbiter answered.
    Arbiter {
        /// Which question.
        call: CallId,
        /// The answer.
        reply: ArbiterReply,
    },
    /// A message came.
    Peer {
        /// From whom: the host that the connection authenticated.
        from: HostId,
        /// The message.
        message: PeerMessage,
    },
    /// The watched peer's host answered a probe.
    Heartbeat {
        /// The session that it was watched for.
        session: SessionId,
        /// The answer.
        reply: HeartbeatReply,
    },
    /// Other traffic came from the watched peer's host.
    Heard(SessionId),
    /// The channel delivered the peer's `End`: its VMM is dead, its log or its acknowledgements are
    /// all here.
    PeerEnd(SessionId),

    // The primary's side of a session.
    /// The state of the VM was saved and its streaming began; the session's log begins here.
    TransferStarted {
        /// The session.
        session: SessionId,
        /// Where the primary was; its `next` is 0.
        start: Mark,
    },
    /// Streaming the state failed.
    TransferFailed {
        /// The session.
        session: SessionId,
        /// Why, for people.
        why: String,
    },
    /// Appends were made. May be told seldom: before each tick is enough.
    Appended {
        /// The session.
        session: SessionId,
        /// Up to here.
        mark: Mark,
    },
    /// The channel acknowledged. The gate is told directly, first.
    Acked {
        /// The session.
        session: SessionId,
        /// How far.
        record: AckRecord,
    },
    /// [`GateMode::Holding`](crate::GateMode) of this session is in force.
    GateHolds {
        /// The session.
        session: SessionId,
        /// The position after the newest append of which an effect may have been released unheld.
        at: Seq,
    },
    /// The gate did not run, and shut itself.
    GateGap(ClockGap),
    /// The effects of everything below are released. May be told seldom.
    Released {
        /// The session.
        session: SessionId,
        /// Below here.
        upto: Seq,
    },
    /// What [`Action::Quiesce`](crate::Action::Quiesce) asked is done.
    Quiesced {
        /// What for.
        why: Quiesce,
        /// The end of the log; without a session any value.
        end: Seq,
    },
    /// The guest powered off, or was powered off by an injected [`ControlOp::PowerOff`]: the vCPU
    /// stands still. The log says so.
    GuestOff,
    /// Requests to the shared storage have failed or been outstanding for too long.
    StorageLost,
    /// They go through again.
    StorageBack,
    /// The quarantined sectors are copied into the image, durably; guest writes to them wait.
    Folded,

    // The backup's side of a session.
    /// So many bytes of the state have come.
    StateReceived {
        /// The session.
        session: SessionId,
        /// Bytes.
        bytes: u64,
    },
    /// The state is loaded, and the log replayed up to here. Told again as replay goes on; may be
    /// told seldom.
    Replayed {
        /// The session.
        session: SessionId,
        /// Everything below.
        upto: Seq,
    },
    /// The state could not be loaded.
    LoadFailed {
        /// The session.
        session: SessionId,
        /// Why, for people.
        why: String,
    },
    /// The replica diverged; replay has stopped (R7).
    Diverged {
        /// The session.
        session: SessionId,
        /// Where and how.
        report: DivergenceReport,
    },
    /// No acknowledgement leaves any more; the log ends here for good (R13).
    SessionClosed {
        /// The session.
        session: SessionId,
        /// Its end.
        end: Seq,
    },
    /// The log is replayed to its last whole entry.
    Drained {
        /// The session.
        session: SessionId,
        /// Sectors of the writes that the guest has outstanding: acknowledged or not, without a
        /// replayed `DiskDone`. At most [`MAX_OUTSTANDING`](crate::MAX_OUTSTANDING).
        writes: Vec<SectorRange>,
        /// Whether the guest is powered off there.
        guest_off: bool,
    },
    /// Whether image and TAP could be opened.
    WorldProbed {
        /// They could.
        usable: bool,
    },

    // A change of roles.
    /// The storage has cut `host` off, and its I/O is over.
    Fenced(HostId),
    /// What [`Action::GoLive`](crate::Action::GoLive) asked is done; the guest runs.
    Live,
    /// What [`Action::Discard`](crate::Action::Discard) asked is done: no state, no I/O, nothing open.
    Discarded,
}

/// What an operator, or the API, wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Look for a backup, now and from now on.
    Protect,
    /// Give the backup up, and look for none.
    Unprotect,
    /// Hand the role to the backup.
    SwitchOver,
    /// Do something to the guest, at the same point on both sides.
    Control(ControlOp, Vec<u8>),
    /// Give the session up as if the peer were lost: a drill.
    Fail,
    /// An operator states that `host` holds no state of the VM and will write no more.
    HostGone(HostId),
    /// An operator states that nobody holds what the record of this epoch allows: start all the same.
    ForceStart(Epoch),
}

/// Why the guest is to come to rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Quiesce {
    /// A switch-over.
    SwitchOver,
    /// The guest is powered off.
    PowerOff,
}
