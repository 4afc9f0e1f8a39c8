//! Folding the quarantine back (R16): when every host that may still write is proven gone, the
//! sectors are copied into the image, and the next epoch's record says that they are there.
//!
//! Proof is: the host's own word, in answer to a question asked in this term, that it has no world
//! open and no I/O left; a fence; or an operator's word.

use format::Epoch;

use crate::action::{Action, Notice};
use crate::canary::{self, Canary};
use crate::context::{Context, Resend, earliest};
use crate::names::{HostId, Nonce};
use crate::peer::{Holds, PeerMessage};
use crate::time::Time;

use super::errand::Errand;
use super::{Phase, Primary};

/// How far folding is.
#[derive(Debug)]
pub(super) struct Fold {
    state: State,
    gone: Vec<HostId>,
    /// The question that is open, the same for all.
    nonce: Option<Nonce>,
    again: Resend,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    Copying,
    Copied,
}

impl Fold {
    pub(super) fn new() -> Self {
        Self {
            state: State::Idle,
            gone: Vec::new(),
            nonce: None,
            again: Resend::NOW,
        }
    }

    /// `host` will write no more.
    pub(super) fn gone(&mut self, host: HostId) {
        if !self.gone.contains(&host) {
            self.gone.push(host);
        }
    }

    pub(super) fn is_copied(&self) -> bool {
        self.state == State::Copied
    }

    pub(super) fn copied(&mut self) {
        if self.state == State::Copying {
            self.state = State::Copied;
        }
    }

    pub(super) fn replied(&mut self, from: HostId, nonce: Nonce, holds: Holds) {
        if self.nonce == Some(nonce) && !holds.writes {
            self.gone(from);
        }
    }
}

impl Primary {
    fn feared(&self, ctx: &Context<'_>) -> Vec<HostId> {
        let suspects = self.record.quarantine.suspects().iter().copied();
        // This replica is a process of its own, made after whatever this host did before was over.
        let me = ctx.me();
        suspects
            .filter(|host| *host != me && !self.fold.gone.contains(host))
            .collect()
    }

    pub(super) fn drive_fold(&mut self, ctx: &mut Context<'_>) {
        let quiet = matches!(self.phase, Phase::Running) && self.errand == Errand::None;
        if self.record.quarantine.is_empty() || self.fold.state != State::Idle || !quiet {
            return;
        }
        let feared = self.feared(ctx);
        if feared.is_empty() || canary::on(Canary::FoldBeforeGone) {
            self.fold.state = State::Copying;
            ctx.act(Action::Fold(self.record.quarantine.clone()));
            return;
        }
        let every = ctx.timings().query;
        if self.fold.again.due(ctx.now, every) {
            let nonce = *self
                .fold
                .nonce
                .get_or_insert_with(|| ctx.core.nonces.nonce());
            let epoch = Some(self.record.epoch);
            for host in feared {
                ctx.send(host, PeerMessage::StateQuery { nonce, epoch });
            }
        }
    }

    pub(super) fn folded(&mut self, ctx: &mut Context<'_>) {
        self.fold.state = State::Idle;
        ctx.act(Action::Unquarantine);
        let epoch: Epoch = self.record.epoch;
        ctx.notice(Notice::QuarantineOver(epoch));
    }

    pub(super) fn fold_deadline(&self) -> Option<Time> {
        let asks = !self.record.quarantine.is_empty()
            && self.fold.state == State::Idle
            && self.errand == Errand::None
            && matches!(self.phase, Phase::Running);
        earliest([self.fold.again.at().filter(|_| asks)])
    }
}
