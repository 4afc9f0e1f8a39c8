//! What the primary does on purpose: a planned switch-over, power-off, control operations.
//!
//! ```text
//!   switch-over:  Quiescing ─► Draining (the log is acknowledged) ─► Asked ─► superseded
//!                                                                     └─time-out─► alone, resumed
//!   power-off:    Quiescing ─► Quiet (the log is acknowledged, or nobody is there) ─► record closed
//! ```
//! One at a time; a power-off takes over from a switch-over.

use format::Seq;

use crate::action::{Action, Notice};
use crate::context::{Context, Resend, earliest};
use crate::detector::Cause;
use crate::event::{Command, Quiesce};
use crate::peer::{PeerMessage, Relief};
use crate::time::Time;

use super::link::Link;
use super::{Phase, Primary};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Errand {
    None,
    /// The guest is brought to rest.
    Quiescing(Quiesce),
    /// Switch-over: the end of the log is to be acknowledged.
    Draining {
        end: Seq,
    },
    /// Switch-over: the backup is asked to take over.
    Asked {
        end: Seq,
        until: Time,
        again: Resend,
    },
    /// Power-off: all is quiet.
    Quiet {
        end: Seq,
    },
}

impl Errand {
    pub(super) fn quiesced(&mut self, why: Quiesce, end: Seq) {
        if *self == Self::Quiescing(why) {
            *self = match why {
                Quiesce::SwitchOver => Self::Draining { end },
                Quiesce::PowerOff => Self::Quiet { end },
            };
        }
    }

    /// Whether the record may be closed: the guest is at rest, and whoever may take over knows it.
    pub(super) fn may_close(&self, link: Option<&Link>) -> bool {
        match (self, link) {
            (Self::Quiet { .. }, None) => true,
            (Self::Quiet { end }, Some(link)) => link.is_backup() && link.acked(*end),
            _ => false,
        }
    }

    fn is_switch_over(&self) -> bool {
        matches!(
            self,
            Self::Quiescing(Quiesce::SwitchOver) | Self::Draining { .. } | Self::Asked { .. }
        )
    }

    pub(super) fn next_deadline(&self) -> Option<Time> {
        match self {
            Self::Asked { until, again, .. } => earliest([Some(*until), again.at()]),
            _ => None,
        }
    }
}

impl Primary {
    pub(super) fn command(&mut self, ctx: &mut Context<'_>, command: Command) {
        match command {
            Command::Protect => {
                self.standbys.wanted = true;
                self.standbys.at_once();
            }
            Command::Unprotect => {
                self.standbys.wanted = false;
                self.give_link_up(ctx, Cause::Operator, "unprotected".to_owned());
            }
            Command::Fail if self.link.is_none() => {
                ctx.notice(Notice::CommandRefused("there is no backup to lose"));
            }
            Command::Fail => self.give_link_up(ctx, Cause::Operator, "a drill".to_owned()),
            Command::SwitchOver => self.switch_over(ctx),
            Command::Control(op, data) => {
                if matches!(self.phase, Phase::Running) && self.errand == Errand::None {
                    ctx.act(Action::Inject(op, data));
                } else {
                    ctx.notice(Notice::CommandRefused("the guest is not running"));
                }
            }
            Command::HostGone(host) => self.fold.gone(host),
            Command::ForceStart(_) => ctx.notice(Notice::CommandRefused("it is running")),
        }
    }

    fn switch_over(&mut self, ctx: &mut Context<'_>) {
        let ready = matches!(self.phase, Phase::Running)
            && self.errand == Errand::None
            && self.link.as_ref().is_some_and(Link::is_backup);
        if ready {
            self.errand = Errand::Quiescing(Quiesce::SwitchOver);
            ctx.act(Action::Quiesce(Quiesce::SwitchOver));
            return;
        }
        let why = if self.errand == Errand::None {
            "there is no backup to switch to"
        } else {
            "the guest is being brought to rest already"
        };
        ctx.notice(Notice::CommandRefused(why));
    }

    /// The guest is off: the VM is to be closed in order.
    pub(super) fn guest_off(&mut self, ctx: &mut Context<'_>) {
        if matches!(
            self.errand,
            Errand::Quiescing(Quiesce::PowerOff) | Errand::Quiet { .. }
        ) {
            return;
        }
        self.errand = Errand::Quiescing(Quiesce::PowerOff);
        ctx.act(Action::Quiesce(Quiesce::PowerOff));
    }

    pub(super) fn errand_after_going_alone(&mut self, ctx: &mut Context<'_>) {
        if self.errand.is_switch_over() {
            self.errand = Errand::None;
            ctx.act(Action::Resume);
        }
    }

    pub(super) fn drive_errand(&mut self, ctx: &mut Context<'_>) {
        let before_claim = self.link.as_ref().is_some_and(|link| !link.may_compete());
        if before_claim && matches!(self.errand, Errand::Quiescing(_) | Errand::Quiet { .. }) {
            self.abort_protection(ctx);
        }
        self.ask_for_relief(ctx);
        let timings = ctx.timings();
        let backup = self
            .link
            .as_ref()
            .filter(|link| link.is_backup())
            .map(|link| (link.peer, link.session));
        let Some((to, session)) = backup else { return };
        if let Errand::Draining { end } = self.errand
            && self.link.as_ref().is_some_and(|link| link.acked(end))
        {
            self.errand = Errand::Asked {
                end,
                until: ctx.now.after(timings.handover),
                again: Resend::NOW,
            };
        }
        let Errand::Asked { end, until, again } = &mut self.errand else {
            return;
        };
        if *until <= ctx.now {
            self.give_link_up(ctx, Cause::GaveUp, "it did not take over".to_owned());
        } else if again.due(ctx.now, timings.resend) {
            let why = Relief::SwitchOver { end: *end };
            ctx.send(to, PeerMessage::TakeOver { session, why });
        }
    }

    /// The storage is out of reach from here: perhaps it is not from there.
    fn ask_for_relief(&mut self, ctx: &mut Context<'_>) {
        let every = ctx.timings().query;
        let backup = self.link.as_ref().filter(|link| link.is_backup());
        let to = backup.map(|link| (link.peer, link.session));
        if let (Some(again), Some((to, session))) = (&mut self.storage_lost, to)
            && again.due(ctx.now, every)
        {
            let why = Relief::StorageLost;
            ctx.send(to, PeerMessage::TakeOver { session, why });
        }
    }
}
