//! What happened, in its order: kept for a while, logged, and told to everybody who listens.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::sync::broadcast;

use super::control::Subscription;

/// How many events are kept for those who ask later.
pub const RECENT_EVENTS: usize = 256;
/// How many events may wait for one listener; one that is slower misses the oldest.
pub const WAITING_EVENTS: usize = 256;

/// How bad an event is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// As it should be.
    Info,
    /// Something is lost or wrong; the VM goes on.
    Warning,
    /// The VM stands still, or somebody has to do something.
    Error,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// How bad it is.
    pub severity: Severity,
    /// A stable name, for machines.
    pub kind: &'static str,
    /// What happened, for people.
    pub message: String,
    /// Particulars, for machines.
    pub details: Map<String, Value>,
}

impl Event {
    /// An event without particulars.
    #[must_use]
    pub fn new(severity: Severity, kind: &'static str, message: impl Into<String>) -> Self {
        Self {
            severity,
            kind,
            message: message.into(),
            details: Map::new(),
        }
    }

    /// The same with a particular.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.details.insert(name.to_owned(), value.into());
        self
    }
}

/// An event as it is told: one JSON object a line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EventRecord {
    /// Its number in this process, from 1, without gaps.
    pub number: u64,
    /// When, in ms since 1970 (UTC) by this host's clock.
    pub at_unix_ms: u64,
    /// How bad it is.
    pub severity: Severity,
    /// A stable name.
    pub kind: String,
    /// What happened, for people.
    pub message: String,
    /// Particulars.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub details: Map<String, Value>,
}

/// The events of a process.
#[derive(Debug)]
pub struct EventLog {
    recent: Mutex<Recent>,
    sender: broadcast::Sender<EventRecord>,
}

#[derive(Debug, Default)]
struct Recent {
    last: u64,
    events: VecDeque<EventRecord>,
}

impl Default for EventLog {
    fn default() -> Self {
        Self {
            recent: Mutex::default(),
            sender: broadcast::channel(WAITING_EVENTS).0,
        }
    }
}

impl EventLog {
    /// Numbers an event, keeps it, logs it and tells it. Never waits for a listener.
    pub fn record(&self, event: Event) {
        let Event {
            severity,
            kind,
            message,
            details,
        } = event;
        let particulars = Value::Object(details.clone());
        match severity {
            Severity::Info => tracing::info!(kind, %particulars, "{message}"),
            Severity::Warning => tracing::warn!(kind, %particulars, "{message}"),
            Severity::Error => tracing::error!(kind, %particulars, "{message}"),
        }
        let mut recent = self.recent();
        recent.last += 1;
        let record = EventRecord {
            number: recent.last,
            at_unix_ms: unix_ms(),
            severity,
            kind: kind.to_owned(),
            message,
            details,
        };
        if recent.events.len() == RECENT_EVENTS {
            recent.events.pop_front();
        }
        recent.events.push_back(record.clone());
        // An error says only that nobody listens.
        let _ = self.sender.send(record);
    }

    /// What happened lately, and from there on what happens.
    pub fn subscribe(&self) -> Subscription {
        let recent = self.recent();
        Subscription {
            recent: recent.events.iter().cloned().collect(),
            next: self.sender.subscribe(),
        }
    }

    fn recent(&self) -> std::sync::MutexGuard<'_, Recent> {
        // It is whole after every statement, so a panic elsewhere leaves it whole.
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The host's clock in ms since 1970; 0 for a clock before that.
pub fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(n: usize) -> Event {
        Event::new(Severity::Info, "test", format!("event {n}"))
    }

    #[test]
    fn recent_and_next_join_without_gap_or_repetition() {
        let log = EventLog::default();
        for n in 0..RECENT_EVENTS + 10 {
            log.record(event(n));
        }
        let mut subscription = log.subscribe();
        let numbers: Vec<_> = subscription
            .recent
            .iter()
            .map(|event| event.number)
            .collect();
        let last = RECENT_EVENTS as u64 + 10;
        assert_eq!(numbers, (11..=last).collect::<Vec<_>>());
        log.record(event(0).with("answer", 42));
        let next = subscription.next.try_recv().unwrap();
        assert_eq!(next.number, last + 1);
        assert_eq!(next.details["answer"], 42);
        assert!(subscription.next.try_recv().is_err());
    }

    #[test]
    fn a_listener_that_does_not_listen_holds_nobody_up_and_is_told_what_it_missed() {
        let log = EventLog::default();
        let mut subscription = log.subscribe();
        for n in 0..WAITING_EVENTS + 5 {
            log.record(event(n));
        }
        let missed = subscription.next.try_recv();
        assert_eq!(missed, Err(broadcast::error::TryRecvError::Lagged(5)));
        assert_eq!(subscription.next.try_recv().unwrap().number, 6);
    }
}
