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
use crate::config_space::{AckMode, QUEUE_DELIVERY, QUEUE_EVENT, QUEUE_LOG, Reach};
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
        let (engine, handle, reports) = data_thread(&kernel);
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

    /// Another daemon goes on from the rings.
    fn restart(&mut self) {
        (self.engine, self.handle, self.reports) = data_thread(&self.kernel);
        self.attach();
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
        let bases = self.memory.bases().unwrap();
        for (index, ring) in [
            (QUEUE_LOG, layout.log_ring),
            (QUEUE_DELIVERY, layout.delivery_ring),
            (QUEUE_EVENT, layout.event_ring),
        ] {
            let setup = Box::new(queue(index, ring, bases[index], &memory));
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

fn data_thread(kernel: &Simulated) -> (Engine<Simulated>, EngineHandle, mpsc::Receiver<Report>) {
    let (handle, inbox, doorbell) = EngineHandle::new().unwrap();
    let (report, reports) = mpsc::channel();
    let config = EngineConfig {
        linger_ns: 1_000_000_000,
        yield_in_spin: false,
        yield_to_called: false,
        clock: now,
    };
    let engine = Engine::new(kernel.clone(), config, inbox, doorbell, report).unwrap();
    (engine, handle, reports)
}

fn queue(index: usize, layout: VringLayout, base: u16, memory: &Arc<DeviceMemory>) -> QueueSetup {
    let event = || {
        let flags = rustix::event::EventfdFlags::CLOEXEC;
        Some(rustix::event::eventfd(0, flags).unwrap())
    };
    QueueSetup {
        index,
        memory: Arc::clone(memory),
        layout,
        base,
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

#[test]
fn a_peer_that_falls_silent_holds_no_batch_back() {
    let batch_ns = u64::from(Tuning::default().batch_us) * 1000;
    let (mut primary, mut backup) = pair(true);
    primary.session.producer.append_urgent(b"prompt").unwrap();
    carry(&mut primary, &mut backup);
    primary
        .session
        .producer
        .append_urgent(b"on its way")
        .unwrap();
    primary.settle();
    let mut sent = primary.kernel.take_sent();
    pass(3 * batch_ns);
    primary.session.producer.append(b"batch").unwrap();
    primary.settle();
    assert_eq!(primary.kernel.last_sleep(), Some(Wait::AtMost(batch_ns)));
    pass(batch_ns);
    primary.settle();
    sent.extend(primary.kernel.take_sent());
    backup.kernel.arrive(&sent);
    carry(&mut primary, &mut backup);
    assert_eq!(primary.session.acks.acked().unwrap(), Seq(3));
}

#[test]
fn batches_that_follow_one_another_need_a_kick_for_each_frame() {
    let tuning = Tuning::default();
    let append = vec![7; tuning.batch_bytes as usize];
    let (mut primary, mut backup) = pair(true);
    primary.session.producer.append(&append).unwrap();
    carry(&mut primary, &mut backup);
    let sender = primary.engine.sender.as_mut().unwrap();
    assert!(!sender.fall_asleep(&tuning, now(), true).unwrap());
    let before = primary.session.producer.stats().kicks;
    let per_frame = frame::FRAME_BYTES / append.len();
    for _ in 0..per_frame - 1 {
        primary.session.producer.append(&append).unwrap();
    }
    assert_eq!(primary.session.producer.stats().kicks, before);
    primary.session.producer.append(&append).unwrap();
    assert_eq!(primary.session.producer.stats().kicks, before + 1);
}

#[test]
fn what_the_vmm_has_seen_and_the_kicks_that_it_spared_are_counted() {
    let (mut primary, mut backup) = pair(true);
    let memory = Arc::clone(primary.engine.memory.as_ref().unwrap());
    let control = memory.control();
    primary.kernel.kick(Slot::LogKick);
    primary.settle();
    // The VMM reads the clock of the machine; the data thread's is the test's.
    primary.session.producer.append_urgent(b"output").unwrap();
    control.producer.flush_ns.store(now(), Ordering::Relaxed);
    carry(&mut primary, &mut backup);
    pass(7_000);
    assert_eq!(primary.session.acks.acked().unwrap(), Seq(1));
    control.sight.seen_ns.store(now(), Ordering::Relaxed);
    for _ in 0..5 {
        primary.session.producer.append(b"more").unwrap();
    }
    primary.session.producer.flush(Seq(6));
    carry(&mut primary, &mut backup);
    let snapshot = primary.ask(Command::Snapshot);
    let seen = &snapshot.stats.histograms.seen;
    assert_eq!(seen.len(), 1);
    assert!(seen.equivalent(seen.max(), 7_000), "{}", seen.max());
    let counters = snapshot.stats.counters;
    let kicks = (counters.kicks, counters.kicks_suppressed);
    assert_eq!(kicks, (1, 5), "{counters:?}");
}

/// An append that the peer has received, where those count that are replayed.
fn received_not_replayed() -> (Side, Side) {
    let (mut primary, mut backup) = pair(true);
    let replayed = Tuning {
        ack_mode: AckMode::Replayed,
        ..Tuning::default()
    };
    primary.tell(Command::Tune(replayed));
    primary.session.producer.append_urgent(b"received").unwrap();
    carry(&mut primary, &mut backup);
    (primary, backup)
}

#[test]
fn a_new_mode_of_acknowledgement_is_told_at_once() {
    let (mut primary, _backup) = received_not_replayed();
    assert_eq!(primary.session.acks.acked().unwrap(), Seq(0));
    primary.tell(Command::Tune(Tuning::default()));
    assert_eq!(primary.session.acks.acked().unwrap(), Seq(1));
}

/// R10 of another host's daemon: a peer that has less than it once acknowledged has lost its state.
#[test]
fn a_peer_that_lost_what_it_acknowledged_is_refused() {
    let (mut primary, _backup) = received_not_replayed();
    let sender = primary.engine.sender.as_mut().unwrap();
    assert!(sender.can_resume(Seq(1)).is_ok());
    assert!(sender.can_resume(Seq(0)).is_err());
}

/// Positions are told with 16 bits when rings are handed over; numbers are not.
#[test]
fn a_restarted_daemon_wakes_a_producer_that_waits_for_space() {
    let (mut primary, mut backup) = pair(true);
    for _ in 0..70 {
        for _ in 0..1000 {
            primary.session.producer.append(b"small").unwrap().unwrap();
        }
        let upto = primary.session.producer.next_seq();
        primary.session.producer.flush(upto);
        carry(&mut primary, &mut backup);
        while backup.session.consumer.next_frame().unwrap().is_some() {}
        backup.session.consumer.release();
    }
    for side in [&mut primary, &mut backup] {
        side.kernel = Simulated::new(true);
        side.restart();
        side.connect(Seq(70_000));
    }
    let large = [7; 60_000];
    while primary.session.producer.append(&large).unwrap().is_some() {}
    let memory = primary.engine.memory.clone().unwrap();
    let control = memory.control();
    // Another thread waits with the producer while this one carries.
    let (_other, other) = SessionMemory::without_daemon(ARENA, Seq(0));
    let mut producer = std::mem::replace(&mut primary.session, other).producer;
    let limit = std::time::Duration::from_secs(60);
    let waiter = std::thread::spawn(move || producer.wait_space(large.len(), limit).unwrap());
    while control.producer.space_wanted.load(Ordering::Acquire) == ring::COMMIT_NEVER {
        std::thread::yield_now();
    }
    carry(&mut primary, &mut backup);
    assert!(waiter.join().unwrap());
    let woken = control.sender.space.load(Ordering::Relaxed);
    assert!(woken > 0, "the producer waited for its limit");
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
