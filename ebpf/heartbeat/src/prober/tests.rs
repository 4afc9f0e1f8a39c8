//! Prober and userspace responder over loopback.

use std::sync::atomic::Ordering;
use std::time::Duration;

use ebpf_events::maps::SessionEntry;
use ebpf_events::{ReplyFlags, SessionKeys, Side};

use super::*;
use crate::responder::{Responder, SessionPages};

const SESSION: u64 = 7;
const GENERATION: KeyGeneration = KeyGeneration(1);
/// Replies over loopback take microseconds; this only ends a test that would hang.
const PATIENCE_BEATS: usize = 10_000;

fn keys(generation: KeyGeneration, side: Side) -> SessionKeys {
    SessionKeys::derive(b"test", SESSION, generation, side)
}

struct Peer {
    responder: Responder,
    entry: SessionEntry,
    pages: SessionPages,
}

fn peer() -> Peer {
    let responder = Responder::userspace("127.0.0.1:0".parse().unwrap(), None).unwrap();
    let pages = SessionPages::private().unwrap();
    let mut entry = SessionEntry {
        epoch: 4,
        ..SessionEntry::default()
    };
    entry.install(GENERATION, keys(GENERATION, Side::Listener));
    responder.open(SESSION, entry.clone(), pages.clone());
    Peer {
        responder,
        entry,
        pages,
    }
}

fn prober(peer: SocketAddr, interval: Duration) -> Prober {
    let key = keys(GENERATION, Side::Connector).ours;
    let mut config = ProberConfig::new(SESSION, 3, GENERATION, key, peer);
    config.interval = interval;
    Prober::new(config, Page::private().unwrap(), None).unwrap()
}

/// Beats until the observation is as wanted.
fn beat_until(prober: &mut Prober, wanted: impl Fn(&Observation) -> bool) -> Observation {
    for _ in 0..PATIENCE_BEATS {
        let observation = prober.beat();
        if wanted(&observation) {
            return observation;
        }
        std::thread::yield_now();
    }
    panic!(
        "not observed in {PATIENCE_BEATS} beats; last: {:?}",
        prober.beat()
    );
}

#[test]
fn replies_tell_progress_death_and_epoch() {
    let peer = peer();
    let mut prober = prober(peer.responder.local_addr(), Duration::from_millis(10));
    let first = beat_until(&mut prober, |o| o.peer.is_some()).peer.unwrap();
    assert_eq!((first.epoch, first.vmm_progress), (4, 0));
    assert!(first.from_userspace() && !first.vmm_dead());
    assert!(first.round_trip_ns > 0);

    peer.pages.vmm.progress.store(5, Ordering::Release);
    peer.pages.daemon.progress.store(6, Ordering::Release);
    let moved = beat_until(&mut prober, |o| o.peer.is_some_and(|p| p.vmm_progress == 5));
    assert_eq!(moved.peer.unwrap().daemon_progress, 6);

    peer.pages
        .seen
        .local
        .fetch_or(u64::from(ReplyFlags::VMM_DEAD.0), Ordering::AcqRel);
    let dead = beat_until(&mut prober, |o| o.peer.is_some_and(|p| p.vmm_dead()));
    assert!(!dead.peer.unwrap().daemon_dead());
}

#[test]
fn silence_grows_only_while_the_prober_runs() {
    // Nobody answers on this address: the socket is bound and never read.
    let deaf = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let interval = Duration::from_millis(50);
    let mut prober = prober(deaf.local_addr().unwrap(), interval);
    assert_eq!(prober.beat().silence_ns, 0);
    let ran = beat_until(&mut prober, |o| o.silence_ns > 0);
    assert_eq!(ran.own_gap_ns, 0);

    // The prober is not called for four intervals: that is its own gap, not the peer's silence.
    let until = monotonic_ns() + 200_000_000;
    while monotonic_ns() < until {
        std::thread::yield_now();
    }
    let late = prober.beat();
    assert!(late.own_gap_ns >= 200_000_000, "{late:?}");
    assert_eq!(late.silence_ns, ran.silence_ns);
    let again = beat_until(&mut prober, |o| o.silence_ns > late.silence_ns);
    assert_eq!(again.own_gap_ns, 0);
    assert_eq!(again.peer, None);
}

#[test]
fn an_answer_ends_the_silence() {
    let peer = peer();
    let mut prober = prober(peer.responder.local_addr(), Duration::from_millis(10));
    beat_until(&mut prober, |o| o.peer.is_some() && o.silence_ns == 0);
    peer.responder.close(SESSION);
    beat_until(&mut prober, |o| o.silence_ns > 1_000_000);
    peer.responder
        .open(SESSION, peer.entry.clone(), peer.pages.clone());
    beat_until(&mut prober, |o| o.silence_ns == 0);
}

#[test]
fn keys_rotate_without_a_lost_reply() {
    let mut peer = peer();
    let mut prober = prober(peer.responder.local_addr(), Duration::from_millis(10));
    beat_until(&mut prober, |o| o.peer.is_some());
    let next = GENERATION.next();
    peer.entry.install(next, keys(next, Side::Listener));
    peer.responder
        .open(SESSION, peer.entry.clone(), peer.pages.clone());
    let before = prober.sequence - prober.base;
    prober.set_key(next, keys(next, Side::Connector).ours);
    beat_until(&mut prober, |o| o.peer.is_some_and(|p| p.request > before));
    let counters = peer.responder.counters();
    assert_eq!(counters[ebpf_events::maps::Counter::UnknownKey as usize], 0);
    assert_eq!(counters[ebpf_events::maps::Counter::Forged as usize], 0);
}

#[test]
fn replies_that_nobody_asked_for_are_ignored() {
    let attacker = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut prober = prober(attacker.local_addr().unwrap(), Duration::from_millis(10));
    prober.beat();
    let mut packet = [0; HEARTBEAT_BYTES];
    let (_, from) = attacker.recv_from(&mut packet).unwrap();
    let key = keys(GENERATION, Side::Connector).ours;
    let request = Request::decode(&packet, &key).unwrap();
    let good = Reply::to(&request);
    let bad = [
        Reply {
            nonce: request.nonce ^ 1,
            ..good
        }
        .encode(&key),
        Reply {
            sequence: request.sequence + 1,
            ..good
        }
        .encode(&key),
        Reply {
            session: SESSION + 1,
            ..good
        }
        .encode(&key),
        good.encode(&Key::new([9; 16])),
        packet,
    ];
    for packet in bad {
        attacker.send_to(&packet, from).unwrap();
    }
    assert_eq!(prober.beat().peer, None);
    attacker.send_to(&good.encode(&key), from).unwrap();
    assert_eq!(prober.beat().peer.map(|p| p.request), Some(1));
}

#[test]
fn a_zero_interval_is_refused() {
    let key = keys(GENERATION, Side::Connector).ours;
    let mut config = ProberConfig::new(SESSION, 3, GENERATION, key, ([127, 0, 0, 1], 1).into());
    config.interval = Duration::ZERO;
    let error = Prober::new(config, Page::private().unwrap(), None).unwrap_err();
    assert!(matches!(error, ProberError::Interval));
}
