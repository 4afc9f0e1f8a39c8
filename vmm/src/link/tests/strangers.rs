//! Whoever does not have the key, or says what makes no sense.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};

use super::relay::Relay;
use super::*;
use crate::link::handshake::{self, Hello, LINK_VERSION, MAX_NOISE_LEN, Purpose};
use crate::link::{MAX_HANDSHAKES, until};

/// Says `bytes` to the node and returns what it answers.
fn say(node: &Node, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(node.address()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // The node may hang up before it has all.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    if let Err(error) = stream.read_to_end(&mut answer) {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    answer
}

fn framed(version: u16, len: u16, body: &[u8]) -> Vec<u8> {
    let mut out = b"PLXL".to_vec();
    out.extend_from_slice(&version.to_le_bytes());
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(body);
    out
}

#[test]
fn strangers_are_told_nothing_and_change_nothing() {
    let node = Setup::new("pollux").start();
    let long = [0xa5; 1 << 16];
    let sayings = [
        Vec::new(),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        long.to_vec(),
        framed(LINK_VERSION, 0, &[]),
        framed(LINK_VERSION, 100, &long[..100]),
        framed(LINK_VERSION, 100, &long[..50]),
        framed(LINK_VERSION, MAX_NOISE_LEN as u16, &long[..MAX_NOISE_LEN]),
        framed(
            LINK_VERSION,
            MAX_NOISE_LEN as u16 + 1,
            &long[..MAX_NOISE_LEN + 1],
        ),
        framed(LINK_VERSION, u16::MAX, &long),
        framed(LINK_VERSION + 1, 64, &long[..64]),
    ];
    for (n, bytes) in sayings.iter().enumerate() {
        assert_eq!(say(&node, bytes), b"", "saying {n}");
        node.rejected(n as u64 + 1);
    }
    node.nothing_was_delivered();
}

#[test]
fn a_host_with_another_key_is_rejected_by_both_sides() {
    let b = Setup::new("pollux").start();
    let a = Setup::new("castor")
        .key(2)
        .knows("pollux", b.address())
        .start();
    a.link.send(&host("pollux"), &message(1));
    b.rejected(1);
    let error = a
        .link
        .open_bulk(&host("pollux"), SessionId([1; 16]))
        .unwrap_err();
    assert_ne!(error.kind(), std::io::ErrorKind::NotFound);
    b.rejected(2);
    a.nothing_was_delivered();
    b.nothing_was_delivered();
    // It has no bearing on those who have the key.
    let c = Setup::new("helen").knows("pollux", b.address()).start();
    c.link.send(&host("pollux"), &message(2));
    assert_eq!(b.message(), (host("helen"), 2));
}

/// A listener that answers with what it was told, or with noise, is not taken for the peer.
#[test]
fn a_listener_without_the_key_is_noticed() {
    let liar = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let at = liar.local_addr().unwrap();
    let lies = std::thread::spawn(move || {
        for noise in [false, true] {
            let (mut stream, _) = liar.accept().unwrap();
            let mut said = [0; MAX_NOISE_LEN];
            let len = stream.read(&mut said).unwrap();
            let mut answer = framed(LINK_VERSION, 64, &[0x5a; 64]);
            if !noise {
                answer = said[..len].to_vec();
            }
            stream.write_all(&answer).unwrap();
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest);
            assert_eq!(rest, b"", "the dialer went on");
        }
    });
    let a = Setup::new("castor").knows("pollux", at).start();
    for _ in 0..2 {
        let error = a
            .link
            .open_bulk(&host("pollux"), SessionId([1; 16]))
            .unwrap_err();
        assert!(error.to_string().contains("same key"), "{error}");
    }
    lies.join().unwrap();
    a.nothing_was_delivered();
}

#[test]
fn a_recording_of_a_conversation_is_not_taken_for_one() {
    let b = Setup::new("pollux").start();
    let relay = Relay::start(b.address());
    let a = Setup::new("castor").knows("pollux", relay.address).start();
    a.link.send(&host("pollux"), &message(1));
    assert_eq!(b.message().1, 1);
    let recording = relay.heard();
    drop((a, relay));
    b.broken();
    let answer = say(&b, &recording);
    assert!(
        !answer.is_empty(),
        "the first message is good, so it was answered"
    );
    b.rejected(1);
    b.nothing_was_delivered();
}

/// What a host says to another cannot be played back to a third, nor to itself.
#[test]
fn a_hello_for_another_host_is_refused() {
    let helen = Setup::new("helen").start();
    let pollux = Setup::new("pollux")
        .knows("castor", helen.address())
        .start();
    let session = SessionId([1; 16]);
    let error = pollux.link.open_bulk(&host("castor"), session).unwrap_err();
    assert!(error.to_string().contains("is called helen"), "{error}");
    helen.nothing_was_delivered();
    let namesake = Setup::new("pollux").start();
    for (from, to, why) in [
        ("pollux", "pollux", "same name"),
        ("castor", "helen", "is called pollux"),
    ] {
        let stream = TcpStream::connect(namesake.address()).unwrap();
        let hello = Hello::new(host(from), host(to), Purpose::Messages);
        let result = handshake::dial(&stream, &key(1), &hello, until(PATIENCE));
        let error = result.err().expect("refused");
        assert!(error.to_string().contains(why), "{error}");
    }
    namesake.nothing_was_delivered();
}

#[test]
fn an_authentic_host_that_sends_too_much_is_cut_off() {
    let b = Setup::new("pollux").start();
    let stream = TcpStream::connect(b.address()).unwrap();
    let hello = Hello::new(host("castor"), host("pollux"), Purpose::Messages);
    let mut secured = handshake::dial(&stream, &key(1), &hello, until(PATIENCE)).unwrap();
    let mut bytes = message(1).encode();
    bytes.extend_from_slice(&message(2).encode()[..8]);
    bytes.extend_from_slice(&(ft::MAX_MESSAGE_LEN as u32 + 1).to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    secured.sealer.write(&mut &stream, &bytes).unwrap();
    assert_eq!(b.message().1, 1);
    assert!(b.broken().contains("the limit is"));
}

#[test]
fn those_who_say_nothing_keep_nobody_out() {
    let b = Setup::new("pollux")
        .times(|times| times.handshake = Duration::from_secs(3600))
        .start();
    let mute: Vec<_> = (0..2 * MAX_HANDSHAKES)
        .map(|_| TcpStream::connect(b.address()).unwrap())
        .collect();
    let a = Setup::new("castor").knows("pollux", b.address()).start();
    a.link.send(&host("pollux"), &message(1));
    assert_eq!(b.message().1, 1);
    assert!(b.link.counts().rejected >= MAX_HANDSHAKES as u64);
    drop(mute);
}

#[test]
fn who_says_nothing_is_hung_up_on_in_time() {
    let b = Setup::new("pollux")
        .times(|times| times.handshake = Duration::from_millis(50))
        .start();
    let mut mute = TcpStream::connect(b.address()).unwrap();
    mute.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(mute.read(&mut [0; 1]).unwrap(), 0);
    b.rejected(1);
}
