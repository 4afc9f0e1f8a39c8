//! Winning the next epoch (R14): who may compete, what the next record says, and the dialogue with
//! the arbiter until it is decided.
//!
//! ```text
//!   (base unknown) ─► Newest ──► may compete? ──no──► Lost, or ask again for a while
//!                        ▲            │yes
//!                        │            ▼
//!                        └─Taken── TryWin(base + 1) ──Won──► Won
//! ```
//! Always true: a claim for epoch e+1 is built on the record of e that allows it; the same claim is
//! repeated, with its nonce, while its outcome is unknown; an arbiter that cannot be reached decides
//! nothing. One question is on its way at a time, for however long it takes.
//!
//! Owner: the role that competes. It is told about answers and time, and says when it is decided.

use std::time::Duration;

use format::{Epoch, SessionId};

use crate::action::Notice;
use crate::arbiter::{ArbiterReply, ArbiterRequest, Base, CallId};
use crate::canary::{self, Canary};
use crate::context::Context;
use crate::names::{HostId, Nonce};
use crate::quarantine::{Quarantine, SectorRange};
use crate::record::{EpochRecord, Tenure};
use crate::time::Time;

/// By what right a replica competes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It made the newest record itself.
    Owner {
        /// The nonce of that record.
        nonce: Nonce,
    },
    /// The newest record names it as backup in this session.
    Backup {
        /// The session.
        session: SessionId,
        /// The primary of the session.
        primary: HostId,
        /// Whether a record has named it.
        named: bool,
    },
    /// It starts anew, having made sure that nobody holds what this record allows.
    Cold {
        /// The record; none where there is none.
        base: Option<Base>,
    },
}

/// What a record says about a standing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judgement {
    /// It may compete for the next epoch.
    May,
    /// Not yet: the primary may still name it.
    NotYet,
    /// Never again.
    Never,
}

impl Standing {
    /// Whether a replica of this standing may compete when `newest` is the newest record.
    #[must_use]
    pub fn judge(&self, newest: Option<&EpochRecord>) -> Judgement {
        let may = |allowed| {
            if allowed {
                Judgement::May
            } else {
                Judgement::Never
            }
        };
        match (*self, newest) {
            (Self::Owner { nonce }, Some(record)) => {
                may(record.nonce == nonce && record.tenure != Tenure::Closed)
            }
            (
                Self::Backup {
                    session,
                    primary,
                    named,
                },
                Some(record),
            ) => match record.tenure {
                Tenure::Pair { session: other, .. } => may(other == session),
                Tenure::Alone if record.owner == primary && !named => Judgement::NotYet,
                _ => Judgement::Never,
            },
            (Self::Owner { .. } | Self::Backup { .. }, None) => Judgement::Never,
            (Self::Cold { base }, newest) => may(newest.map(EpochRecord::base) == base),
        }
    }
}

impl EpochRecord {
    /// What a claim for the next epoch builds on.
    #[must_use]
    pub fn base(&self) -> Base {
        Base {
            epoch: self.epoch,
            nonce: self.nonce,
        }
    }
}

/// What the next record is to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Proposal {
    pub(crate) tenure: Tenure,
    /// The guest's outstanding writes, which the owner of the record before may still do.
    pub(crate) outstanding: Vec<SectorRange>,
    /// What becomes of the quarantine.
    pub(crate) quarantine: Keep,
}

/// What becomes of the quarantine of the record before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keep {
    /// It stays, and its owner becomes a suspect where it may still write.
    Feared,
    /// It stays as it is.
    Same,
    /// It is folded back.
    Nothing,
}

impl Proposal {
    pub(crate) fn of(tenure: Tenure) -> Self {
        Self {
            tenure,
            outstanding: Vec::new(),
            quarantine: Keep::Same,
        }
    }

    fn record(
        &self,
        base: Option<&EpochRecord>,
        me: HostId,
        nonce: Nonce,
        fences: bool,
    ) -> EpochRecord {
        let epoch = base.map_or(Epoch(1), |base| base.epoch.next());
        let mut quarantine = match (base, self.quarantine) {
            (None, _) | (_, Keep::Nothing) => Quarantine::default(),
            (Some(base), _) => base.quarantine.clone(),
        };
        if !fences && !canary::on(Canary::QuarantineSkipped) {
            for range in &self.outstanding {
                quarantine.put(*range, epoch);
            }
        }
        let feared = self.quarantine == Keep::Feared && (fences || !quarantine.is_empty());
        if let (true, Some(base)) = (feared, base) {
            quarantine.suspect(base.owner);
        }
        EpochRecord {
            epoch,
            nonce,
            owner: me,
            tenure: self.tenure,
            quarantine,
        }
    }
}

/// What came out.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Outcome {
    /// This record stands.
    Won(EpochRecord),
    /// Somebody else is ahead: the newest record, where it is known.
    Lost(Option<EpochRecord>),
}

/// One competition.
#[derive(Debug)]
pub(crate) struct Arbitration {
    standing: Standing,
    proposal: Proposal,
    /// The newest record as far as it is known; the outer `None`: not known.
    base: Option<Option<EpochRecord>>,
    /// An epoch that is known to have a record: an answer that tells of none as new is out of date.
    known: Option<Epoch>,
    /// The claim whose outcome is open.
    claim: Option<EpochRecord>,
    call: Option<CallId>,
    ask_at: Time,
    wait: Duration,
    give_up_at: Option<Time>,
    unreachable: bool,
}

impl Arbitration {
    /// Begins; `base` is the newest record where it is known, `known` an epoch that has one. With
    /// `give_up_at`, a standing that is not yet good is lost then.
    pub(crate) fn new(
        standing: Standing,
        proposal: Proposal,
        base: Option<Option<EpochRecord>>,
        known: Option<Epoch>,
        give_up_at: Option<Time>,
    ) -> Self {
        Self {
            standing,
            proposal,
            base,
            known,
            claim: None,
            call: None,
            ask_at: Time(0),
            wait: Duration::ZERO,
            give_up_at,
            unreachable: false,
        }
    }

    /// Somebody who won it says that `epoch` has a record.
    pub(crate) fn told_of(&mut self, epoch: Epoch) {
        self.known = self.known.max(Some(epoch));
    }

    /// Asks what is to be asked now. Decides at once only where nothing needs to be asked.
    pub(crate) fn poll(&mut self, ctx: &mut Context<'_>) -> Option<Outcome> {
        if self.call.is_some() || ctx.now < self.ask_at {
            return None;
        }
        let Some(base) = self.base.clone() else {
            self.call = Some(ctx.ask(ArbiterRequest::Newest));
            return None;
        };
        if self.claim.is_none() {
            match self.standing.judge(base.as_ref()) {
                Judgement::May => {
                    if let Standing::Backup { named, .. } = &mut self.standing {
                        *named = true;
                    }
                }
                Judgement::Never => return Some(Outcome::Lost(base)),
                Judgement::NotYet if self.give_up_at.is_some_and(|at| at <= ctx.now) => {
                    return Some(Outcome::Lost(base));
                }
                Judgement::NotYet => {
                    self.base = None;
                    self.back_off(ctx);
                    return None;
                }
            }
            let nonce = ctx.core.nonces.nonce();
            let fences = ctx.core.config.fencing;
            self.claim = Some(self.proposal.record(base.as_ref(), ctx.me(), nonce, fences));
        }
        let record = self.claim.clone().expect("made above where it was missing");
        if canary::on(Canary::SkipTestAndSet) {
            return Some(Outcome::Won(record));
        }
        let base = base.as_ref().map(EpochRecord::base);
        self.call = Some(ctx.ask(ArbiterRequest::TryWin { base, record }));
        None
    }

    /// Takes an answer; those to other questions change nothing.
    pub(crate) fn replied(
        &mut self,
        ctx: &mut Context<'_>,
        call: CallId,
        reply: ArbiterReply,
    ) -> Option<Outcome> {
        if self.call != Some(call) {
            return None;
        }
        self.call = None;
        match reply {
            ArbiterReply::Unreachable(why) => {
                if !std::mem::replace(&mut self.unreachable, true) {
                    ctx.notice(Notice::ArbiterUnreachable(why));
                }
                self.back_off(ctx);
                return None;
            }
            ArbiterReply::Newest(newest) => {
                if newest.as_ref().map(|record| record.epoch) < self.known {
                    self.back_off(ctx);
                    return None;
                }
                self.base = Some(newest);
            }
            ArbiterReply::Won => {
                let record = self.claim.take().expect("only a claim is won");
                return Some(Outcome::Won(record));
            }
            ArbiterReply::Taken(record) => {
                // There may be still newer ones, so the newest is asked for before a claim; but a
                // standing that this record ends has ended.
                self.claim = None;
                self.known = self.known.max(Some(record.epoch));
                if self.standing.judge(Some(&record)) == Judgement::Never {
                    return Some(Outcome::Lost(Some(record)));
                }
                self.base = None;
            }
        }
        self.unreachable = false;
        self.wait = Duration::ZERO;
        self.poll(ctx)
    }

    fn back_off(&mut self, ctx: &Context<'_>) {
        let timings = ctx.timings();
        self.wait = (self.wait * 2)
            .max(timings.arbiter_retry)
            .min(timings.arbiter_retry_most);
        self.ask_at = ctx.now.after(self.wait);
    }

    pub(crate) fn next_deadline(&self) -> Option<Time> {
        self.call.is_none().then_some(self.ask_at)
    }
}
