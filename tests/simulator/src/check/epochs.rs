//! Epochs: who owns one, what its record says, and who gives one up.

use format::{Epoch, SessionId};
use ft::{EpochRecord, GateMode, GoLive, HostId, Leave, RoleName, Status, Tenure};

use crate::sim::Sim;

use super::Checker;

impl Checker {
    /// A process claims an epoch.
    pub(crate) fn claims(&mut self, inc: u32, host: HostId, record: &EpochRecord) {
        self.claims.insert(record.nonce, (inc, host));
    }

    /// The process that a record gives its epoch to: the one that made it, or, where another host made it
    /// in the owner's name, the one that has the epoch before.
    pub(crate) fn holder(&self, record: &EpochRecord) -> Option<u32> {
        let (inc, host) = self.claims.get(&record.nonce)?;
        if *host == record.owner {
            return Some(*inc);
        }
        let before = self.records.get(&Epoch(record.epoch.0.checked_sub(1)?))?;
        self.holder(before)
    }

    /// A record comes to stand.
    pub(crate) fn recorded(&mut self, epoch: Epoch, record: Option<EpochRecord>) -> Option<String> {
        let record = record?;
        if let Some(known) = self.records.get(&epoch)
            && known.nonce != record.nonce
        {
            return Some(format!(
                "epoch {epoch} is recorded a second time, for {}",
                record.owner
            ));
        }
        let before = Epoch(epoch.0.saturating_sub(1));
        if let Some(base) = self.records.get(&before) {
            let may = match base.tenure {
                Tenure::Closed => true,
                Tenure::Alone => base.owner == record.owner,
                Tenure::Pair { backup, .. } => base.owner == record.owner || backup == record.owner,
            };
            if !may && !self.forced.contains(&before) {
                return Some(format!(
                    "{} has made epoch {epoch}, which the record before does not allow",
                    record.owner
                ));
            }
        }
        self.records.insert(epoch, record);
        None
    }

    /// A replica went from one state to another.
    pub(crate) fn moved(
        &mut self,
        now: u64,
        host: usize,
        inc: u32,
        before: &Status,
        after: &Status,
    ) {
        let drained = ["draining", "arbitrating"].contains(&before.state);
        if drained && before.role == RoleName::Backup && after.state == "following" {
            self.violated(
                "resumed",
                now,
                format_args!("host{host} follows again after it began to drain"),
            );
        }
        if after.role != RoleName::Primary || after.epoch == before.epoch {
            return;
        }
        let Some(epoch) = after.epoch else { return };
        let other = self.owners.insert(epoch, inc).filter(|other| *other != inc);
        if let Some(other) = other {
            self.violated(
                "two primaries",
                now,
                format_args!("VMM {inc} on host{host} owns epoch {epoch}, as VMM {other} does"),
            );
        }
        let stands = self.records.get(&epoch);
        if stands.and_then(|record| self.holder(record)) != Some(inc) {
            self.violated(
                "not won",
                now,
                format_args!(
                    "VMM {inc} on host{host} acts in epoch {epoch}, whose record is another's"
                ),
            );
        }
    }

    pub(crate) fn closed(&mut self, inc: u32, session: SessionId) {
        self.closed.push((inc, session));
    }

    pub(crate) fn follows(&mut self, now: u64, inc: u32, session: SessionId) {
        if self.closed.contains(&(inc, session)) {
            self.violated(
                "resumed",
                now,
                format_args!("VMM {inc} takes the log of a session that it closed"),
            );
        }
    }
}

impl Sim {
    /// An effect leaves a gate.
    pub(crate) fn check_release(&mut self, host: usize, mode: GateMode, needs: u64) {
        let now = self.time();
        match mode {
            GateMode::Holding(session) => self.checker().held_release(now, host, session, needs),
            GateMode::Open => {
                let newest = self.newest_record();
                let named = newest.filter(|record| matches!(record.tenure, Tenure::Pair { .. }));
                let mine = self.host_name(host);
                if named.is_some_and(|record| record.owner == mine) && self.acts(host) {
                    let what = "lets everything out, although a backup may take its place";
                    self.checker().violated(
                        "released unacknowledged",
                        now,
                        format_args!("host{host} {what}"),
                    );
                }
            }
            GateMode::Shut => {
                self.checker().violated(
                    "released unacknowledged",
                    now,
                    format_args!("host{host} has a shut gate"),
                );
            }
        }
    }

    /// A VM is started anew: nobody may be able to go on with the old one.
    pub(crate) fn check_cold_start(&mut self, host: usize, inc: u32, go: &GoLive) {
        let before = Epoch(go.record.epoch.0.saturating_sub(1));
        let now = self.time();
        let Some(base) = self.checker().records.get(&before).cloned() else {
            return;
        };
        let Some(other) = self.who_could_go_on(&base, inc) else {
            return;
        };
        let what = format_args!("host{host} starts the VM anew, although host{other} holds it");
        self.checker().violated("cold start", now, what);
    }

    /// A replica drops its state: it must not be the one that the newest record speaks of.
    pub(crate) fn check_discard(&mut self, host: usize, inc: u32, leave: &Leave) {
        let now = self.time();
        if matches!(
            leave,
            Leave::PoweredOff | Leave::Diverged | Leave::LoadFailed
        ) {
            return;
        }
        let Some(newest) = self.newest_record() else {
            return;
        };
        let own = self.checker().holder(&newest) == Some(inc);
        let named = match newest.tenure {
            Tenure::Pair { backup, session } => {
                backup == self.host_name(host) && self.follows_session(host, session)
            }
            _ => false,
        };
        if (own && newest.tenure != Tenure::Closed) || named {
            let what = format_args!(
                "host{host} gives up ({leave:?}) the VM that the newest record gives it"
            );
            self.checker().violated("thrown away", now, what);
        }
    }
}
