//! What a session says about itself: to people, to the API, to tests.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Events kept for those who ask later.
const MAX_EVENTS: usize = 1000;

/// The state of a VM on this host.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StatusReport {
    /// `booting`, `primary`, `backup`, `leaving` or `ended`.
    pub role: String,
    /// The protocol's state within the role.
    pub state: String,
    /// This host.
    pub host: String,
    /// The newest epoch known here.
    pub epoch: Option<u64>,
    /// The other host of the session.
    pub peer: Option<String>,
    /// On a primary: a backup could take over. On a backup: it could.
    pub protected: bool,
    /// How far the backup is behind.
    pub lag: LagReport,
    /// What the output gate holds.
    pub output: OutputReport,
    /// Log bytes of the session so far.
    pub log_bytes: u64,
    /// Log rate since the last report, in Mbit/s.
    pub log_mbit_s: f64,
    /// Exits of the machine here.
    pub exits: u64,
    /// Virtual time in s.
    pub virtual_time_s: f64,
    /// The last failover that made this host the primary.
    pub last_failover: Option<FailoverReport>,
    /// The last state transfer from this host.
    pub last_transfer: Option<TransferReport>,
    /// Replicas that diverged, as far as this process knows.
    pub divergences: u64,
    /// Sectors are under quarantine.
    pub quarantine: bool,
    /// How long this process has run, in s.
    pub uptime_s: f64,
}

/// Lag of the backup.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct LagReport {
    /// Appends that are not replayed.
    pub appends: u64,
    /// Appends that are not acknowledged.
    pub unacknowledged: u64,
}

/// The output gate.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct OutputReport {
    /// Effects held.
    pub held: u64,
    /// Age of the oldest, in ms.
    pub oldest_ms: f64,
    /// Effects released so far.
    pub released: u64,
}

/// A failover, part by part, in ms from when the loss was noticed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct FailoverReport {
    /// Why.
    pub cause: String,
    /// When it was noticed, in s since 1970.
    pub at_unix_s: f64,
    /// The log was fixed: no acknowledgement left any more.
    pub closed_ms: f64,
    /// The log was replayed to its end.
    pub drained_ms: f64,
    /// The epoch was won.
    pub won_ms: f64,
    /// The VM ran.
    pub live_ms: f64,
}

/// A state transfer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct TransferReport {
    /// How long the VM stood still, in ms.
    pub stop_ms: f64,
    /// How long the state streamed, in ms.
    pub total_ms: f64,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EventRecord {
    /// Counts from 0.
    pub number: u64,
    /// When, in s since 1970.
    pub at_unix_s: f64,
    /// What, in one word.
    pub event: String,
    /// What, for people.
    pub text: String,
}

/// The newest events.
#[derive(Debug, Default)]
pub struct EventLog {
    records: VecDeque<EventRecord>,
    next: u64,
}

impl EventLog {
    /// Adds an event and returns its record.
    pub fn add(&mut self, event: &str, text: String) -> EventRecord {
        let record = EventRecord {
            number: self.next,
            at_unix_s: crate::vm::wall_ns() as f64 / 1e9,
            event: event.to_owned(),
            text,
        };
        self.next += 1;
        if self.records.len() == MAX_EVENTS {
            self.records.pop_front();
        }
        self.records.push_back(record.clone());
        record
    }

    /// The newest events, oldest first.
    pub fn recent(&self) -> Vec<EventRecord> {
        self.records.iter().cloned().collect()
    }
}
