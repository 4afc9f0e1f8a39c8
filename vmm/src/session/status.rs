//! A session's status, and what it notes of a failover for that.

use std::net::SocketAddr;
use std::time::Instant;

use ft::HostId;

use super::driver::Session;
use crate::api::{Failover, Part, StandbyReport, StatusReport, unix_ms};

/// A failover that is under way or done. Parts are in ms from when the loss was noticed.
#[derive(Debug, Clone)]
pub struct FailoverNotes {
    cause: String,
    at_unix_ms: u64,
    noticed: Instant,
    parts: Vec<Part>,
}

impl FailoverNotes {
    /// The peer was lost just now.
    pub fn begin(cause: &str) -> Self {
        Self {
            cause: cause.to_owned(),
            at_unix_ms: unix_ms(),
            noticed: Instant::now(),
            parts: Vec::new(),
        }
    }

    /// A part is done.
    pub fn mark(&mut self, name: &str) {
        let ms = self.noticed.elapsed().as_secs_f64() * 1e3;
        self.parts.push(Part {
            name: name.to_owned(),
            ms,
        });
    }

    /// The report, once the VM has run here.
    pub fn report(&self) -> Failover {
        Failover {
            cause: self.cause.clone(),
            at_unix_ms: self.at_unix_ms,
            total_ms: self.parts.last().map_or(0.0, |part| part.ms),
            timeline: self.parts.clone(),
        }
    }
}

impl Session {
    /// How things stand.
    pub(super) fn report(&mut self) -> StatusReport {
        let status = self.replica.status();
        let mut report = StatusReport {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            role: status.role.into(),
            state: status.state.to_owned(),
            paused: self.paused,
            host: Some(self.settings.ft.me),
            epoch: status.epoch.map(|epoch| epoch.0),
            peer: status.peer,
            protected: status.protected,
            standbys: self.standbys(&status),
            last_failover: self.failover.as_ref().map(FailoverNotes::report),
            last_transfer: self.transfer.clone(),
            divergences: self.divergences,
            quarantine: status.quarantine,
            uptime_s: self.started.elapsed().as_secs_f64(),
            limits: self.limits,
            heartbeats: Some(self.beats.report()),
            ..StatusReport::default()
        };
        report.advice.extend(self.blocked.clone());
        report.advice.extend(self.idle.advice());
        report.advice.extend(self.beats.advice());
        self.leader.report(&mut report);
        self.follower.report(&mut report);
        let (at, bytes, _) = self.rate;
        let (seconds, now) = (at.elapsed().as_secs_f64(), self.leader.log_bytes());
        if seconds >= 0.1 {
            let moved = now.saturating_sub(bytes) as f64;
            self.rate = (Instant::now(), now, moved * 8.0 / 1e6 / seconds);
        }
        report.log_mbit_s = self.rate.2;
        report
    }

    fn standbys(&self, status: &ft::Status) -> Vec<StandbyReport> {
        let report = |(host, addresses): &(HostId, Vec<SocketAddr>)| StandbyReport {
            host: *host,
            address: addresses
                .first()
                .map(ToString::to_string)
                .unwrap_or_default(),
            state: match (status.peer == Some(*host), status.protected) {
                (true, true) => "in the pair".to_owned(),
                (true, false) => "joining".to_owned(),
                (false, _) => "known".to_owned(),
            },
        };
        self.settings.ft.standbys.iter().map(report).collect()
    }
}
