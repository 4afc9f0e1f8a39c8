//! Forged, replayed and malformed heartbeats change nothing and are counted.

use std::net::UdpSocket;
use std::time::Duration;

use ebpf_events::packet::HEARTBEAT_BYTES;
use ebpf_events::{Key, KeyGeneration, Reply, Request, Side};
use harness::{privileges, wait_until};

use crate::world::{GENERATION, PORT, SESSION, Vmm, World, beat_until, keys};

fn request(sequence: u64) -> Request {
    Request {
        session: SESSION,
        generation: GENERATION,
        epoch: 3,
        sequence,
        nonce: !sequence,
        time_ns: 1,
    }
}

/// Each bad packet with the counter that must take note of it.
fn bad_requests() -> Vec<(&'static str, Vec<u8>)> {
    let key = keys(Side::Connector).ours;
    let good = request(6).encode(&key);
    let with = |at: usize, value: u8| {
        let mut packet = good.to_vec();
        packet[at] = value;
        packet
    };
    let stranger = Key::new([7; 16]);
    let other = |change: fn(&mut Request)| {
        let mut other = request(6);
        change(&mut other);
        other.encode(&key).to_vec()
    };
    vec![
        ("malformed", good[..HEARTBEAT_BYTES - 1].to_vec()),
        ("malformed", [good.as_slice(), &[0]].concat()),
        ("malformed", Vec::new()),
        ("malformed", with(0, b'X')),
        ("malformed", with(4, 2)),
        ("malformed", with(5, 3)),
        ("malformed", with(7, 1)),
        ("malformed", with(48, 1)),
        ("malformed", with(64, 1)),
        ("malformed", Reply::to(&request(6)).encode(&key).to_vec()),
        ("forged", with(24, 9)),
        ("forged", with(79, good[79] ^ 1)),
        ("forged", request(6).encode(&stranger).to_vec()),
        (
            "forged",
            request(6).encode(&keys(Side::Connector).theirs).to_vec(),
        ),
        ("replayed", request(5).encode(&key).to_vec()),
        ("replayed", request(4).encode(&key).to_vec()),
        ("unknown_key", other(|r| r.generation = KeyGeneration(3))),
        ("unknown_session", other(|r| r.session += 1)),
    ]
}

fn bad_requests_are_counted(mode: &str) {
    let world = World::new();
    let _probes = world.both(mode);
    let mut vmm = Vmm::join(&world.socket("b"), 4, Side::Listener);
    let attacker = world
        .a
        .run(|| UdpSocket::bind((world.link.a.v4, 0)).unwrap());
    attacker.connect((world.link.b.v4, PORT)).unwrap();
    attacker
        .send(&request(5).encode(&keys(Side::Connector).ours))
        .unwrap();
    wait_until("the good request to be answered", || {
        vmm.counter("answered") == 1
    })
    .unwrap();
    let heard = vmm.pages.seen.heard_ns();

    for (counter, packet) in bad_requests() {
        let before = vmm.client.status().unwrap().counters;
        attacker.send(&packet).unwrap();
        wait_until(&format!("{counter} to be counted"), || {
            vmm.counter(counter) > before[counter]
        })
        .unwrap();
        let mut expected = before;
        *expected.get_mut(counter).unwrap() += 1;
        let after = vmm.client.status().unwrap().counters;
        assert_eq!(
            after, expected,
            "{mode}: nothing else is counted than {counter}"
        );
        // An ICMP answer to the packet of an unknown session waits as an error.
        let _ = attacker.take_error();
    }
    assert_eq!(
        vmm.pages.seen.heard_ns(),
        heard,
        "none of them counts as a sign of life"
    );
    attacker
        .send(&request(6).encode(&keys(Side::Connector).ours))
        .unwrap();
    wait_until("the next good request to be answered", || {
        vmm.counter("answered") == 2
    })
    .unwrap();
}

#[test]
fn bad_requests_change_nothing_on_native_xdp() {
    if privileges::root("bad_requests_change_nothing_on_native_xdp") {
        bad_requests_are_counted("native");
    }
}

#[test]
fn bad_requests_change_nothing_on_tcx() {
    if privileges::root("bad_requests_change_nothing_on_tcx") {
        bad_requests_are_counted("tcx");
    }
}

#[test]
fn bad_requests_change_nothing_in_userspace() {
    if privileges::root("bad_requests_change_nothing_in_userspace") {
        bad_requests_are_counted("userspace");
    }
}

/// A false responder sits on the peer's host instead of the probe, and knows the key.
#[test]
fn replies_that_match_no_request_change_nothing() {
    if !privileges::root("replies_that_match_no_request_change_nothing") {
        return;
    }
    let world = World::new();
    world.link.b.enable_gro().unwrap();
    let _a = world.ftprobe(&world.a, &world.link.a, "a", "native");
    let mut vmm = Vmm::join(&world.socket("a"), 3, Side::Connector);
    let mut prober = vmm.prober(&world.a, Side::Connector, world.link.b.v4.into());
    let false_responder = world
        .b
        .run(|| UdpSocket::bind((world.link.b.v4, PORT)).unwrap());
    false_responder
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();

    prober.beat();
    let mut packet = [0; HEARTBEAT_BYTES];
    let (_, from) = false_responder.recv_from(&mut packet).unwrap();
    let key = keys(Side::Connector).ours;
    let asked = Request::decode(&packet, &key).unwrap();
    let good = Reply {
        vmm_progress: 9,
        ..Reply::to(&asked)
    };
    let mut flipped = good.encode(&key);
    flipped[50] ^= 4;
    for (counter, bad) in [
        (
            "unmatched",
            Reply {
                nonce: asked.nonce ^ 1,
                ..good
            }
            .encode(&key),
        ),
        (
            "unmatched",
            Reply {
                sequence: asked.sequence + 1,
                ..good
            }
            .encode(&key),
        ),
        ("forged", good.encode(&Key::new([1; 16]))),
        ("forged", good.encode(&keys(Side::Connector).theirs)),
        ("forged", flipped),
        (
            "unknown_key",
            Reply {
                generation: KeyGeneration(2),
                ..good
            }
            .encode(&key),
        ),
    ] {
        let before = vmm.counter(counter);
        false_responder.send_to(&bad, from).unwrap();
        wait_until(&format!("{counter} to be counted"), || {
            vmm.counter(counter) == before + 1
        })
        .unwrap();
        assert_eq!(prober.beat().peer, None, "{counter}");
    }
    // The beats above have moved the window on, but not past this request.
    false_responder.send_to(&good.encode(&key), from).unwrap();
    let seen = beat_until("the true reply", &mut prober, |o| o.peer.is_some());
    assert_eq!(seen.peer.unwrap().vmm_progress, 9);
    let replays = vmm.counter("replayed");
    false_responder.send_to(&good.encode(&key), from).unwrap();
    wait_until("the replay to be counted", || {
        vmm.counter("replayed") == replays + 1
    })
    .unwrap();
    assert_eq!(vmm.pages.seen.reply().unwrap().count, 1);
}
