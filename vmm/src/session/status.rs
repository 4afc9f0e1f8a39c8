//! What a session notes of a failover and of a transfer, for its status.

use std::time::Instant;

use crate::api::{Failover, Part, unix_ms};

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
