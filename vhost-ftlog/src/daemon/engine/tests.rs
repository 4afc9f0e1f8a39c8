//! The data thread over a simulated kernel: every step is the test's, every system call is counted.

use std::cell::Cell;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;

use format::{Epoch, Frame, FrameFlags, Seq, SessionId};
use ring::{ArenaConfig, Owner, VringLayout};

use super::ring_io::Slot;
use super::simulated::Simulated;
use super::*;
use crate::config_space::{QUEUE_DELIVERY, QUEUE_EVENT, QUEUE_LOG, Reach};
use crate::daemon::memory::Region;
use crate::frontend::{Session, SessionMemory};
use crate::handshake::{Purpose, Refusal};

thread_local!(static NOW: Cell<u64> = const { Cell::new(1_000_000_000) });

fn now() -> u64 {
    NOW.get()
}

fn pass(ns: u64) {
    NOW.set(NOW.get() + ns);
}

const ARENA: ArenaConfig = ArenaConfig {
    log_ring: 4096,
    log_bytes: 1 << 20,
    delivery_bytes: 2 << 20,
};

/// One side: a VMM's memory, a data thread and its kernel.
struct Side {
    engine: Engine<Simulated>,
    kernel: Simulated,
    handle: EngineHandle,
    reports: mpsc::Receiver<Report>,
    memory: Arc<SessionMemory>,
    session: Session,
    role: Role,
}

impl Side {
    fn new(role: Role, provides: bool) -> Self {
        let kernel = Simulated::new(provides);
        let (handle, inbox, doorbell) = EngineHandle::new().unwrap();
        let (report, reports) = mpsc::channel();
        let config = EngineConfig {
            linger_ns: 1_000_000_000,
            yield_in_spin: false,
            yield_to_called: false,
            clock: now,
        };
        let engine = Engine::new(kernel.clone(), config, inbox, doorbell, report).unwrap();
        let (memory, session) = SessionMemory::without_daemon(ARENA, Seq(0));
        let mut this = Self {
            engine,
            kernel,
            handle,
            reports,
            memory,
            session,
            role,
        };
        this.attach();
        this
    }

    fn ask<T>(&mut self, command: impl FnOnce(command::Reply<T>) -> Command) -> T {
        let (reply, answer) = mpsc::sync_channel(1);
        self.tell(command(reply));
        answer.try_recv().unwrap()
    }

    fn tell(&mut self, command: Command) {
        self.handle.tell(command).unwrap();
        self.kernel.kick(Slot::Doorbell);
        self.settle();
    }

    /// Takes turns until the data thread sleeps. Kicks of the VMM reach it.
    fn settle(&mut self) {
        let kicks = self.memory.take_kicks();
        for (kicked, slot) in kicks.into_iter().zip([Slot::LogKick, Slot::DeliveryKick]) {
            if kicked {
                self.kernel.kick(slot);
            }
        }
        let (_, slept) = self.kernel.entered();
        for _ in 0..10_000 {
            self.engine.turn().unwrap();
            if self.kernel.entered().1 > slept {
                return;
            }
        }
        panic!("the data thread never sleeps");
    }

    /// Hands the memory over, as SET_MEM_TABLE and the messages after it do, and opens the session.
    fn attach(&mut self) {
        let layout = *self.memory.layout();
        let region = Region {
            guest: 0,
            len: layout.len,
            user: 0,
            offset: 0,
        };
        let file = self.memory.arena().as_fd().try_clone_to_owned().unwrap();
        let memory = Arc::new(DeviceMemory::new(region, file.into()).unwrap());
        let ours = Arc::clone(&memory);
        self.ask(|reply| Command::SetMemory(ours, reply)).unwrap();
        for (index, ring) in [
            (QUEUE_LOG, layout.log_ring),
            (QUEUE_DELIVERY, layout.delivery_ring),
            (QUEUE_EVENT, layout.event_ring),
        ] {
            let setup = Box::new(queue(index, ring, &memory));
            self.ask(|reply| Command::StartQueue(setup, reply)).unwrap();
        }
        let params = self.params();
        self.ask(|reply| Command::Open(params, reply)).unwrap();
    }

    fn params(&self) -> SessionParams {
        SessionParams {
            session: SessionId([7; 16]),
            epoch: Epoch(1),
            role: self.role,
            reach: Reach::Listen,
        }
    }

    fn connect(&mut self, peer_next: Seq) {
        let of = SessionParamsOf::from(&self.params());
        let prepared = self.ask(|reply| Command::Prepare(None, of, reply)).unwrap();
        let (socket, _) = UnixStream::pair().unwrap();
        let socket = TcpStream::from(OwnedFd::from(socket));
        self.tell(Command::Adopt(prepared.generation, socket, peer_next));
        assert!(self.engine.link.is_some());
    }

    /// The owner word that the data thread must look at.
    fn word(&self) -> *const u32 {
        let memory = self.engine.memory.as_ref().unwrap();
        memory.control().owner.word.as_ptr()
    }
}

fn queue(index: usize, layout: VringLayout, memory: &Arc<DeviceMemory>) -> QueueSetup {
    let event = || {
        let flags = rustix::event::EventfdFlags::CLOEXEC;
        Some(rustix::event::eventfd(0, flags).unwrap())
    };
    QueueSetup {
        index,
        memory: Arc::clone(memory),
        layout,
        base: 0,
        in_order: true,
        kick: event(),
        call: event(),
    }
}

/// Two connected sides.
fn pair(provides: bool) -> (Side, Side) {
    let mut primary = Side::new(Role::Sender, provides);
    let mut backup = Side::new(Role::Receiver, provides);
    primary.connect(Seq(0));
    backup.connect(Seq(0));
    (primary, backup)
}

/// Carries bytes both ways until neither side sends any more.
fn carry(primary: &mut Side, backup: &mut Side) -> Vec<u8> {
    let mut log = Vec::new();
    loop {
        primary.settle();
        let frames = primary.kernel.take_sent();
        backup.kernel.arrive(&frames);
        backup.settle();
        let acks = backup.kernel.take_sent();
        primary.kernel.arrive(&acks);
        log.extend_from_slice(&frames);
        if frames.is_empty() && acks.is_empty() {
            return log;
        }
    }
}

/// The word of a session that is over is not looked at any more, though its memory still lives.
#[test]
fn the_owner_of_the_next_session_is_watched() {
    let mut side = Side::new(Role::Sender, true);
    assert_eq!(side.kernel.watched_words(), [side.word()]);
    let first = side.word();
    let (memory, session) = SessionMemory::without_daemon(ARENA, Seq(0));
    let old = std::mem::replace(&mut side.memory, memory);
    side.session = session;
    side.attach();
    assert_ne!(side.word(), first);
    assert_eq!(side.kernel.watched_words(), [side.word()]);
    drop(old);
    side.settle();
    assert!(
        !side.engine.vmm_dead,
        "the end of the old session is none of the new"
    );
    assert_eq!(side.kernel.watched_words(), [side.word()]);
}

/// R10, by the futex: no timer is involved, the clock stands still.
#[test]
fn a_dead_vmm_s_log_goes_out_and_end_after_it_without_a_timer() {
    let (mut primary, mut backup) = pair(true);
    let producer = &mut primary.session.producer;
    producer.append(b"not flushed").unwrap().unwrap();
    let memory = primary.engine.memory.clone().unwrap();
    let word = &memory.control().owner.word;
    word.store(Owner::DIED, Ordering::Release);
    let log = carry(&mut primary, &mut backup);
    let mut rest = log.as_slice();
    assert_eq!(Frame::decode(&mut rest).unwrap().body, b"not flushed");
    let end = Frame::decode(&mut rest).unwrap().header;
    assert!(end.flags.contains(FrameFlags::END) && end.first == Seq(1));
    assert!(rest.is_empty());
    let reports: Vec<_> = primary.reports.try_iter().collect();
    assert!(reports.contains(&Report::Finished), "{reports:?}");
    assert!(
        primary.engine.memory.is_none(),
        "a dead VMM's memory is let go"
    );
}

/// The backup's VMM dies while there is no connection: a peer that comes is told so.
#[test]
fn a_peer_that_connects_to_a_dead_vmm_s_daemon_is_told() {
    let mut backup = Side::new(Role::Receiver, true);
    let memory = backup.engine.memory.clone().unwrap();
    memory
        .control()
        .owner
        .word
        .store(Owner::DIED, Ordering::Release);
    backup.settle();
    let of = SessionParamsOf::from(&backup.params());
    let purpose = Purpose::Log {
        role: Role::Sender,
        next: Seq(0),
    };
    let refused = backup.ask(|reply| Command::Prepare(Some(purpose), of, reply));
    assert_eq!(refused, Err(Refusal::VmmDead));
    pass(1_000_000_001);
    backup.settle();
    let refused = backup.ask(|reply| Command::Prepare(Some(purpose), of, reply));
    assert_eq!(refused, Err(Refusal::NoSession));
}

/// What the hot path costs: a thousand entries, published one by one, replicated and acknowledged.
#[test]
fn a_thousand_appends_cost_a_handful_of_system_calls() {
    let (mut primary, mut backup) = pair(true);
    let before = primary.kernel.entered().0 + backup.kernel.entered().0;
    for i in 0..1000u64 {
        let append = i.to_le_bytes().repeat(2);
        primary.session.producer.append(&append).unwrap().unwrap();
    }
    primary.session.producer.flush(Seq(1000));
    carry(&mut primary, &mut backup);
    assert_eq!(primary.session.acks.acked().unwrap(), Seq(1000));
    assert_eq!(backup.session.consumer.committed().1, Seq(1000));
    let stats = primary.session.producer.stats();
    // The daemon sleeps, so it is woken for the first append and for the flush.
    assert!(stats.kicks <= 2, "{stats:?}");
    let after = primary.kernel.entered().0 + backup.kernel.entered().0;
    assert!(after - before <= 20, "{} system calls", after - before);
}

#[test]
fn an_append_goes_out_when_its_batch_time_is_over_or_at_once_when_flushed() {
    let (mut primary, mut backup) = pair(true);
    primary.session.producer.append(b"one").unwrap();
    assert!(carry(&mut primary, &mut backup).is_empty());
    pass(u64::from(Tuning::default().batch_us) * 1000);
    assert!(!carry(&mut primary, &mut backup).is_empty());
    primary.session.producer.append_urgent(b"two").unwrap();
    assert!(!carry(&mut primary, &mut backup).is_empty());
    assert_eq!(primary.session.acks.acked().unwrap(), Seq(2));
}

#[test]
fn while_batches_are_full_appends_wait_for_the_batch_time_at_most() {
    let tuning = Tuning::default();
    let batch_ns = u64::from(tuning.batch_us) * 1000;
    let append = vec![7; tuning.batch_bytes as usize];
    let (mut primary, mut backup) = pair(true);
    primary.session.producer.append(&append).unwrap();
    assert!(!carry(&mut primary, &mut backup).is_empty());
    for _ in 0..3 {
        primary.session.producer.append(&append).unwrap();
    }
    pass(batch_ns);
    let log = carry(&mut primary, &mut backup);
    assert!(log.len() > 3 * append.len(), "{}", log.len());
    // An output is not kept waiting.
    primary.session.producer.append_urgent(b"output").unwrap();
    assert!(!carry(&mut primary, &mut backup).is_empty());
    assert_eq!(primary.session.acks.acked().unwrap(), Seq(5));
    // That batch was not full: the next append leaves when its time is over.
    primary.session.producer.append(b"one").unwrap();
    assert!(carry(&mut primary, &mut backup).is_empty());
    pass(batch_ns);
    assert!(!carry(&mut primary, &mut backup).is_empty());
}

#[test]
fn a_batch_needs_no_timer_while_acknowledgements_are_on_their_way() {
    let batch_ns = u64::from(Tuning::default().batch_us) * 1000;
    let (mut primary, mut backup) = pair(true);
    let frame_and_batch = |primary: &mut Side| {
        primary.session.producer.append_urgent(b"frame").unwrap();
        primary.settle();
        primary.session.producer.append(b"batch").unwrap();
        primary.settle();
    };
    // Nobody knows yet how long an acknowledgement takes.
    frame_and_batch(&mut primary);
    assert_eq!(primary.kernel.last_sleep(), Some(Wait::AtMost(batch_ns)));
    pass(batch_ns / 2);
    carry(&mut primary, &mut backup);
    pass(batch_ns);
    carry(&mut primary, &mut backup);
    assert_eq!(primary.session.acks.acked().unwrap(), Seq(2));
    // They come promptly: the batch leaves with the next one.
    frame_and_batch(&mut primary);
    assert_eq!(primary.kernel.last_sleep(), Some(Wait::ForAnswer));
    pass(10 * batch_ns);
    carry(&mut primary, &mut backup);
    assert_eq!(primary.session.acks.acked().unwrap(), Seq(4));
    // That one was late.
    frame_and_batch(&mut primary);
    assert_eq!(primary.kernel.last_sleep(), Some(Wait::AtMost(batch_ns)));
}

/// However the kernel cuts the stream, the log is the same, with provided stretches and without.
#[test]
fn short_sends_of_any_length_change_nothing() {
    for provides in [true, false] {
        for limit in [1, 7, 63, 64, 65, 1000] {
            let (mut primary, mut backup) = pair(provides);
            primary.kernel.limit_sends(limit);
            let mut published = Vec::new();
            for i in 0..20u8 {
                let append = vec![i; 1 + usize::from(i) * 11];
                primary.session.producer.append_urgent(&append).unwrap();
                published.extend_from_slice(&append);
                carry(&mut primary, &mut backup);
            }
            assert_eq!(primary.session.acks.acked().unwrap(), Seq(20));
            let mut delivered = Vec::new();
            while let Some(frame) = backup.session.consumer.next_frame().unwrap() {
                delivered.extend_from_slice(frame.body);
            }
            assert_eq!(delivered, published, "limit {limit}");
        }
    }
}

/// Wherever the kernel cuts records, and round the end of their ring.
#[test]
fn records_that_come_in_pieces_are_put_together() {
    for provides in [true, false] {
        let (mut primary, mut backup) = pair(provides);
        for i in 0..300 {
            primary.session.producer.append_urgent(b"output").unwrap();
            primary.settle();
            backup.kernel.arrive(&primary.kernel.take_sent());
            backup.settle();
            let record = backup.kernel.take_sent();
            let (first, rest) = record.split_at(i as usize % record.len());
            for piece in [first, rest] {
                primary.kernel.arrive(piece);
                primary.settle();
            }
            assert_eq!(primary.session.acks.acked().unwrap(), Seq(i + 1));
        }
    }
}

/// A delivery ring that is full frees nothing; what the consumer releases is filled again, for ever.
#[test]
fn the_delivery_ring_goes_round_and_round() {
    for provides in [true, false] {
        let (mut primary, mut backup) = pair(provides);
        let (mut sent, mut seen) = (0u64, 0u64);
        while seen < 400 {
            let append = vec![sent as u8; 60_000];
            if primary
                .session
                .producer
                .append_urgent(&append)
                .unwrap()
                .is_some()
            {
                sent += 1;
            }
            carry(&mut primary, &mut backup);
            if sent.is_multiple_of(7) {
                while let Some(frame) = backup.session.consumer.next_frame().unwrap() {
                    assert_eq!(frame.header.first, Seq(seen));
                    assert!(
                        frame.body.iter().all(|byte| *byte == seen as u8) || frame.header.count > 1
                    );
                    seen += u64::from(frame.header.count);
                }
                backup.session.consumer.release();
            }
        }
    }
}

/// Nothing can be told to a VMM that breaks the event queue: the data thread gives it up and rests.
#[test]
fn a_broken_event_queue_does_not_keep_the_data_thread_awake() {
    let mut side = Side::new(Role::Receiver, true);
    let avail = side.memory.layout().event_ring.avail;
    let memory = side.engine.memory.clone().unwrap();
    memory.mapping().write(avail + 2, &u16::MAX.to_le_bytes());
    let of = SessionParamsOf::from(&side.params());
    let prepared = side.ask(|reply| Command::Prepare(None, of, reply)).unwrap();
    let (socket, _) = UnixStream::pair().unwrap();
    let socket = TcpStream::from(OwnedFd::from(socket));
    side.tell(Command::Adopt(prepared.generation, socket, Seq(0)));
    side.settle();
    assert!(side.engine.params.is_none(), "the session is over");
}

/// A receiver that is given anything else than the log that is due drops the connection.
#[test]
fn damage_ends_the_connection_and_commits_nothing() {
    let (mut primary, mut backup) = pair(true);
    primary.session.producer.append_urgent(b"entry").unwrap();
    primary.settle();
    let mut frames = primary.kernel.take_sent();
    assert!(Frame::decode(&mut frames.as_slice()).is_ok());
    let last = frames.len() - 6;
    frames[last] ^= 1;
    backup.kernel.arrive(&frames);
    backup.settle();
    assert!(backup.engine.link.is_none());
    assert_eq!(backup.session.consumer.committed().1, Seq(0));
}
