//! A replica: this host's part in keeping one VM running, whatever its role is at the moment.
//!
//! ```text
//!   Booting ──Won──► Primary ──lost its epoch──► Leaving ──Discarded──► Backup (empty)
//!     │                 ▲                        ▲ ▲  └──powered off──► Ended
//!     │                 └── Promote ── Backup ───┘ │
//!     └──another host runs the VM, and asks────────┘
//! ```
//! Owner of the role. It hands every event to the role, then lets it draw its conclusions, and
//! changes roles; the rules are the roles' own.

use format::{Epoch, Seq};

use crate::action::{Action, Actions, Leave, Notice, Origin};
use crate::backup::{Backup, Step};
use crate::boot::Boot;
use crate::config::Config;
use crate::context::{Context, Core};
use crate::event::{Command, Event};
use crate::names::{HostId, Incarnation};
use crate::peer::{Holds, PeerMessage};
use crate::primary::Primary;
use crate::record::EpochRecord;
use crate::time::Time;

/// The protocol of one VM on one host.
#[derive(Debug)]
pub struct Replica {
    core: Core,
    role: Role,
}

#[derive(Debug)]
enum Role {
    Booting(Box<Boot>),
    Primary(Box<Primary>),
    Backup(Box<Backup>),
    /// Giving everything up; `was_primary` tells whether there may be I/O.
    Leaving {
        leave: Leave,
        was_primary: bool,
    },
    Ended,
}

/// What a person, a metric or a test wants to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// The role.
    pub role: RoleName,
    /// The state within it, for people.
    pub state: &'static str,
    /// The newest epoch that this replica knows of.
    pub epoch: Option<Epoch>,
    /// The other host of the session.
    pub peer: Option<HostId>,
    /// On the primary: whether a backup is named. On a backup: whether it could take over.
    pub protected: bool,
    /// Sectors are under quarantine.
    pub quarantine: bool,
}

/// A role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RoleName {
    /// Wants to start the VM.
    Booting,
    /// Acts on the world.
    Primary,
    /// Waits for work, or follows a primary.
    Backup,
    /// Gives everything up.
    Leaving,
    /// Has nothing left to do.
    Ended,
}

impl Replica {
    /// A replica that is to start the VM: first boot, restore or cold start. The driver has made sure
    /// that it is the only process of this VM on this host, and that I/O of earlier ones is over.
    #[must_use]
    pub fn boot(config: Config, incarnation: Incarnation) -> Self {
        Self::with(config, incarnation, Role::Booting(Box::new(Boot::new())))
    }

    /// A standby that waits for work. The driver has made sure of the same.
    #[must_use]
    pub fn standby(config: Config, incarnation: Incarnation) -> Self {
        Self::with(config, incarnation, Role::Backup(Box::default()))
    }

    fn with(config: Config, incarnation: Incarnation, role: Role) -> Self {
        Self {
            core: Core::new(config, incarnation),
            role,
        }
    }

    /// Takes one event at `now`, which never goes back, and says what to do in `out`. The driver does
    /// all of it, in order, before it brings the next event; waiting for it to take effect is not
    /// needed.
    pub fn handle(&mut self, now: Time, event: Event, out: &mut Actions) {
        let mut ctx = Context {
            now,
            core: &mut self.core,
            out,
        };
        let next = match self.role.handle(&mut ctx, event) {
            None => self.role.poll(&mut ctx),
            next => next,
        };
        if let Some(next) = next {
            self.role = next;
            // A new role may have something to do at once.
            let after = self.role.poll(&mut ctx);
            assert!(after.is_none(), "a role does not end where it begins");
        }
    }

    /// When to bring [`Event::Tick`] at the latest.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        match &self.role {
            Role::Booting(boot) => boot.next_deadline(),
            Role::Primary(primary) => primary.next_deadline(),
            Role::Backup(backup) => backup.next_deadline(),
            Role::Leaving { .. } | Role::Ended => None,
        }
    }

    /// Where it stands.
    #[must_use]
    pub fn status(&self) -> Status {
        let (role, state) = match &self.role {
            Role::Booting(boot) => (RoleName::Booting, boot.stage_name()),
            Role::Primary(primary) => (RoleName::Primary, primary.state_name()),
            Role::Backup(backup) => (RoleName::Backup, backup.state_name()),
            Role::Leaving { .. } => (RoleName::Leaving, "leaving"),
            Role::Ended => (RoleName::Ended, "ended"),
        };
        Status {
            role,
            state,
            epoch: self.epoch(),
            peer: match &self.role {
                Role::Primary(primary) => primary.peer(),
                Role::Backup(backup) => backup.peer(),
                _ => None,
            },
            protected: match &self.role {
                Role::Primary(primary) => primary.is_protected(),
                Role::Backup(backup) => backup.may_take_over(),
                _ => false,
            },
            quarantine: self
                .record()
                .is_some_and(|record| !record.quarantine.is_empty()),
        }
    }

    fn epoch(&self) -> Option<Epoch> {
        match &self.role {
            Role::Backup(backup) => backup.epoch(),
            _ => self.record().map(|record| record.epoch),
        }
    }

    /// On a backup: the primary has released the effects of everything below, as far as it has told.
    #[must_use]
    pub fn released(&self) -> Option<Seq> {
        match &self.role {
            Role::Backup(backup) => backup.released(),
            _ => None,
        }
    }

    /// The record that a primary acts by.
    #[must_use]
    pub fn record(&self) -> Option<&EpochRecord> {
        match &self.role {
            Role::Primary(primary) => Some(primary.record()),
            _ => None,
        }
    }
}

impl Role {
    /// Returns the next role, if this one ends.
    fn handle(&mut self, ctx: &mut Context<'_>, event: Event) -> Option<Self> {
        match self {
            Self::Booting(boot) => {
                let won = match event {
                    Event::Arbiter { call, reply } => boot.arbiter(ctx, call, reply),
                    Event::Command(Command::ForceStart(epoch)) => boot.force(ctx, epoch),
                    Event::Command(Command::HostGone(host)) => boot.host_gone(ctx, host),
                    Event::Command(_) => {
                        ctx.notice(Notice::CommandRefused("the VM has not started yet"));
                        None
                    }
                    Event::Peer {
                        from,
                        message: PeerMessage::Join { epoch, .. },
                    } if boot.is_overtaken(from, epoch) => {
                        // It asks again, and then finds a standby.
                        return Some(Self::leave(ctx, Leave::Superseded, false));
                    }
                    Event::Peer { from, message } => match message {
                        PeerMessage::StateReply { nonce, holds } => {
                            boot.state_reply(ctx, from, nonce, holds)
                        }
                        PeerMessage::StateQuery { nonce, .. } => {
                            let holds = boot.holds();
                            ctx.reply_holds(from, nonce, holds);
                            None
                        }
                        _ => None,
                    },
                    _ => None,
                };
                won.map(|record| Self::cold(ctx, record))
            }
            Self::Primary(primary) => {
                let verdict = primary.handle(ctx, event);
                verdict.err().map(|leave| Self::leave(ctx, leave, true))
            }
            Self::Backup(backup) => {
                let step = backup.handle(ctx, event);
                Self::after(ctx, step)
            }
            Self::Leaving { leave, was_primary } => match event {
                Event::Discarded => Some(match leave {
                    Leave::PoweredOff => {
                        ctx.act(Action::End(leave.clone()));
                        Self::Ended
                    }
                    _ => Self::Backup(Box::default()),
                }),
                Event::Peer {
                    from,
                    message: PeerMessage::StateQuery { nonce, .. },
                } => {
                    let holds = Holds {
                        state: true,
                        writes: *was_primary,
                    };
                    ctx.reply_holds(from, nonce, holds);
                    None
                }
                Event::Command(_) => {
                    ctx.notice(Notice::CommandRefused("this host is giving its role up"));
                    None
                }
                _ => None,
            },
            Self::Ended => {
                if let Event::Peer {
                    from,
                    message: PeerMessage::StateQuery { nonce, .. },
                } = event
                {
                    ctx.reply_holds(from, nonce, Holds::NOTHING);
                }
                None
            }
        }
    }

    fn poll(&mut self, ctx: &mut Context<'_>) -> Option<Self> {
        match self {
            Self::Booting(boot) => boot.poll(ctx).map(|record| Self::cold(ctx, record)),
            Self::Primary(primary) => {
                let verdict = primary.poll(ctx);
                verdict.err().map(|leave| Self::leave(ctx, leave, true))
            }
            Self::Backup(backup) => {
                let step = backup.poll(ctx);
                Self::after(ctx, step)
            }
            Self::Leaving { .. } | Self::Ended => None,
        }
    }

    fn cold(ctx: &mut Context<'_>, record: EpochRecord) -> Self {
        Self::Primary(Box::new(Primary::start(ctx, record, Origin::Cold, false)))
    }

    fn after(ctx: &mut Context<'_>, step: Step) -> Option<Self> {
        match step {
            Step::Stay => None,
            Step::Leave(leave) => {
                ctx.act(Action::Unwatch);
                Some(Self::leave(ctx, leave, false))
            }
            Step::Promote(won) => {
                let origin = Origin::TakeOver {
                    session: won.session,
                    released: won.released,
                    cause: won.cause,
                };
                let primary = Primary::start(ctx, won.record, origin, won.guest_off);
                Some(Self::Primary(Box::new(primary)))
            }
        }
    }

    fn leave(ctx: &mut Context<'_>, leave: Leave, was_primary: bool) -> Self {
        ctx.notice(Notice::Leaving(leave.clone()));
        ctx.act(Action::Discard(leave.clone()));
        Self::Leaving { leave, was_primary }
    }
}
