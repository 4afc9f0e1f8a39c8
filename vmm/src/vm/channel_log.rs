//! The log of a protected VM: nowhere, or into the channel's producer.
//!
//! While a session is being given up the producer may be stuck or broken. Then appends are counted
//! and dropped: their positions are never acknowledged, so that nothing that depends on them leaves
//! the gate, until the protocol has decided and switched the log off.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use format::Seq;
use replay::{LogError, LogSink};
use vhost_ftlog::frontend::{Acks, LogProducer};

/// How often a producer that waits for room looks whether its session is being given up.
const ROOM_WAIT: Duration = Duration::from_millis(20);

/// What others may know of a log without asking the vCPU's thread.
#[derive(Debug, Default)]
pub struct LogPosition {
    next: AtomicU64,
    bytes: AtomicU64,
    abandoned: AtomicBool,
}

impl LogPosition {
    /// The position after the newest append.
    #[must_use]
    pub fn next(&self) -> Seq {
        Seq(self.next.load(Ordering::Acquire))
    }

    /// One more append was made.
    pub(super) fn appended(&self) -> Seq {
        Seq(self.next.fetch_add(1, Ordering::AcqRel))
    }

    /// Bytes appended.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// The session is being given up: whoever waits for room goes on without.
    pub fn abandon(&self) {
        self.abandoned.store(true, Ordering::Release);
    }

    /// Whether its session is being given up.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }
}

/// A log into the channel.
#[derive(Debug)]
pub struct ChannelLog {
    producer: LogProducer,
    acks: Acks,
    position: Arc<LogPosition>,
    broken: bool,
}

impl ChannelLog {
    /// A log that begins with the session's first append.
    #[must_use]
    pub fn new(producer: LogProducer, acks: Acks, position: Arc<LogPosition>) -> Self {
        Self {
            producer,
            acks,
            position,
            broken: false,
        }
    }

    /// What tells how far the replica is.
    pub(super) fn acks(&self) -> Acks {
        self.acks.clone()
    }

    /// What tells how far the log is.
    pub(super) fn position(&self) -> Arc<LogPosition> {
        Arc::clone(&self.position)
    }

    fn publish(&mut self, bytes: &[u8]) -> bool {
        while !self.broken && !self.position.is_abandoned() {
            match self.producer.append(bytes) {
                Ok(Some(_)) => return true,
                Ok(None) => {
                    if let Err(error) = self.producer.wait_space(bytes.len(), ROOM_WAIT) {
                        self.give_up(&error);
                    }
                }
                Err(error) => self.give_up(&error),
            }
        }
        false
    }

    fn give_up(&mut self, error: &dyn std::error::Error) {
        tracing::error!(%error, "the logging channel is broken; output is held");
        self.broken = true;
    }
}

/// Where the recorder of a VM that may be protected writes.
#[derive(Debug, Default)]
pub enum VmLog {
    /// Nowhere: nobody follows.
    #[default]
    Off,
    /// To a backup.
    Channel(Box<ChannelLog>),
}

impl LogSink for VmLog {
    fn append(&mut self, bytes: &[u8]) -> Result<Seq, LogError> {
        let Self::Channel(log) = self else {
            return Ok(Seq(0));
        };
        log.publish(bytes);
        log.position
            .bytes
            .fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(log.position.appended())
    }

    fn urgent(&mut self) {
        if let Self::Channel(log) = self {
            log.producer.flush(log.producer.next_seq());
        }
    }

    fn is_on(&self) -> bool {
        matches!(self, Self::Channel(_))
    }
}
