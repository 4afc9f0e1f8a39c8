//! A cold start: first boot, restore, or start after everybody stopped (R14).
//!
//! ```text
//!   Reading ──none, closed, or alone and mine──────────► Claiming ──Won──► primary
//!      ▲ └──pair with me──► Asking ──it holds nothing──►    │
//!      │ └──other──► Blocked ──an operator forces it──►     │
//!      └────────────────────────────── Lost ────────────────┘
//! ```
//! From Asking and Blocked it becomes an empty standby when the VM's primary asks it to join.
//!
//! Before it is made the driver makes sure, by a lock that dies with its holder, that no other process
//! of this VM lives on this host, and that the I/O of earlier ones is over.

use format::Epoch;

use crate::action::Notice;
use crate::arbiter::{ArbiterReply, ArbiterRequest, CallId};
use crate::arbitration::{Arbitration, Outcome, Proposal, Standing};
use crate::canary::{self, Canary};
use crate::context::{Context, Resend, earliest};
use crate::names::{HostId, Nonce};
use crate::peer::{Holds, PeerMessage};
use crate::record::{EpochRecord, Tenure};
use crate::time::Time;

/// A process that wants to start the VM.
#[derive(Debug)]
pub(crate) struct Boot {
    stage: Stage,
    forced: Option<Epoch>,
}

#[derive(Debug)]
enum Stage {
    Reading {
        call: Option<CallId>,
        again: Resend,
    },
    Asking {
        record: EpochRecord,
        other: HostId,
        nonce: Nonce,
        again: Resend,
    },
    Blocked {
        record: EpochRecord,
        again: Resend,
    },
    Claiming(Box<Arbitration>),
}

impl Boot {
    pub(crate) fn new() -> Self {
        Self {
            stage: Stage::reading(),
            forced: None,
        }
    }

    pub(crate) fn stage_name(&self) -> &'static str {
        match self.stage {
            Stage::Reading { .. } => "reading the record",
            Stage::Asking { .. } => "asking who holds state",
            Stage::Blocked { .. } => "blocked",
            Stage::Claiming(_) => "competing",
        }
    }

    /// Whether the process may already have a claim on its way.
    pub(crate) fn holds(&self) -> Holds {
        Holds {
            state: matches!(self.stage, Stage::Claiming(_)),
            writes: false,
        }
    }

    /// Whether a `Join` of `epoch` from `from` shows that another host runs the VM, so that this process is
    /// of more use as its standby. While a claim may be on its way the arbiter says so.
    pub(crate) fn is_overtaken(&self, from: HostId, epoch: Epoch) -> bool {
        match &self.stage {
            Stage::Asking { record, .. } | Stage::Blocked { record, .. } => {
                let its_own = record.owner == from && record.tenure == Tenure::Alone;
                epoch > record.epoch || (epoch == record.epoch && its_own)
            }
            Stage::Reading { .. } | Stage::Claiming(_) => false,
        }
    }

    /// Goes on as far as it can; returns the record when it is won.
    pub(crate) fn poll(&mut self, ctx: &mut Context<'_>) -> Option<EpochRecord> {
        let timings = ctx.timings();
        match &mut self.stage {
            Stage::Reading { call, again } => {
                if call.is_none() && again.due(ctx.now, timings.arbiter_retry_most) {
                    *call = Some(ctx.ask(ArbiterRequest::Newest));
                }
                None
            }
            Stage::Asking {
                other,
                nonce,
                again,
                ..
            } => {
                if again.due(ctx.now, timings.query) {
                    let (to, nonce) = (*other, *nonce);
                    ctx.send(to, PeerMessage::StateQuery { nonce, epoch: None });
                }
                None
            }
            Stage::Blocked { again, .. } => {
                if again.due(ctx.now, timings.query) {
                    self.stage = Stage::reading();
                    return self.poll(ctx);
                }
                None
            }
            Stage::Claiming(arbitration) => {
                let outcome = arbitration.poll(ctx);
                self.settle(ctx, outcome)
            }
        }
    }

    pub(crate) fn arbiter(
        &mut self,
        ctx: &mut Context<'_>,
        id: CallId,
        reply: ArbiterReply,
    ) -> Option<EpochRecord> {
        match &mut self.stage {
            Stage::Reading { call, .. } if *call == Some(id) => {
                *call = None;
                match reply {
                    ArbiterReply::Newest(newest) => self.read(ctx, newest),
                    ArbiterReply::Unreachable(why) => ctx.notice(Notice::ArbiterUnreachable(why)),
                    ArbiterReply::Won | ArbiterReply::Taken(_) => {}
                }
                self.poll(ctx)
            }
            Stage::Claiming(arbitration) => {
                let outcome = arbitration.replied(ctx, id, reply);
                self.settle(ctx, outcome)
            }
            _ => None,
        }
    }

    /// An operator says that nobody holds what the record of `epoch` allows.
    pub(crate) fn force(&mut self, ctx: &mut Context<'_>, epoch: Epoch) -> Option<EpochRecord> {
        self.forced = Some(epoch);
        if let Stage::Asking { record, .. } | Stage::Blocked { record, .. } = &self.stage {
            if record.epoch != epoch {
                let why = "the newest record is of another epoch: see what the status names";
                ctx.notice(Notice::CommandRefused(why));
                return None;
            }
            let record = record.clone();
            self.claim(Some(record));
        }
        self.poll(ctx)
    }

    /// An operator says that `host` holds nothing.
    pub(crate) fn host_gone(&mut self, ctx: &mut Context<'_>, host: HostId) -> Option<EpochRecord> {
        match &self.stage {
            Stage::Asking { record, other, .. } if *other == host => {
                let record = record.clone();
                self.claim(Some(record));
                self.poll(ctx)
            }
            _ => {
                let why = "the start does not wait for that host: see what the status names";
                ctx.notice(Notice::CommandRefused(why));
                None
            }
        }
    }

    /// The other host of the pair says what it holds.
    pub(crate) fn state_reply(
        &mut self,
        ctx: &mut Context<'_>,
        from: HostId,
        answered: Nonce,
        holds: Holds,
    ) -> Option<EpochRecord> {
        let Stage::Asking {
            record,
            other,
            nonce,
            ..
        } = &self.stage
        else {
            return None;
        };
        if from == *other && answered == *nonce && holds == Holds::NOTHING {
            let record = record.clone();
            self.claim(Some(record));
            return self.poll(ctx);
        }
        None
    }

    fn read(&mut self, ctx: &mut Context<'_>, newest: Option<EpochRecord>) {
        let Some(record) = newest else {
            return self.claim(None);
        };
        let me = ctx.me();
        let forced = self.forced == Some(record.epoch);
        let free = match record.tenure {
            Tenure::Closed => true,
            // This process is the only one here, and it holds nothing.
            Tenure::Alone => record.owner == me,
            Tenure::Pair { .. } => false,
        };
        if free || forced || canary::on(Canary::ColdStartOnOpenRecord) {
            return self.claim(Some(record));
        }
        let other = match record.tenure {
            Tenure::Pair { backup, .. } if record.owner == me => Some(backup),
            Tenure::Pair { backup, .. } if backup == me => Some(record.owner),
            _ => None,
        };
        ctx.notice(Notice::StartBlocked {
            record: record.clone(),
            waiting_for: other.into_iter().collect(),
        });
        self.stage = match other {
            Some(other) => Stage::Asking {
                record,
                other,
                nonce: ctx.core.nonces.nonce(),
                again: Resend::NOW,
            },
            None => {
                let mut again = Resend::NOW;
                again.due(ctx.now, ctx.timings().query);
                Stage::Blocked { record, again }
            }
        };
    }

    fn claim(&mut self, base: Option<EpochRecord>) {
        let standing = Standing::Cold {
            base: base.as_ref().map(EpochRecord::base),
        };
        let proposal = Proposal::of(Tenure::Alone);
        let known = base.as_ref().map(|base| base.epoch);
        self.stage = Stage::Claiming(Box::new(Arbitration::new(
            standing,
            proposal,
            Some(base),
            known,
            None,
        )));
    }

    fn settle(&mut self, ctx: &mut Context<'_>, outcome: Option<Outcome>) -> Option<EpochRecord> {
        match outcome? {
            Outcome::Won(record) => Some(record),
            Outcome::Renounced | Outcome::Lost(_) => {
                self.stage = Stage::reading();
                self.poll(ctx)
            }
        }
    }

    pub(crate) fn next_deadline(&self) -> Option<Time> {
        match &self.stage {
            Stage::Reading { call, again } => again.at().filter(|_| call.is_none()),
            Stage::Asking { again, .. } | Stage::Blocked { again, .. } => again.at(),
            Stage::Claiming(arbitration) => earliest([arbitration.next_deadline()]),
        }
    }
}

impl Stage {
    fn reading() -> Self {
        Self::Reading {
            call: None,
            again: Resend::NOW,
        }
    }
}
