//! From the loss of the primary to the next epoch: close, drain, probe, compete (R13, R14).

use format::Seq;

use crate::action::{Action, Leave, Notice};
use crate::arbiter::{ArbiterReply, CallId};
use crate::arbitration::{Arbitration, Keep, Outcome, Proposal, Standing};
use crate::canary::{self, Canary};
use crate::context::{Context, Resend};
use crate::detector::{Cause, Owed};
use crate::peer::Relief;
use crate::record::Tenure;

use super::{Drained, Following, Promotion, Stage, Step};

impl Following {
    /// Notices the loss of the primary.
    pub(super) fn watch(&mut self, ctx: &mut Context<'_>) -> Step {
        if !matches!(self.stage, Stage::Following) {
            return Step::Stay;
        }
        ctx.drive(self.primary, &mut self.detector);
        match self.detector.verdict(ctx.now, Owed::default()) {
            Some(cause) => self.primary_lost(ctx, cause),
            None => Step::Stay,
        }
    }

    /// The primary is lost. A standby that never confirmed has nothing to take over with; one that
    /// did may be named.
    pub(super) fn primary_lost(&mut self, ctx: &mut Context<'_>, cause: Cause) -> Step {
        if !matches!(self.stage, Stage::Following) {
            return Step::Stay;
        }
        ctx.notice(Notice::PeerLost {
            peer: self.primary,
            cause,
        });
        if !self.confirmed {
            return Step::Leave(Leave::Incomplete);
        }
        self.stage = Stage::Closing { cause };
        ctx.act(Action::CloseSession(self.session));
        Step::Stay
    }

    /// The primary asks to be relieved.
    pub(super) fn relieve(&mut self, ctx: &mut Context<'_>, why: Relief) -> Step {
        if !self.confirmed || !matches!(self.stage, Stage::Following) {
            return Step::Stay;
        }
        match why {
            // What it says is acknowledged is published here; the end is fixed by closing.
            Relief::SwitchOver { .. } => self.primary_lost(ctx, Cause::Relieved),
            Relief::StorageLost => {
                self.relief_asked = true;
                ctx.act(Action::ProbeWorld);
                Step::Stay
            }
        }
    }

    pub(super) fn closed(&mut self, ctx: &mut Context<'_>, end: Seq) {
        if let Stage::Closing { cause } = self.stage {
            self.stage = Stage::Draining { cause };
            let session = self.session;
            ctx.act(Action::Drain { session, end });
        }
    }

    pub(super) fn drained(&mut self, drained: Drained) {
        if let Stage::Draining { cause } = self.stage {
            self.stage = Stage::Probing {
                cause,
                drained,
                again: Resend::NOW,
            };
        }
    }

    pub(super) fn probed(&mut self, ctx: &mut Context<'_>, usable: bool) {
        match &self.stage {
            Stage::Following if self.relief_asked => {
                self.relief_asked = false;
                if usable {
                    self.primary_lost(ctx, Cause::Relieved);
                }
            }
            Stage::Probing { .. } if !usable => ctx.notice(Notice::WorldUnusable),
            Stage::Probing { cause, drained, .. } => {
                let (cause, drained) = (*cause, drained.clone());
                ctx.notice(Notice::Competing);
                self.stage = Stage::Competing {
                    cause,
                    arbitration: Box::new(self.arbitration(ctx, &drained)),
                    drained,
                };
            }
            _ => {}
        }
    }

    fn arbitration(&self, ctx: &Context<'_>, drained: &Drained) -> Arbitration {
        let standing = Standing::Backup {
            session: self.session,
            primary: self.primary,
            named: self.named.is_some(),
        };
        let proposal = Proposal {
            tenure: Tenure::Alone,
            outstanding: drained.writes.clone(),
            quarantine: Keep::Feared,
        };
        let base = self.named.clone().map(Some);
        let renounce_at = ctx.now.after(ctx.timings().unnamed);
        Arbitration::new(
            standing,
            proposal,
            base,
            Some(self.epoch),
            Some(renounce_at),
        )
    }

    /// Goes on competing.
    pub(super) fn compete(&mut self, ctx: &mut Context<'_>) -> Step {
        match &mut self.stage {
            Stage::Probing { again, .. } => {
                if again.due(ctx.now, ctx.timings().world_retry) {
                    ctx.act(Action::ProbeWorld);
                }
                Step::Stay
            }
            Stage::Competing { arbitration, .. } => {
                let outcome = arbitration.poll(ctx);
                self.decided(ctx, outcome)
            }
            _ => Step::Stay,
        }
    }

    pub(super) fn answered(
        &mut self,
        ctx: &mut Context<'_>,
        call: CallId,
        reply: ArbiterReply,
    ) -> Step {
        let Stage::Competing { arbitration, .. } = &mut self.stage else {
            return Step::Stay;
        };
        let outcome = arbitration.replied(ctx, call, reply);
        self.decided(ctx, outcome)
    }

    fn decided(&mut self, ctx: &mut Context<'_>, outcome: Option<Outcome>) -> Step {
        let Stage::Competing { cause, drained, .. } = &self.stage else {
            return Step::Stay;
        };
        match outcome {
            None => Step::Stay,
            Some(Outcome::Renounced) => Step::Leave(Leave::Incomplete),
            Some(Outcome::Lost(newest)) => {
                let closed = newest.is_some_and(|record| record.tenure == Tenure::Closed);
                Step::Leave(if closed {
                    Leave::PoweredOff
                } else {
                    Leave::Superseded
                })
            }
            Some(Outcome::Won(record)) => {
                Self::unwatch(ctx);
                Step::Promote(Promotion {
                    record,
                    session: self.session,
                    released: self.released,
                    cause: *cause,
                    guest_off: drained.guest_off,
                })
            }
        }
    }

    /// A planted bug: a drain is called off when the primary is heard again.
    pub(super) fn resume_if_buggy(&mut self) {
        let draining = matches!(self.stage, Stage::Closing { .. } | Stage::Draining { .. });
        if draining && canary::on(Canary::ResumeAfterDraining) {
            self.stage = Stage::Following;
        }
    }
}
