//! What every machine of a replica needs while it handles one event.

use format::Epoch;

use crate::action::{Action, Actions, Notice};
use crate::arbiter::{ArbiterRequest, CallId};
use crate::config::{Config, Timings};
use crate::detector::FailureDetector;
use crate::names::{HostId, Incarnation, Nonce, NonceSource};
use crate::peer::{Holds, PeerMessage};
use crate::time::Time;

/// What outlives roles.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) config: Config,
    pub(crate) nonces: NonceSource,
    calls: u64,
}

impl Core {
    pub(crate) fn new(config: Config, incarnation: Incarnation) -> Self {
        Self {
            config,
            nonces: NonceSource::new(incarnation),
            calls: 0,
        }
    }
}

/// One event's surroundings.
#[derive(Debug)]
pub(crate) struct Context<'a> {
    pub(crate) now: Time,
    pub(crate) core: &'a mut Core,
    pub(crate) out: &'a mut Actions,
}

impl Context<'_> {
    pub(crate) fn act(&mut self, action: Action) {
        self.out.push(action);
    }

    pub(crate) fn notice(&mut self, notice: Notice) {
        self.out.push(Action::Notice(notice));
    }

    pub(crate) fn send(&mut self, to: HostId, message: PeerMessage) {
        self.out.push(Action::Send { to, message });
    }

    pub(crate) fn ask(&mut self, request: ArbiterRequest) -> CallId {
        self.core.calls += 1;
        let call = CallId(self.core.calls);
        self.out.push(Action::Arbiter { call, request });
        call
    }

    pub(crate) fn me(&self) -> HostId {
        self.core.config.me
    }

    pub(crate) fn timings(&self) -> Timings {
        self.core.config.timings
    }

    pub(crate) fn reply_holds(&mut self, to: HostId, nonce: Nonce, holds: Holds) {
        self.send(to, PeerMessage::StateReply { nonce, holds });
    }

    /// Lets a detector run: sends its due probe.
    pub(crate) fn drive(&mut self, peer: HostId, detector: &mut FailureDetector) {
        detector.tick(self.now);
        if let Some(probe) = detector.due_probe(self.now) {
            self.act(Action::Probe { peer, probe });
        }
    }
}

/// A message that is sent again until something happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Resend(Option<Time>);

impl Resend {
    /// Due at once.
    pub(crate) const NOW: Self = Self(Some(Time(0)));
    /// Never due.
    pub(crate) const OFF: Self = Self(None);

    /// Whether it is due; if so it is due again after `every`.
    pub(crate) fn due(&mut self, now: Time, every: std::time::Duration) -> bool {
        let due = self.0.is_some_and(|at| at <= now);
        if due {
            self.0 = Some(now.after(every));
        }
        due
    }

    pub(crate) fn at(self) -> Option<Time> {
        self.0
    }
}

/// The earliest of some deadlines.
pub(crate) fn earliest(deadlines: impl IntoIterator<Item = Option<Time>>) -> Option<Time> {
    deadlines.into_iter().flatten().min()
}

/// A host and the epoch in which it spoke as primary, as proof that a newer one exists.
pub(crate) fn newer(mine: Epoch, theirs: Option<Epoch>) -> bool {
    theirs.is_some_and(|theirs| theirs > mine)
}
