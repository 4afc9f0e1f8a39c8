//! The primary: owns an epoch, acts on the world, looks for a backup and keeps it.
//!
//! ```text
//!   Starting ──Live──► Running ◄─────────── Won ─────────┐
//!   (fence, go live)     │  no backup: Alone             │
//!                        │  a link in its stages:        │
//!                        │  Joining → Transferring →     │
//!                        │  Holding → Confirming →       │
//!                        │  Committing → Backup:         │
//!                        │  Protected                    │
//!                        └──backup lost──► GoingAlone ───┘
//!      any ── another owner, or the VM is off ──► left (see replica.rs)
//! ```
//! Owner of its state: [`Primary`]; the link to the standby or backup is owned by [`link::Link`].
//!
//! Always true:
//! - every epoch that it acts in it has won; what it acts by is `record`, the newest it has won;
//! - one claim at a time; the next one is computed from the state when the one before is decided, so
//!   that none is forgotten and none is made for a reason that is gone;
//! - the gate is open only while `record` names no backup and no commit is on its way.

mod claims;
mod errand;
mod fold;
mod link;
mod peer;
mod protect;
mod standbys;

use format::SessionId;

use crate::action::{Action, GoLive, Leave, Notice, Origin};
use crate::arbitration::Arbitration;
use crate::context::{Context, Resend, earliest};
use crate::detector::Cause;
use crate::event::Event;
use crate::gate::GateMode;
use crate::names::HostId;
use crate::peer::PeerMessage;
use crate::record::EpochRecord;
use crate::time::Time;

use claims::Purpose;
use errand::Errand;
use fold::Fold;
use link::{Link, Stage};
use standbys::Standbys;

/// What a handler asks of the replica that owns the role.
pub(crate) type Verdict = Result<(), Leave>;

/// A primary.
#[derive(Debug)]
pub(crate) struct Primary {
    /// The newest record that this replica won.
    record: EpochRecord,
    phase: Phase,
    claim: Option<(Purpose, Arbitration)>,
    link: Option<Link>,
    /// The gate shut itself; the epoch is to be renewed before it opens.
    renew: bool,
    standbys: Standbys,
    errand: Errand,
    fold: Fold,
    /// The storage is out of reach; the backup is asked now and then whether it is from there.
    storage_lost: Option<Resend>,
    /// A session that ended with the last backup, to be told that it is over.
    dropped: Option<(HostId, SessionId)>,
    goodbye: Resend,
}

#[derive(Debug)]
enum Phase {
    /// Won; not yet acting.
    Starting {
        fences: Vec<HostId>,
        origin: Origin,
        guest_off: bool,
    },
    /// Acting.
    Running,
    /// The backup is lost; outputs wait until an epoch without it is won.
    GoingAlone,
}

impl Primary {
    /// A replica that has just won `record` and acts on the world from now on.
    pub(crate) fn start(
        ctx: &mut Context<'_>,
        record: EpochRecord,
        origin: Origin,
        guest_off: bool,
    ) -> Self {
        ctx.notice(Notice::Won {
            epoch: record.epoch,
            quarantined: record.quarantine.ranges().count(),
        });
        let me = ctx.me();
        let suspects = record.quarantine.suspects().iter().copied();
        let fences: Vec<_> = if ctx.core.config.fencing {
            suspects.filter(|host| *host != me).collect()
        } else {
            Vec::new()
        };
        for host in &fences {
            ctx.act(Action::Fence(*host));
        }
        let mut primary = Self {
            standbys: Standbys::new(ctx),
            errand: Errand::None,
            fold: Fold::new(),
            phase: Phase::Starting {
                fences,
                origin,
                guest_off,
            },
            record,
            claim: None,
            link: None,
            renew: false,
            storage_lost: None,
            dropped: None,
            goodbye: Resend::OFF,
        };
        primary.go_live_when_fenced(ctx);
        primary
    }

    fn go_live_when_fenced(&mut self, ctx: &mut Context<'_>) {
        if let Phase::Starting { fences, origin, .. } = &self.phase
            && fences.is_empty()
        {
            ctx.act(Action::GoLive(GoLive {
                record: self.record.clone(),
                origin: *origin,
            }));
        }
    }

    pub(crate) fn record(&self) -> &EpochRecord {
        &self.record
    }

    pub(crate) fn state_name(&self) -> &'static str {
        match (&self.phase, &self.link) {
            (Phase::Starting { .. }, _) => "starting",
            (Phase::GoingAlone, _) => "arbitrating",
            (Phase::Running, None) => "alone",
            (Phase::Running, Some(link)) => link.stage_name(),
        }
    }

    pub(crate) fn peer(&self) -> Option<HostId> {
        self.link.as_ref().map(|link| link.peer)
    }

    fn is_running(&self) -> bool {
        matches!(self.phase, Phase::Running)
    }

    pub(crate) fn is_protected(&self) -> bool {
        self.is_running() && self.link.as_ref().is_some_and(Link::is_backup)
    }

    /// The link, if it is of `session`.
    fn link_of(&mut self, session: SessionId) -> Option<&mut Link> {
        self.link.as_mut().filter(|link| link.session == session)
    }

    pub(crate) fn handle(&mut self, ctx: &mut Context<'_>, event: Event) -> Verdict {
        match event {
            Event::Arbiter { call, reply } => return self.arbiter(ctx, call, reply),
            Event::Peer { from, message } => return self.peer_message(ctx, from, message),
            Event::Command(command) => self.command(ctx, command),
            Event::Heartbeat { session, reply } => {
                if let Some(link) = self.link_of(session) {
                    link.replied(reply);
                }
            }
            Event::Heard(session) => {
                if let Some(link) = self.link_of(session) {
                    link.heard();
                }
            }
            Event::PeerEnd(session) => {
                if let Some(link) = self.link_of(session) {
                    link.ended();
                }
            }
            Event::TransferStarted { session, start } => {
                if let Some(link) = self.link_of(session) {
                    link.transfer_started(start);
                }
            }
            Event::TransferFailed { session, why } => {
                if self.link_of(session).is_some() {
                    self.give_link_up(ctx, Cause::GaveUp, why);
                }
            }
            Event::Appended { session, mark } => {
                if let Some(acks) = self.link_of(session).and_then(Link::acks) {
                    acks.appended(mark);
                }
            }
            Event::Acked { session, record } => {
                let now = ctx.now;
                if let Some(acks) = self.link_of(session).and_then(Link::acks) {
                    acks.acked(now, record);
                }
            }
            Event::Released { session, upto } => {
                if let Some(link) = self.link_of(session) {
                    link.released = link.released.max(upto);
                }
            }
            Event::GateHolds { session, at } => {
                if let Some(link) = self.link_of(session) {
                    link.gate_holds(at);
                }
            }
            Event::GateGap(_) => self.gate_gap(ctx),
            Event::Quiesced { why, end } => self.errand.quiesced(why, end),
            Event::GuestOff => self.guest_off(ctx),
            Event::StorageLost => self.storage_lost = self.storage_lost.or(Some(Resend::NOW)),
            Event::StorageBack => self.storage_lost = None,
            Event::Folded => self.fold.copied(),
            Event::Fenced(host) => {
                if let Phase::Starting { fences, .. } = &mut self.phase
                    && fences.contains(&host)
                {
                    fences.retain(|other| *other != host);
                    self.fold.gone(host);
                    self.go_live_when_fenced(ctx);
                }
            }
            Event::Live => self.live(ctx),
            Event::Tick
            | Event::StateReceived { .. }
            | Event::Replayed { .. }
            | Event::LoadFailed { .. }
            | Event::Diverged { .. }
            | Event::SessionClosed { .. }
            | Event::Drained { .. }
            | Event::WorldProbed { .. }
            | Event::Discarded => {}
        }
        Ok(())
    }

    /// After every event: what follows from the state and the time.
    pub(crate) fn poll(&mut self, ctx: &mut Context<'_>) -> Verdict {
        self.watch_link(ctx);
        self.drive_protection(ctx);
        self.drive_errand(ctx);
        self.drive_fold(ctx);
        self.say_goodbye(ctx);
        self.next_claim(ctx)
    }

    fn live(&mut self, ctx: &mut Context<'_>) {
        let Phase::Starting {
            origin, guest_off, ..
        } = self.phase
        else {
            return;
        };
        self.phase = Phase::Running;
        ctx.act(Action::Gate(GateMode::Open));
        ctx.notice(Notice::Alone(self.record.epoch));
        if guest_off {
            self.guest_off(ctx);
        }
        if let Origin::Cold = origin {
            self.standbys.at_once();
        }
    }

    fn gate_gap(&mut self, ctx: &mut Context<'_>) {
        match self.link.as_ref().map(|link| link.stage) {
            Some(Stage::Holding | Stage::Confirming { .. } | Stage::Confirmed) => {
                self.give_link_up(ctx, Cause::OwnPause, "this side did not run".to_owned());
            }
            Some(Stage::Committing | Stage::Backup) => self.renew = true,
            _ => {}
        }
    }

    /// Tells the last backup that its session is over, for as long as nothing else is said to it.
    fn say_goodbye(&mut self, ctx: &mut Context<'_>) {
        let every = ctx.timings().query;
        if !matches!(self.phase, Phase::Running) || !self.goodbye.due(ctx.now, every) {
            return;
        }
        match self.dropped {
            Some((to, session)) => {
                let (epoch, closed) = (self.record.epoch, false);
                ctx.send(
                    to,
                    PeerMessage::Dropped {
                        session,
                        epoch,
                        closed,
                    },
                );
            }
            None => self.goodbye = Resend::OFF,
        }
    }

    pub(crate) fn next_deadline(&self) -> Option<Time> {
        earliest([
            self.claim
                .as_ref()
                .and_then(|(_, claim)| claim.next_deadline()),
            self.link.as_ref().and_then(Link::next_deadline),
            self.protection_deadline(),
            self.errand.next_deadline(),
            self.fold_deadline(),
            self.goodbye.at().filter(|_| self.is_running()),
            self.storage_lost
                .and_then(Resend::at)
                .filter(|_| self.is_protected()),
        ])
    }
}
