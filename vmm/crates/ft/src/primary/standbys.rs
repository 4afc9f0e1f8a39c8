//! The list of hosts that may become the backup, with a back-off for those that failed.

use std::time::Duration;

use crate::context::Context;
use crate::names::HostId;
use crate::time::Time;

/// Who is tried next, and when.
#[derive(Debug)]
pub(super) struct Standbys {
    list: Vec<Standby>,
    /// Whether a backup is wanted.
    pub(super) wanted: bool,
}

#[derive(Debug)]
struct Standby {
    host: HostId,
    at: Time,
    wait: Duration,
    /// Since when it has been the backup.
    since: Option<Time>,
}

impl Standbys {
    pub(super) fn new(ctx: &Context<'_>) -> Self {
        let standby = |host: &HostId| Standby {
            host: *host,
            at: ctx.now,
            wait: Duration::ZERO,
            since: None,
        };
        Self {
            list: ctx.core.config.standbys.iter().map(standby).collect(),
            wanted: ctx.core.config.protect,
        }
    }

    /// Among the hosts whose back-off is over, the one that failed least; the first in the order of
    /// preference where several did.
    pub(super) fn next(&self, now: Time) -> Option<HostId> {
        let ready = self.list.iter().filter(|standby| standby.at <= now);
        let best = ready.min_by_key(|standby| standby.wait);
        best.map(|standby| standby.host)
    }

    /// `host` failed: it is left alone for a while, twice as long as the last time, unless it was the backup in
    /// between for at least twice as long as it had been left alone. So one that fails at once is asked ever
    /// more seldom, and one that holds for a while is asked again soon each time.
    pub(super) fn failed(&mut self, ctx: &Context<'_>, host: HostId) {
        let timings = ctx.timings();
        if let Some(standby) = self.list.iter_mut().find(|standby| standby.host == host) {
            let held = standby.since.take().map(|since| ctx.now.since(since));
            if held.is_some_and(|held| held >= 2 * standby.wait) {
                standby.wait = Duration::ZERO;
            }
            standby.wait = (standby.wait * 2)
                .max(timings.standby_retry)
                .min(timings.standby_retry_most);
            standby.at = ctx.now.after(standby.wait);
        }
    }

    /// `host` is the backup now.
    pub(super) fn succeeded(&mut self, ctx: &Context<'_>, host: HostId) {
        if let Some(standby) = self.list.iter_mut().find(|standby| standby.host == host) {
            standby.since = Some(ctx.now);
        }
    }

    /// Everybody may be tried at once.
    pub(super) fn at_once(&mut self) {
        for standby in &mut self.list {
            standby.at = Time(0);
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Time> {
        self.list.iter().map(|standby| standby.at).min()
    }
}
