//! Joining a primary, and following it: what the primary says, and what it is told.

use crate::action::{Action, Leave};
use crate::canary::{self, Canary};
use crate::context::{Context, Resend};
use crate::detector::{Cause, FailureDetector};
use crate::fingerprint::Fingerprint;
use crate::names::HostId;
use crate::peer::{PeerMessage, Refusal};

use format::{Epoch, Seq, SessionId};

use super::{Backup, Following, Stage, Step};

impl Backup {
    pub(super) fn peer_message(
        &mut self,
        ctx: &mut Context<'_>,
        from: HostId,
        message: PeerMessage,
    ) -> Step {
        match message {
            PeerMessage::StateQuery { nonce, .. } => {
                let holds = self.holds();
                ctx.reply_holds(from, nonce, holds);
                Step::Stay
            }
            PeerMessage::Join {
                session,
                epoch,
                fingerprint,
            } => self.join(ctx, from, session, epoch, &fingerprint),
            PeerMessage::Dropped {
                session,
                epoch,
                closed,
            } => self.dropped(ctx, from, session, epoch, closed),
            PeerMessage::Confirm { session, upto } => {
                if let Some(following) = self.from(from, session) {
                    following.confirm = following.confirm.max(Some(upto));
                    following.resend = Resend::NOW;
                }
                Step::Stay
            }
            PeerMessage::Progress {
                session,
                epoch,
                named,
                released,
            } => {
                if let Some(following) = self.from(from, session) {
                    following.progress(ctx, epoch, named, released);
                }
                Step::Stay
            }
            PeerMessage::TakeOver { session, why } => match self.from(from, session) {
                Some(following) => following.relieve(ctx, why),
                None => Step::Stay,
            },
            // What only a standby says.
            _ => Step::Stay,
        }
    }

    fn from(&mut self, from: HostId, session: SessionId) -> Option<&mut Following> {
        self.of(session)
            .filter(|following| following.primary == from)
    }

    fn join(
        &mut self,
        ctx: &mut Context<'_>,
        from: HostId,
        session: SessionId,
        epoch: Epoch,
        theirs: &Fingerprint,
    ) -> Step {
        if let Some(following) = &self.session {
            if following.session == session {
                ctx.send(from, PeerMessage::Accepted { session });
                return Step::Stay;
            }
            // The primary that is followed begins anew: it has ended the old session, and the record
            // does not name it. While this side competes, the arbiter is to say so.
            let anew = following.primary == from && epoch >= following.epoch;
            if anew && matches!(following.stage, Stage::Following) {
                return Step::Leave(Leave::Dropped);
            }
            let why = Refusal::Busy;
            ctx.send(from, PeerMessage::Refused { session, why });
            return Step::Stay;
        }
        let differences = theirs.differences(&ctx.core.config.fingerprint);
        if !differences.is_empty() {
            let why = Refusal::Fingerprint(differences);
            ctx.send(from, PeerMessage::Refused { session, why });
            return Step::Stay;
        }
        let detector = FailureDetector::new(ctx.core.config.detector, ctx.now);
        self.session = Some(Following {
            primary: from,
            session,
            epoch,
            stage: Stage::Following,
            detector,
            bytes: 0,
            replayed: None,
            confirm: None,
            confirmed: false,
            named: None,
            reading: None,
            released: Seq(0),
            relief_asked: false,
            resend: Resend::NOW,
        });
        ctx.act(Action::Watch {
            peer: from,
            session,
        });
        ctx.act(Action::LoadState {
            from,
            session,
            epoch,
        });
        ctx.send(from, PeerMessage::Accepted { session });
        Step::Stay
    }

    /// The primary ended a session. It says so after it won an epoch without this host, or before it
    /// ever claimed one with it.
    fn dropped(
        &mut self,
        ctx: &mut Context<'_>,
        from: HostId,
        session: SessionId,
        epoch: Epoch,
        closed: bool,
    ) -> Step {
        match self.from(from, session) {
            Some(following) if epoch >= following.epoch => {
                let leave = if closed {
                    Leave::PoweredOff
                } else {
                    Leave::Dropped
                };
                self.give_up(ctx, Cause::GaveUp, None, leave)
            }
            Some(_) => Step::Stay,
            None => {
                let cause = Cause::GaveUp;
                let report = None;
                ctx.send(
                    from,
                    PeerMessage::GaveUp {
                        session,
                        cause,
                        report,
                    },
                );
                Step::Stay
            }
        }
    }
}

impl Following {
    fn progress(&mut self, ctx: &mut Context<'_>, epoch: Epoch, named: bool, released: Seq) {
        self.detector.heard();
        self.released = self.released.max(released);
        self.epoch = self.epoch.max(epoch);
        if named && self.confirmed && matches!(self.stage, Stage::Following) {
            self.read_record(ctx, epoch);
        }
        // An arbiter that still shows the time before this host was named does not end its standing.
        if let (true, Stage::Competing { arbitration, .. }) = (named, &mut self.stage) {
            arbitration.told_of(epoch);
        }
    }

    /// Tells the primary how far this side is, until it is named.
    pub(super) fn speak(&mut self, ctx: &mut Context<'_>) {
        if !matches!(self.stage, Stage::Following) || self.named.is_some() {
            self.resend = Resend::OFF;
            return;
        }
        self.try_confirm();
        if !self.resend.due(ctx.now, ctx.timings().resend) {
            return;
        }
        let (to, session) = (self.primary, self.session);
        let (bytes, replayed) = (self.bytes, self.replayed);
        ctx.send(
            to,
            PeerMessage::Synced {
                session,
                bytes,
                replayed,
            },
        );
        if let (true, Some(upto)) = (self.confirmed, self.confirm) {
            ctx.send(to, PeerMessage::Confirmed { session, upto });
        }
    }

    /// Complete state, and all log below what was asked for: from here on the primary may name it.
    fn try_confirm(&mut self) {
        let complete = match (self.confirm, self.replayed) {
            (Some(_), _) if canary::on(Canary::ConfirmBeforeComplete) => true,
            (Some(upto), Some(replayed)) => replayed >= upto,
            (Some(_), None) | (None, _) => false,
        };
        if complete && !self.confirmed {
            self.confirmed = true;
            self.resend = Resend::NOW;
        }
    }
}
