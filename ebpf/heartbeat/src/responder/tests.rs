//! What the responder answers and what it only counts.

use ebpf_events::{Key, KeyGeneration, SessionKeys, Side};

use super::*;

const SESSION: u64 = 7;

fn keys(side: Side) -> SessionKeys {
    SessionKeys::derive(b"test", SESSION, KeyGeneration(1), side)
}

fn answerer() -> (Answerer, SessionPages) {
    let pages = SessionPages::private().unwrap();
    let mut entry = SessionEntry {
        epoch: 4,
        ..SessionEntry::default()
    };
    entry.install(KeyGeneration(1), keys(Side::Listener));
    let mut answerer = Answerer::default();
    answerer.sessions.insert(SESSION, (entry, pages.clone()));
    (answerer, pages)
}

fn request(sequence: u64) -> Request {
    Request {
        session: SESSION,
        generation: KeyGeneration(1),
        epoch: 3,
        sequence,
        nonce: sequence * 1_000,
        time_ns: 5,
    }
}

fn key() -> Key {
    keys(Side::Connector).ours
}

fn counted(answerer: &Answerer) -> Vec<(&'static str, u64)> {
    let all = Counter::ALL
        .iter()
        .map(|c| (c.name(), answerer.counters[*c as usize]));
    all.filter(|(_, n)| *n > 0).collect()
}

#[test]
fn a_good_request_is_answered_with_what_the_pages_say() {
    let (mut answerer, pages) = answerer();
    pages.vmm.progress.store(11, Ordering::Release);
    pages.daemon.progress.store(22, Ordering::Release);
    pages
        .seen
        .local
        .store(u64::from(ReplyFlags::VMM_DEAD.0), Ordering::Release);
    let packet = answerer.answer(&request(1).encode(&key()), 99).unwrap();
    let reply = Reply::decode(&packet, &key()).unwrap();
    assert_eq!(
        (reply.sequence, reply.nonce, reply.echo_time_ns),
        (1, 1_000, 5)
    );
    assert_eq!(
        (reply.epoch, reply.vmm_progress, reply.daemon_progress),
        (4, 11, 22)
    );
    assert_eq!(reply.flags, ReplyFlags::VMM_DEAD | ReplyFlags::USERSPACE);
    assert_eq!(pages.seen.heard_ns.load(Ordering::Acquire), 99);
    assert_eq!(counted(&answerer), [("answered", 1)]);
}

#[test]
fn bad_requests_change_nothing_and_are_counted() {
    let (mut answerer, pages) = answerer();
    assert!(answerer.answer(&request(5).encode(&key()), 1).is_some());

    let good = request(6).encode(&key());
    let mut flipped = good;
    flipped[30] ^= 1;
    let stranger = Request {
        session: 8,
        ..request(6)
    };
    let old_key = Request {
        generation: KeyGeneration(3),
        ..request(6)
    };
    let reply = Reply::to(&request(6)).encode(&key());
    let own_direction = request(6).encode(&keys(Side::Listener).ours);
    for bad in [
        &good[..79],
        &flipped,
        &stranger.encode(&key()),
        &old_key.encode(&key()),
        &request(5).encode(&key()),
        &request(4).encode(&key()),
        &reply,
        &own_direction,
    ] {
        assert_eq!(answerer.answer(bad, 2), None);
    }
    assert_eq!(
        counted(&answerer),
        [
            ("answered", 1),
            ("malformed", 2),
            ("forged", 2),
            ("replayed", 2),
            ("unknown_session", 1),
            ("unknown_key", 1)
        ]
    );
    assert_eq!(pages.seen.highest_request.load(Ordering::Acquire), 5);
    assert_eq!(pages.seen.heard_ns.load(Ordering::Acquire), 1);
    assert!(
        answerer.answer(&good, 3).is_some(),
        "the true request is still answered"
    );
}

#[test]
fn a_closed_session_is_a_stranger() {
    let responder = Responder::userspace("127.0.0.1:0".parse().unwrap(), None).unwrap();
    assert_ne!(responder.local_addr().port(), 0);
    let (answerer, pages) = answerer();
    let entry = answerer.sessions[&SESSION].0.clone();
    responder.open(SESSION, entry, pages);
    responder.close(SESSION);
    assert!(
        responder
            .answerer()
            .answer(&request(1).encode(&key()), 1)
            .is_none()
    );
    assert_eq!(responder.counters()[Counter::UnknownSession as usize], 1);
}
