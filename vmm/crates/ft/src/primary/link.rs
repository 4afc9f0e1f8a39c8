//! The link to a standby that becomes the backup, and to the backup.
//!
//! Owner of one session's stage, acknowledgements and failure detector. It decides nothing about
//! epochs: that is the primary's.

use format::{Seq, SessionId};

use crate::acks::{AckTracker, Mark};
use crate::context::{Context, Resend, earliest};
use crate::detector::{Cause, FailureDetector, HeartbeatReply, Owed};
use crate::names::HostId;
use crate::time::Time;

/// How far protection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Asked to join.
    Joining {
        /// Given up then.
        until: Time,
    },
    /// State and log are on their way; outputs are free.
    Transferring,
    /// The gate is told to hold.
    Holding,
    /// Outputs are held; the standby is asked to confirm everything below.
    Confirming {
        /// The position.
        upto: Seq,
    },
    /// It confirmed: the epoch may be claimed.
    Confirmed,
    /// The claim that names it is on its way: from here on it may compete.
    Committing,
    /// The record names it.
    Backup,
}

/// One session with one host.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) peer: HostId,
    pub(super) session: SessionId,
    pub(super) stage: Stage,
    detector: Option<FailureDetector>,
    acks: Option<AckTracker>,
    /// The standby's last word about its progress, and when it said something new.
    synced: (u64, Option<Seq>),
    moved_at: Time,
    /// Its loss was noticed while the claim that names it was on its way.
    pub(super) lost: Option<Cause>,
    pub(super) released: Seq,
    pub(super) resend: Resend,
    pub(super) progress: Resend,
}

impl Link {
    pub(super) fn new(ctx: &Context<'_>, peer: HostId, session: SessionId) -> Self {
        Self {
            peer,
            session,
            stage: Stage::Joining {
                until: ctx.now.after(ctx.timings().join),
            },
            detector: None,
            acks: None,
            synced: (0, None),
            moved_at: ctx.now,
            lost: None,
            released: Seq(0),
            resend: Resend::NOW,
            progress: Resend::OFF,
        }
    }

    pub(super) fn stage_name(&self) -> &'static str {
        match self.stage {
            Stage::Joining { .. } => "joining",
            Stage::Transferring => "syncing",
            Stage::Holding | Stage::Confirming { .. } | Stage::Confirmed => "confirming",
            Stage::Committing => "committing",
            Stage::Backup => "protected",
        }
    }

    pub(super) fn is_backup(&self) -> bool {
        self.stage == Stage::Backup
    }

    /// Whether the record that names it stands, or may come to stand.
    pub(super) fn may_compete(&self) -> bool {
        matches!(self.stage, Stage::Backup | Stage::Committing)
    }

    pub(super) fn acks(&mut self) -> Option<&mut AckTracker> {
        self.acks.as_mut()
    }

    pub(super) fn replied(&mut self, reply: HeartbeatReply) {
        if let Some(detector) = &mut self.detector {
            detector.replied(reply);
        }
    }

    pub(super) fn heard(&mut self) {
        if let Some(detector) = &mut self.detector {
            detector.heard();
        }
    }

    pub(super) fn ended(&mut self) {
        if let Some(detector) = &mut self.detector {
            detector.ended();
        }
    }

    /// The standby accepted: it is watched from now on.
    pub(super) fn accepted(&mut self, ctx: &Context<'_>) {
        self.stage = Stage::Transferring;
        self.detector = Some(FailureDetector::new(ctx.core.config.detector, ctx.now));
        self.moved_at = ctx.now;
        self.resend = Resend::OFF;
        self.progress = Resend::NOW;
    }

    pub(super) fn transfer_started(&mut self, start: Mark) {
        if self.acks.is_none() {
            self.acks = Some(AckTracker::new(start));
        }
    }

    pub(super) fn gate_holds(&mut self, at: Seq) {
        if self.stage == Stage::Holding {
            self.stage = Stage::Confirming { upto: at };
            self.resend = Resend::NOW;
        }
    }

    pub(super) fn synced(&mut self, now: Time, bytes: u64, replayed: Option<Seq>) {
        let news = (bytes.max(self.synced.0), replayed.max(self.synced.1));
        if news != self.synced {
            self.synced = news;
            self.moved_at = now;
        }
    }

    /// Whether the standby is so close that outputs may begin to wait for it.
    pub(super) fn caught_up(&self, appends: u64) -> bool {
        match (&self.acks, self.synced.1) {
            (Some(acks), Some(replayed)) => acks.next().0.saturating_sub(replayed.0) <= appends,
            _ => false,
        }
    }

    /// Everything below `end` is acknowledged.
    pub(super) fn acked(&self, end: Seq) -> bool {
        let received = self.acks.as_ref().map(|acks| acks.record().received);
        received.is_some_and(|received| received >= end)
    }

    /// Why the peer is lost, if it is.
    pub(super) fn verdict(&self, ctx: &Context<'_>) -> Option<Cause> {
        let stalled = ctx.now.since(self.moved_at) >= ctx.timings().sync_stalled;
        let acks = self.acks.as_ref();
        let owed = Owed {
            ack: acks.and_then(AckTracker::stalled_since),
            replay: acks.and_then(AckTracker::replay_stalled_since),
        };
        let (owed, stalled) = match self.stage {
            Stage::Joining { .. } => (Owed::default(), false),
            // While it loads, its log may wait; it must move all the same.
            Stage::Transferring => (Owed::default(), stalled),
            Stage::Holding | Stage::Confirming { .. } | Stage::Confirmed => {
                let replay = None;
                (Owed { replay, ..owed }, stalled)
            }
            Stage::Committing | Stage::Backup => (owed, false),
        };
        let verdict = self.detector.as_ref()?.verdict(ctx.now, owed);
        verdict.or(stalled.then_some(Cause::GaveUp))
    }

    /// Lets the detector send its probe.
    pub(super) fn drive(&mut self, ctx: &mut Context<'_>) {
        let peer = self.peer;
        if let Some(detector) = &mut self.detector {
            ctx.drive(peer, detector);
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Time> {
        let until = match self.stage {
            Stage::Joining { until } => Some(until),
            _ => None,
        };
        earliest([
            until,
            self.resend.at(),
            self.progress.at(),
            self.detector.as_ref().map(FailureDetector::next_deadline),
        ])
    }
}
