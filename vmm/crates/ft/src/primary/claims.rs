//! The primary's claims: one at a time, each for a purpose that stands when it is made.

use format::Epoch;

use crate::action::{Action, Leave, Notice};
use crate::arbiter::{ArbiterReply, CallId};
use crate::arbitration::{Arbitration, Keep, Outcome, Proposal, Standing};
use crate::canary::{self, Canary};
use crate::context::Context;
use crate::detector::Cause;
use crate::gate::GateMode;
use crate::peer::PeerMessage;
use crate::record::{EpochRecord, Tenure};

use super::link::Stage;
use super::{Phase, Primary, Verdict};

/// What an epoch is claimed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The backup is lost: to go on without it.
    GoAlone,
    /// The standby is ready: to name it.
    Commit,
    /// This side did not run for a while: to make sure that it still is the primary.
    Renew,
    /// The sectors are back in the image: to say so.
    Fold,
    /// The VM is off: to close the record.
    Close,
}

impl Primary {
    /// Makes the claim that the state asks for, if none is on its way.
    pub(super) fn next_claim(&mut self, ctx: &mut Context<'_>) -> Verdict {
        if self.claim.is_none()
            && let Some(purpose) = self.wanted()
        {
            let proposal = self.proposal(purpose);
            let standing = Standing::Owner {
                nonce: self.record.nonce,
            };
            let base = Some(Some(self.record.clone()));
            if purpose == Purpose::Commit
                && let Some(link) = &mut self.link
            {
                link.stage = Stage::Committing;
            }
            if purpose == Purpose::Renew {
                self.renew = false;
            }
            let arbitration =
                Arbitration::new(standing, proposal, base, Some(self.record.epoch), None);
            self.claim = Some((purpose, arbitration));
        }
        let Some((purpose, arbitration)) = &mut self.claim else {
            return Ok(());
        };
        let purpose = *purpose;
        match arbitration.poll(ctx) {
            Some(outcome) => self.decided(ctx, purpose, outcome),
            None => Ok(()),
        }
    }

    pub(super) fn arbiter(
        &mut self,
        ctx: &mut Context<'_>,
        call: CallId,
        reply: ArbiterReply,
    ) -> Verdict {
        let Some((purpose, arbitration)) = &mut self.claim else {
            return Ok(());
        };
        let purpose = *purpose;
        match arbitration.replied(ctx, call, reply) {
            Some(outcome) => self.decided(ctx, purpose, outcome),
            None => Ok(()),
        }
    }

    fn wanted(&self) -> Option<Purpose> {
        match self.phase {
            Phase::Starting { .. } => return None,
            // Who cannot reach the image leaves the epoch to a backup that can.
            Phase::GoingAlone => return self.storage_lost.is_none().then_some(Purpose::GoAlone),
            Phase::Running => {}
        }
        let stage = self.link.as_ref().map(|link| link.stage);
        if self.errand.may_close(self.link.as_ref()) {
            Some(Purpose::Close)
        } else if self.renew && stage == Some(Stage::Backup) {
            Some(Purpose::Renew)
        } else if stage == Some(Stage::Confirmed) {
            Some(Purpose::Commit)
        } else if self.fold.is_copied() {
            Some(Purpose::Fold)
        } else {
            None
        }
    }

    fn proposal(&self, purpose: Purpose) -> Proposal {
        let pair = self.link.as_ref().map(|link| Tenure::Pair {
            backup: link.peer,
            session: link.session,
        });
        let tenure = match purpose {
            Purpose::GoAlone => Tenure::Alone,
            Purpose::Commit | Purpose::Renew => pair.unwrap_or(Tenure::Alone),
            Purpose::Fold => self.record.tenure,
            Purpose::Close => Tenure::Closed,
        };
        let quarantine = match purpose {
            Purpose::Fold => Keep::Nothing,
            _ => Keep::Same,
        };
        Proposal {
            quarantine,
            ..Proposal::of(tenure)
        }
    }

    fn decided(&mut self, ctx: &mut Context<'_>, purpose: Purpose, outcome: Outcome) -> Verdict {
        self.claim = None;
        let record = match outcome {
            Outcome::Won(record) => record,
            Outcome::Lost(Some(record)) if record.continues(&self.record) => {
                return self.renounced(ctx, record);
            }
            Outcome::Renounced | Outcome::Lost(_) => return Err(Leave::Superseded),
        };
        self.record = record;
        let epoch = self.record.epoch;
        match purpose {
            Purpose::GoAlone => self.alone(ctx, epoch),
            Purpose::Commit => self.committed(ctx, epoch),
            Purpose::Renew => self.renewed(ctx, epoch),
            Purpose::Fold => {
                self.folded(ctx);
                if self.link.is_some() {
                    ctx.act(Action::SetEpoch(epoch));
                }
            }
            Purpose::Close => {
                self.tell_closed(ctx, epoch);
                return Err(Leave::PoweredOff);
            }
        }
        self.next_claim(ctx)
    }

    /// A standby that was never named renounced, by a record that is this side's own: no claim is
    /// decided by it but that which names that standby. The others are made again.
    fn renounced(&mut self, ctx: &mut Context<'_>, record: EpochRecord) -> Verdict {
        let epoch = record.epoch;
        if let Some(link) = &mut self.link {
            if link.stage == Stage::Committing {
                link.stage = Stage::Confirmed;
            }
            let gave_up = record.renounces(link.session).then_some(Cause::GaveUp);
            match gave_up.or(link.lost) {
                Some(cause) => self.give_link_up(ctx, cause, format!("{cause:?}")),
                None => ctx.act(Action::SetEpoch(epoch)),
            }
        }
        self.record = record;
        self.next_claim(ctx)
    }

    fn alone(&mut self, ctx: &mut Context<'_>, epoch: Epoch) {
        self.phase = Phase::Running;
        ctx.act(Action::Gate(GateMode::Open));
        ctx.notice(Notice::Alone(epoch));
        self.errand_after_going_alone(ctx);
    }

    fn committed(&mut self, ctx: &mut Context<'_>, epoch: Epoch) {
        let Some(link) = &mut self.link else { return };
        link.stage = Stage::Backup;
        let (backup, session, lost) = (link.peer, link.session, link.lost.take());
        ctx.act(Action::SetEpoch(epoch));
        self.standbys.succeeded(ctx, backup);
        match lost {
            Some(cause) => {
                ctx.notice(Notice::PeerLost {
                    peer: backup,
                    cause,
                });
                self.go_alone(ctx);
            }
            None => {
                if canary::on(Canary::EligibleBeforeHold) {
                    ctx.act(Action::Gate(GateMode::Holding(session)));
                }
                ctx.notice(Notice::Protected { backup, epoch });
            }
        }
    }

    fn renewed(&mut self, ctx: &mut Context<'_>, epoch: Epoch) {
        // The backup may have been lost while the claim was on its way.
        let Some(link) = self.link.as_ref().filter(|link| link.is_backup()) else {
            return;
        };
        let session = link.session;
        ctx.act(Action::SetEpoch(epoch));
        if !self.renew {
            ctx.act(Action::Gate(GateMode::Holding(session)));
        }
    }

    /// The VM is off and the record says so: the backup may go home.
    fn tell_closed(&mut self, ctx: &mut Context<'_>, epoch: Epoch) {
        let Some(link) = self.link.take() else { return };
        let session = link.session;
        ctx.act(Action::EndSession(session));
        ctx.act(Action::Unwatch);
        let closed = true;
        ctx.send(
            link.peer,
            PeerMessage::Dropped {
                session,
                epoch,
                closed,
            },
        );
    }
}
