//! The start of protection (R15), and its end.
//!
//! Order: join → transfer and catch up → outputs held → the standby confirms complete state and all
//! log below the point where the gate began to hold → claim of the epoch that names it → protected.
//! A standby that is lost before the claim costs no arbitration. Once the claim is on its way it
//! must be decided first, for the standby may come to be named.

use crate::action::{Action, Notice};
use crate::canary::{self, Canary};
use crate::context::{Context, Resend};
use crate::detector::Cause;
use crate::gate::GateMode;
use crate::peer::PeerMessage;
use crate::time::Time;

use super::errand::Errand;
use super::link::{Link, Stage};
use super::{Phase, Primary};

impl Primary {
    /// Notices the loss of the peer.
    pub(super) fn watch_link(&mut self, ctx: &mut Context<'_>) {
        let Some(link) = &mut self.link else { return };
        link.drive(ctx);
        if link.lost.is_some() {
            return;
        }
        if let Some(cause) = link.verdict(ctx) {
            self.give_link_up(ctx, cause, format!("{cause:?}"));
        }
    }

    /// The peer is of no use any more, for whatever reason.
    pub(super) fn give_link_up(&mut self, ctx: &mut Context<'_>, cause: Cause, why: String) {
        let Some(link) = &mut self.link else { return };
        let standby = link.peer;
        match link.stage {
            Stage::Backup => {
                ctx.notice(Notice::PeerLost {
                    peer: standby,
                    cause,
                });
                self.go_alone(ctx);
            }
            Stage::Committing => link.lost = Some(cause),
            _ => {
                ctx.notice(Notice::ProtectionFailed {
                    standby,
                    cause: why,
                });
                self.abort_protection(ctx);
            }
        }
    }

    /// Before the claim: the standby is let go, and outputs are free again.
    pub(super) fn abort_protection(&mut self, ctx: &mut Context<'_>) {
        let Some(link) = self.link.take() else { return };
        assert!(
            !link.may_compete(),
            "a standby that may compete is not let go"
        );
        if matches!(
            link.stage,
            Stage::Holding | Stage::Confirming { .. } | Stage::Confirmed
        ) {
            ctx.act(Action::Gate(GateMode::Open));
        }
        self.end_session(ctx, &link);
        self.standbys.failed(ctx, link.peer);
    }

    /// The backup is lost: nothing goes out until an epoch without it is won. There is no way back
    /// into the session (R13).
    pub(super) fn go_alone(&mut self, ctx: &mut Context<'_>) {
        let Some(link) = self.link.take() else { return };
        ctx.act(Action::Gate(GateMode::Shut));
        self.end_session(ctx, &link);
        self.standbys.failed(ctx, link.peer);
        self.phase = Phase::GoingAlone;
        self.renew = false;
    }

    fn end_session(&mut self, ctx: &mut Context<'_>, link: &Link) {
        ctx.act(Action::EndSession(link.session));
        if !matches!(link.stage, Stage::Joining { .. }) {
            ctx.act(Action::Unwatch);
        }
        self.dropped = Some((link.peer, link.session));
        self.goodbye = Resend::NOW;
    }

    /// Goes one step further towards protection, where it can.
    pub(super) fn drive_protection(&mut self, ctx: &mut Context<'_>) {
        if !matches!(self.phase, Phase::Running) {
            return;
        }
        self.pick_standby(ctx);
        self.repeat_messages(ctx);
        let appends = ctx.timings().caught_up_appends;
        let Some(link) = &mut self.link else { return };
        match link.stage {
            Stage::Joining { until } if until <= ctx.now => {
                self.give_link_up(ctx, Cause::GaveUp, "no answer".to_owned());
            }
            Stage::Transferring if link.caught_up(appends) => {
                if canary::on(Canary::EligibleBeforeHold) {
                    link.stage = Stage::Confirmed;
                    return;
                }
                link.stage = Stage::Holding;
                let session = link.session;
                ctx.act(Action::Gate(GateMode::Holding(session)));
            }
            _ => {}
        }
    }

    /// Whether a backup is looked for.
    fn looks_for_standby(&self) -> bool {
        matches!(self.phase, Phase::Running)
            && self.link.is_none()
            && self.standbys.wanted
            && self.errand == Errand::None
            && self.record.quarantine.has_room()
    }

    fn pick_standby(&mut self, ctx: &mut Context<'_>) {
        if !self.looks_for_standby() {
            return;
        }
        let Some(standby) = self.standbys.next(ctx.now) else {
            return;
        };
        let session = ctx.core.nonces.session();
        ctx.notice(Notice::ProtectionStarting(standby));
        self.link = Some(Link::new(ctx, standby, session));
        if self.dropped.is_some_and(|(host, _)| host == standby) {
            self.dropped = None;
        }
    }

    fn repeat_messages(&mut self, ctx: &mut Context<'_>) {
        let timings = ctx.timings();
        let epoch = self.record.epoch;
        let Some(link) = &mut self.link else { return };
        let (to, session) = (link.peer, link.session);
        if link.resend.due(ctx.now, timings.resend) {
            match link.stage {
                Stage::Joining { .. } => {
                    let fingerprint = ctx.core.config.fingerprint.clone();
                    ctx.send(
                        to,
                        PeerMessage::Join {
                            session,
                            epoch,
                            fingerprint,
                        },
                    );
                }
                Stage::Confirming { upto } => {
                    ctx.send(to, PeerMessage::Confirm { session, upto });
                }
                _ => link.resend = Resend::OFF,
            }
        }
        if link.progress.due(ctx.now, timings.progress) {
            let (named, released) = (link.is_backup(), link.released);
            ctx.send(
                to,
                PeerMessage::Progress {
                    session,
                    epoch,
                    named,
                    released,
                },
            );
        }
    }

    pub(super) fn protection_deadline(&self) -> Option<Time> {
        let at = self.standbys.next_deadline();
        at.filter(|_| self.looks_for_standby())
    }
}
