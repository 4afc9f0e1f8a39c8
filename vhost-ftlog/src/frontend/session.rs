//! A session's shared memory and its parts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use format::{Seq, SessionId};
use ring::{
    Arena, ArenaConfig, ArenaLayout, COMMIT_NEVER, CONTROL_MAGIC, CONTROL_VERSION, CommitPoint,
    ControlPage, Desc, DoubleMapping, Driver, Limits, MappedVring, Mapping, Reaper,
};

use super::owner::OwnerWord;
use super::wake::Event;
use super::{Acks, Error, LogConsumer, LogProducer};
use crate::config_space::QUEUES;

/// The parts of an open session.
#[derive(Debug)]
pub struct Session {
    /// Publishes the log. Of use to the sender.
    pub producer: LogProducer,
    /// Sees what is replicated. Can be cloned.
    pub acks: Acks,
    /// Reads what is delivered. Of use to the receiver.
    pub consumer: LogConsumer,
}

/// Kicks and calls of one queue.
#[derive(Debug)]
pub(super) struct QueueEvents {
    pub(super) kick: Event,
    pub(super) call: Event,
}

impl QueueEvents {
    pub(super) fn new() -> Result<Self, Error> {
        Ok(Self {
            kick: Event::new()?,
            call: Event::new()?,
        })
    }
}

/// The arena of a session with its mappings, shared by all parts and by the supervisor.
#[derive(Debug)]
pub(crate) struct SessionMemory {
    // Dropped first: the word is let go before the memory is.
    _owner: OwnerWord,
    pub(super) arena: Arena,
    pub(super) layout: ArenaLayout,
    pub(super) mapping: Arc<Mapping>,
    pub(super) delivery: DoubleMapping,
    pub(super) log_events: QueueEvents,
    pub(super) delivery_events: QueueEvents,
    pub(super) log: Reaper<MappedVring>,
    pub(super) events: std::sync::Mutex<Driver<MappedVring>>,
    /// Sequence number of the first append.
    pub(super) first: Seq,
    /// The session, as its trace points name it.
    pub(super) number: u64,
    /// Everything below this was seen as acknowledged, by whichever clone of [`Acks`].
    pub(super) seen: AtomicU64,
}

impl SessionMemory {
    /// Makes the arena of `session`, whose first append has the number `first`.
    pub(super) fn new(
        config: ArenaConfig,
        session: SessionId,
        first: Seq,
    ) -> Result<(Arc<Self>, Driver<MappedVring>), Error> {
        let layout = ArenaLayout::new(config)?;
        let arena = Arena::create(layout.len)?;
        let mapping = Arc::new(Mapping::of_file(&arena, 0, layout.len as usize)?);
        let delivery =
            DoubleMapping::of_file(&arena, layout.delivery, layout.delivery_len as usize)?;
        mapping.dont_fork()?;
        delivery.dont_fork()?;
        let ring = |layout| MappedVring::new(Arc::clone(&mapping), layout);
        let log = Driver::new(ring(layout.log_ring)?, 0);
        let mut deliveries = Driver::new(ring(layout.delivery_ring)?, 0);
        deliveries.add(Desc {
            addr: layout.delivery,
            len: layout.delivery_len as u32,
            flags: Desc::WRITE,
            next: 0,
        })?;
        let events = Driver::new(ring(layout.event_ring)?, 0);
        prepare_control(mapping.control_at(layout.control)?, first);
        let memory = Self {
            _owner: OwnerWord::hold(Arc::clone(&mapping))?,
            arena,
            layout,
            delivery,
            log_events: QueueEvents::new()?,
            delivery_events: QueueEvents::new()?,
            log: log.reaper(),
            events: std::sync::Mutex::new(events),
            mapping,
            first,
            number: session.number(),
            seen: AtomicU64::new(first.0),
        };
        memory.offer_event_buffers()?;
        Ok((Arc::new(memory), log))
    }

    fn offer_event_buffers(&self) -> Result<(), Error> {
        let mut events = self
            .events
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        while events.has_room() {
            let slot = events.position() % u64::from(Limits::EVENT_RING);
            events.add(Desc {
                addr: self.layout.events + slot * u64::from(Limits::EVENT_LEN),
                len: Limits::EVENT_LEN,
                flags: Desc::WRITE,
                next: 0,
            })?;
        }
        events.reaper().arm(0)?;
        Ok(())
    }

    pub(super) fn control(&self) -> &ControlPage {
        self.mapping
            .control_at(self.layout.control)
            .expect("the layout has room for the control page")
    }

    /// The position before which the daemon has used all, and the sequence number there.
    pub(super) fn used(&self) -> Result<(u64, Seq), Error> {
        let used = self.log.used()?;
        Ok((used, Seq(self.first.0 + used)))
    }

    /// Where the queues go on (log, delivery, event), for a daemon that has let go of them or is a new one.
    pub(crate) fn bases(&self) -> Result<[u16; QUEUES], Error> {
        let (used, seq) = self.used()?;
        let base_seq = &self.control().producer.base_seq;
        base_seq.store(seq.0, Ordering::Release);
        let mut events = self
            .events
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        Ok([used as u16, 0, events.refresh()? as u16])
    }

    /// The parts of the session.
    pub(super) fn parts(self: &Arc<Self>, log: Driver<MappedVring>) -> Session {
        Session {
            producer: LogProducer::new(Arc::clone(self), log),
            acks: Acks::new(Arc::clone(self)),
            consumer: LogConsumer::new(Arc::clone(self)),
        }
    }
}

/// For tests of the daemon's side: the memory of a session without a daemon.
#[cfg(test)]
impl SessionMemory {
    pub(crate) fn without_daemon(config: ArenaConfig, first: Seq) -> (Arc<Self>, Session) {
        let (memory, log) =
            Self::new(config, SessionId::default(), first).expect("an arena of legal sizes");
        let session = memory.parts(log);
        (memory, session)
    }

    pub(crate) fn arena(&self) -> &Arena {
        &self.arena
    }

    pub(crate) fn layout(&self) -> &ArenaLayout {
        &self.layout
    }

    /// Which queues were kicked since the last look: log, delivery.
    pub(crate) fn take_kicks(&self) -> [bool; 2] {
        [&self.log_events, &self.delivery_events].map(|events| {
            let waited = events.kick.wait(Some(std::time::Duration::ZERO));
            waited.expect("an eventfd can be polled")
        })
    }
}

fn prepare_control(control: &ControlPage, first: Seq) {
    control.producer.base_seq.store(first.0, Ordering::Relaxed);
    control.producer.flush.store(first.0, Ordering::Relaxed);
    control
        .producer
        .space_wanted
        .store(COMMIT_NEVER, Ordering::Relaxed);
    control.consumer.replayed.store(first.0, Ordering::Relaxed);
    control
        .consumer
        .call_at
        .store(COMMIT_NEVER, Ordering::Relaxed);
    control
        .delivery
        .kick_at
        .store(COMMIT_NEVER, Ordering::Relaxed);
    control
        .delivery
        .replay_kick_at
        .store(COMMIT_NEVER, Ordering::Relaxed);
    control.delivery.commits.commit(CommitPoint {
        cursor: 0,
        seq: first.0,
    });
    control
        .identity
        .version
        .store(CONTROL_VERSION, Ordering::Relaxed);
    control
        .identity
        .magic
        .store(CONTROL_MAGIC, Ordering::Release);
}
