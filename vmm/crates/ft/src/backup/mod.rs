//! The standby, and the backup that it becomes: follows a primary's log, and takes its place.
//!
//! ```text
//!   Empty ──Join──► Syncing ──Confirm──► Following ──primary lost──► Closing ──► Draining
//!     ▲                │                    (may be named)                          │
//!     │                │ primary lost,                                              ▼
//!     └── discarded ◄──┴ dropped, diverged ◄── Lost ── Competing ◄── can open ◄── Probing
//!                                                          └──Won──► primary (replica.rs)
//! ```
//! Owner of its state: [`Backup`]; everything about one session is in [`Following`].
//!
//! Always true (R13):
//! - closing the session comes before draining, draining before competing;
//! - from Closing on there is no way back: the session ends in a won epoch or with the state dropped;
//! - it competes only with complete state, confirmed to the primary, and never after it diverged.

mod join;
mod takeover;

use format::{Epoch, Seq, SessionId};

use crate::action::{Action, Leave, Notice};
use crate::arbiter::{ArbiterReply, ArbiterRequest, CallId};
use crate::arbitration::Arbitration;
use crate::canary::{self, Canary};
use crate::context::{Context, Resend, earliest};
use crate::detector::{Cause, FailureDetector};
use crate::event::{Command, Event};
use crate::names::HostId;
use crate::peer::{Holds, PeerMessage};
use crate::quarantine::SectorRange;
use crate::record::{EpochRecord, Tenure};
use crate::time::Time;

/// What a handler asks of the replica that owns the role.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "made once in an epoch")]
pub(crate) enum Step {
    /// Go on.
    Stay,
    /// Drop state and session, and be an empty standby again.
    Leave(Leave),
    /// Won: become the primary.
    Promote(Promotion),
}

/// What a backup that won knows.
#[derive(Debug)]
pub(crate) struct Promotion {
    pub(crate) record: EpochRecord,
    pub(crate) session: SessionId,
    pub(crate) released: Seq,
    pub(crate) cause: Cause,
    pub(crate) guest_off: bool,
}

/// A standby or backup.
#[derive(Debug, Default)]
pub(crate) struct Backup {
    session: Option<Following>,
}

/// One session with one primary.
#[derive(Debug)]
struct Following {
    primary: HostId,
    session: SessionId,
    /// The primary's newest epoch, as far as it is known here.
    epoch: Epoch,
    stage: Stage,
    detector: FailureDetector,
    bytes: u64,
    replayed: Option<Seq>,
    /// What the primary asked to be confirmed.
    confirm: Option<Seq>,
    confirmed: bool,
    /// The newest record that is known to name this session.
    named: Option<EpochRecord>,
    reading: Option<CallId>,
    released: Seq,
    /// The primary asked to be relieved because its storage is gone.
    relief_asked: bool,
    resend: Resend,
}

#[derive(Debug)]
enum Stage {
    /// Loading and following; `confirmed` tells whether it may be named.
    Following,
    /// The session is being closed.
    Closing { cause: Cause },
    /// The rest of the log is replayed.
    Draining { cause: Cause },
    /// Image and TAP are looked at.
    Probing {
        cause: Cause,
        drained: Drained,
        again: Resend,
    },
    /// The next epoch is claimed.
    Competing {
        cause: Cause,
        drained: Drained,
        arbitration: Box<Arbitration>,
    },
}

/// What is known at the end of the log.
#[derive(Debug, Clone)]
struct Drained {
    writes: Vec<SectorRange>,
    guest_off: bool,
}

impl Backup {
    pub(crate) fn state_name(&self) -> &'static str {
        match self.session.as_ref().map(|following| &following.stage) {
            None => "standby",
            Some(Stage::Following) => "following",
            Some(Stage::Closing { .. } | Stage::Draining { .. }) => "draining",
            Some(Stage::Probing { .. } | Stage::Competing { .. }) => "arbitrating",
        }
    }

    pub(crate) fn peer(&self) -> Option<HostId> {
        self.session.as_ref().map(|following| following.primary)
    }

    pub(crate) fn epoch(&self) -> Option<Epoch> {
        self.session.as_ref().map(|following| following.epoch)
    }

    pub(crate) fn released(&self) -> Option<Seq> {
        self.session.as_ref().map(|following| following.released)
    }

    pub(crate) fn may_take_over(&self) -> bool {
        self.session
            .as_ref()
            .is_some_and(|following| following.confirmed)
    }

    fn of(&mut self, session: SessionId) -> Option<&mut Following> {
        self.session
            .as_mut()
            .filter(|following| following.session == session)
    }

    pub(crate) fn handle(&mut self, ctx: &mut Context<'_>, event: Event) -> Step {
        match event {
            Event::Peer { from, message } => return self.peer_message(ctx, from, message),
            Event::Command(command) => return self.command(ctx, command),
            Event::Arbiter { call, reply } => return self.arbiter(ctx, call, reply),
            Event::Heartbeat { session, reply } => {
                if let Some(following) = self.of(session) {
                    following.detector.replied(reply);
                    following.resume_if_buggy();
                }
            }
            Event::Heard(session) => {
                if let Some(following) = self.of(session) {
                    following.detector.heard();
                }
            }
            Event::PeerEnd(session) => {
                if let Some(following) = self.of(session) {
                    following.detector.ended();
                }
            }
            Event::StateReceived { session, bytes } => {
                if let Some(following) = self.of(session) {
                    following.bytes = following.bytes.max(bytes);
                }
            }
            Event::Replayed { session, upto } => {
                if let Some(following) = self.of(session) {
                    following.replayed = following.replayed.max(Some(upto));
                }
            }
            Event::LoadFailed { session, .. } if self.of(session).is_some() => {
                return self.give_up(ctx, Cause::GaveUp, None, Leave::LoadFailed);
            }
            Event::Diverged { session, report } if self.of(session).is_some() => {
                let report = report.bounded();
                ctx.notice(Notice::Diverged(report.clone()));
                if !canary::on(Canary::DivergedCompetes) {
                    return self.give_up(ctx, Cause::Diverged, Some(report), Leave::Diverged);
                }
            }
            Event::SessionClosed { session, end } => {
                if let Some(following) = self.of(session) {
                    following.closed(ctx, end);
                }
            }
            Event::Drained {
                session,
                writes,
                guest_off,
            } => {
                if let Some(following) = self.of(session) {
                    following.drained(Drained { writes, guest_off });
                }
            }
            Event::WorldProbed { usable } => {
                if let Some(following) = &mut self.session {
                    following.probed(ctx, usable);
                }
            }
            // What only a primary is told, or another session.
            _ => {}
        }
        Step::Stay
    }

    fn command(&mut self, ctx: &mut Context<'_>, command: Command) -> Step {
        match (command, &mut self.session) {
            (Command::Fail, Some(following)) => following.primary_lost(ctx, Cause::Operator),
            // A host gone is of interest to whoever is primary; the operator is told who is not.
            _ => {
                ctx.notice(Notice::CommandRefused("this is not the primary"));
                Step::Stay
            }
        }
    }

    /// After every event: what follows from the state and the time.
    pub(crate) fn poll(&mut self, ctx: &mut Context<'_>) -> Step {
        let Some(following) = &mut self.session else {
            return Step::Stay;
        };
        following.speak(ctx);
        match following.watch(ctx) {
            Step::Stay => following.compete(ctx),
            step => step,
        }
    }

    fn arbiter(&mut self, ctx: &mut Context<'_>, call: CallId, reply: ArbiterReply) -> Step {
        let Some(following) = &mut self.session else {
            return Step::Stay;
        };
        if following.reading == Some(call) {
            following.reading = None;
            if let ArbiterReply::Newest(Some(record)) = reply {
                following.learn(record);
            }
            return Step::Stay;
        }
        following.answered(ctx, call, reply)
    }

    /// Ends the session by this side's own decision, and says so.
    fn give_up(
        &mut self,
        ctx: &mut Context<'_>,
        cause: Cause,
        report: Option<crate::peer::DivergenceReport>,
        leave: Leave,
    ) -> Step {
        if let Some(following) = &self.session {
            let (to, session) = (following.primary, following.session);
            ctx.send(
                to,
                PeerMessage::GaveUp {
                    session,
                    cause,
                    report,
                },
            );
        }
        Step::Leave(leave)
    }

    pub(crate) fn holds(&self) -> Holds {
        Holds {
            state: self.session.is_some(),
            writes: false,
        }
    }

    pub(crate) fn next_deadline(&self) -> Option<Time> {
        let following = self.session.as_ref()?;
        let stage = match &following.stage {
            Stage::Following => Some(following.detector.next_deadline()),
            Stage::Closing { .. } | Stage::Draining { .. } => None,
            Stage::Probing { again, .. } => again.at(),
            Stage::Competing { arbitration, .. } => arbitration.next_deadline(),
        };
        earliest([stage, following.resend.at()])
    }
}

impl Following {
    /// A record that was read: does it name this session?
    fn learn(&mut self, record: EpochRecord) {
        let named =
            matches!(record.tenure, Tenure::Pair { session, .. } if session == self.session);
        let newer = self
            .named
            .as_ref()
            .is_none_or(|known| known.epoch < record.epoch);
        if named && newer {
            self.epoch = self.epoch.max(record.epoch);
            self.named = Some(record);
        }
    }

    /// The primary says that a record of `epoch` names this session: it is read, so that a claim can
    /// be made at once when it is needed.
    fn read_record(&mut self, ctx: &mut Context<'_>, epoch: Epoch) {
        let known = self
            .named
            .as_ref()
            .is_some_and(|known| known.epoch >= epoch);
        if !known && self.reading.is_none() {
            self.reading = Some(ctx.ask(ArbiterRequest::Newest));
        }
    }

    /// Leaves the session and tells the driver.
    fn unwatch(ctx: &mut Context<'_>) {
        ctx.act(Action::Unwatch);
    }
}
