//! Winning the next epoch (R14): who may compete, what the next record says, and the dialogue with
//! the arbiter until it is decided.
//!
//! ```text
//!   (base unknown) ─► Newest ──► may compete? ──never──► Lost
//!                        ▲         yes│  │not yet: asked again, and after a while
//!                        │            │  └────► TryWin(base + 1: the owner, alone) ──Won──► Renounced
//!                        │            ▼                          │
//!                        ├─Taken── TryWin(base + 1) ──Won──► Won │
//!                        └─Taken─────────────────────────────────┘
//! ```
//! A standby that confirmed may be named by a claim of its primary that is on its way for however long:
//! to give up it makes sure that this claim fails. It makes the record of that claim's epoch itself, in
//! the owner's name and with the tenure that the owner has: it **renounces**. Whichever of the two
//! records is linked first decides, and the other side reads it. Nobody's right changes by it: the owner
//! takes the record for its own, and lets the standby go ([`EpochRecord::renounces`]).
//!
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

    /// The record by which the standby of `session` renounces: that of `base` again. Its nonce is the
    /// session, which nothing else has for a nonce, so that the owner can tell.
    fn renunciation(base: &Self, session: SessionId) -> Self {
        Self {
            epoch: base.epoch.next(),
            nonce: Nonce(session.0),
            ..base.clone()
        }
    }

    /// Whether this record is how the standby of `session` renounced.
    #[must_use]
    pub fn renounces(&self, session: SessionId) -> bool {
        self.nonce == Nonce(session.0)
    }

    /// Whether this record, of the epoch after `mine`, leaves its owner all that `mine` gave it: a standby
    /// renounced. Only this process could have made another one like it, for it is alone on its host.
    #[must_use]
    pub fn continues(&self, mine: &Self) -> bool {
        let alone = [self, mine].map(|record| record.tenure == Tenure::Alone);
        alone == [true; 2] && self.owner == mine.owner && self.epoch == mine.epoch.next()
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
    /// A record stands that leaves everything to its owner: no claim that names this side can be won.
    Renounced,
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
    renounce_at: Option<Time>,
    unreachable: bool,
}

impl Arbitration {
    /// Begins; `base` is the newest record where it is known, `known` an epoch that has one. A standing
    /// that is not yet good at `renounce_at` is renounced.
    pub(crate) fn new(
        standing: Standing,
        proposal: Proposal,
        base: Option<Option<EpochRecord>>,
        known: Option<Epoch>,
        renounce_at: Option<Time>,
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
            renounce_at,
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
            match (self.standing.judge(base.as_ref()), &mut self.standing) {
                (Judgement::May, standing) => {
                    if let Standing::Backup { named, .. } = standing {
                        *named = true;
                    }
                    let nonce = ctx.core.nonces.nonce();
                    let fences = ctx.core.config.fencing;
                    self.claim = Some(self.proposal.record(base.as_ref(), ctx.me(), nonce, fences));
                }
                (Judgement::Never, _) => return Some(Outcome::Lost(base)),
                (Judgement::NotYet, _) if canary::on(Canary::GivesUpUnasked) => {
                    return Some(Outcome::Renounced);
                }
                (Judgement::NotYet, Standing::Backup { session, .. })
                    if self.renounce_at.is_some_and(|at| at <= ctx.now) =>
                {
                    let renunciation = |base| EpochRecord::renunciation(base, *session);
                    self.claim = base.as_ref().map(renunciation);
                }
                (Judgement::NotYet, _) => {
                    self.base = None;
                    self.back_off(ctx);
                    return None;
                }
            }
        }
        let record = self.claim.clone().expect("made above where it was missing");
        if canary::on(Canary::SkipTestAndSet) {
            return Some(Self::stands(ctx, record));
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
                return Some(Self::stands(ctx, record));
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

    fn stands(ctx: &Context<'_>, record: EpochRecord) -> Outcome {
        if record.owner == ctx.me() {
            Outcome::Won(record)
        } else {
            Outcome::Renounced
        }
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
