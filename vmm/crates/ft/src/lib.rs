//! The fault-tolerance protocol as pure state machines: events and the time go in, actions come out.
//!
//! No I/O, no clock, no randomness, no threads: the VMM and the simulator drive the same code. What
//! the protocol promises and why it holds is in docs/protocol.md.
//!
//! # The parts, each with one owner
//! | part | owner | what it is for |
//! |---|---|---|
//! | [`Replica`] | the VMM's event loop | roles, sessions, epochs: events in, actions out |
//! | [`OutputGate`] | whoever releases effects | holds effects until they are acknowledged |
//! | [`AckTracker`] | the VMM's event loop (and one inside the replica) | positions, lag |
//! | [`LagControl`] | the vCPU thread | holds at exits, so that the backup keeps up |
//! | [`Quarantine`] | the block backend (a copy of the record's) | where sectors are |
//! | [`directory::DirectoryCall`] | the arbiter's thread | one question to the directory, step by step |
//!
//! # Driving a replica
//! ```text
//! let mut replica = Replica::boot(config, Incarnation(random));     // or Replica::standby
//! loop {
//!     let event = wait_until(replica.next_deadline());              // Event::Tick when it is due
//!     replica.handle(now(), event, &mut actions);
//!     while let Some(action) = actions.pop() { start(action) }      // in order; do not wait for ends
//! }
//! ```
//! - `now` is the host's monotonic clock in ns and never goes back. Bring [`Event::Tick`] at the start.
//! - Every action that has an answer names it in its documentation. An answer may take for ever.
//! - Ordinary traffic need not pass the replica: acknowledgements go to the gate first, and
//!   [`Event::Acked`], [`Event::Appended`], [`Event::Replayed`] and [`Event::Released`] may be told at
//!   intervals, before each tick for example.
//! - Positions ([`format::Seq`]) count the appends of one session from 0. An effect whose `Output` was
//!   append number `n` needs the acknowledgement `n + 1`.
//! - [`Action::Gate`] is to be done before the next append of the vCPU thread is made.
//!
//! # What happens
//! Protection (R15):
//! ```text
//!  primary                                  standby                      arbiter
//!     │── Join(session, epoch, fingerprint) ──►│
//!     │◄── Accepted ───────────────────────────│ LoadState, Watch
//!     │ StartTransfer, Watch                   │
//!     │ Event::TransferStarted                 │ Event::StateReceived … Replayed
//!     │◄── Synced(bytes, replayed) ────────────│ again and again
//!     │ Gate(Holding) → Event::GateHolds(at)   │
//!     │── Confirm(at) ────────────────────────►│
//!     │◄── Confirmed(at) ──────────────────────│ replayed ≥ at
//!     │── TryWin(e+1: me, pair) ────────────────────────────────────────►│
//!     │◄───────────────────────────────────────────────────────── Won ───│
//!     │ Protected; SetEpoch(e+1)               │
//!     │── Progress(e+1, named) ───────────────►│── Newest ───────────────►│
//! ```
//! Failover:
//! ```text
//!  backup (PeerLost)                                                     arbiter
//!     │ CloseSession → Event::SessionClosed(end)      no ACK leaves any more (R13)
//!     │ Drain(end)   → Event::Drained(writes)
//!     │ ProbeWorld   → Event::WorldProbed(usable)
//!     │── TryWin(e+1: me, alone, quarantine of writes) ──────────────────►│
//!     │◄──────────────────────────────────────────────────────── Won ─────│
//!     │ GoLive → Event::Live;  Gate(Open);  Join to the next standby
//! ```
//! Loss of the backup, and the next one:
//! ```text
//!  primary (PeerLost)                                                    arbiter
//!     │ Gate(Shut), EndSession
//!     │── TryWin(e+1: me, alone) ─────────────────────────────────────────►│
//!     │◄──────────────────────────────────────────────────────── Won ─────│
//!     │ Gate(Open);  Dropped to the old backup;  Join to the next standby
//!     │ (Taken: Discard → Event::Discarded → an empty standby)
//! ```
//! Switch-over:
//! ```text
//!  primary                                  backup
//!     │ Quiesce(SwitchOver) → Event::Quiesced(end); all below end acknowledged
//!     │── TakeOver(SwitchOver) ───────────────►│ as in a failover, with no writes outstanding
//!     │◄── Join(e+1) ──────────────────────────│ live
//!     │ Discard → empty standby → Accepted     │
//!     │ (nobody took over: as in the loss of the backup, then Resume)
//! ```
//! Power-off:
//! ```text
//!  primary                                  backup                       arbiter
//!     │ Event::GuestOff: Quiesce(PowerOff) → Event::Quiesced(end); acknowledged
//!     │── TryWin(e+1: closed) ───────────────────────────────────────────►│
//!     │── Dropped(closed) ────────────────────►│ Discard, End
//!     │ Discard, End                           │ (primary lost before: it goes live, and closes)
//! ```
#![forbid(unsafe_code)]

mod acks;
mod action;
mod arbiter;
mod arbitration;
mod backup;
mod boot;
pub mod canary;
mod config;
mod context;
mod detector;
pub mod directory;
mod event;
mod fingerprint;
mod gate;
mod names;
mod pacing;
mod peer;
mod primary;
mod quarantine;
mod record;
mod replica;
mod time;
mod wire;

pub use acks::{AckTracker, Lag, MAX_MARKS, Mark};
pub use action::{Action, Actions, GoLive, Leave, MAX_ACTIONS, Notice, Origin};
pub use arbiter::{ArbiterReply, ArbiterRequest, Base, CallId};
pub use arbitration::{Judgement, Standing};
pub use config::{Config, Timings};
pub use detector::{Cause, DetectorConfig, FailureDetector, HeartbeatReply, Owed, VmmSign};
pub use event::{Command, Event, Quiesce};
pub use fingerprint::{Difference, Fingerprint, MAX_PROPERTIES, MAX_PROPERTY_LEN};
pub use gate::{ClockGap, GateLimits, GateMode, OutputGate};
pub use names::{BadHostName, HostId, Incarnation, MAX_HOST_LEN, Nonce};
pub use pacing::{LagControl, LagLimits, Pace};
pub use peer::{
    DivergenceReport, Holds, MAX_MESSAGE_LEN, MAX_REPORT_LEN, PEER_VERSION, PeerMessage, Refusal,
    Relief,
};
pub use quarantine::{
    Location, MAX_OUTSTANDING, MAX_RANGES, MAX_SUSPECTS, Quarantine, SECTOR_LEN, SectorRange,
};
pub use record::{EpochRecord, MAX_RECORD_LEN, Tenure};
pub use replica::{Replica, RoleName, Status};
pub use time::Time;
pub use wire::{ENVELOPE_LEN, WireError};
