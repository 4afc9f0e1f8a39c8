//! What must arrive, and how.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::sync::{Arc, Barrier};

use format::SessionId;

use super::*;

fn talk(listen: SocketAddr) {
    let b = Setup::new("pollux").listen(listen).start();
    let a = Setup::new("castor")
        .listen(listen)
        .knows("pollux", b.address())
        .start();
    assert!(a.link.send(&host("pollux"), &message(1)));
    assert!(matches!(
        a.event(),
        LinkEvent::Connected { peer, dialed: true, .. } if peer == host("pollux")
    ));
    assert!(matches!(
        b.event(),
        LinkEvent::Connected { peer, dialed: false, .. } if peer == host("castor")
    ));
    assert_eq!(b.message(), (host("castor"), 1));
    // It has no address of castor.
    assert!(b.link.send(&host("castor"), &message(2)));
    assert_eq!(a.message(), (host("pollux"), 2));
    let counts = (a.link.counts(), b.link.counts());
    assert_eq!((counts.0.received, counts.1.received), (1, 1));
    assert_eq!((counts.0.dropped, counts.1.rejected), (0, 0));
}

#[test]
fn a_host_that_is_not_in_the_list_is_answered_on_its_own_connection() {
    talk("127.0.0.1:0".parse().unwrap());
}

#[test]
fn ipv6_works_as_well() {
    if std::net::TcpListener::bind("[::1]:0").is_err() {
        println!("skipped: no IPv6 here");
        return;
    }
    talk("[::1]:0".parse().unwrap());
}

#[test]
fn an_ipv6_wildcard_takes_ipv4() {
    if std::net::TcpListener::bind("[::]:0").is_err() {
        println!("skipped: no IPv6 here");
        return;
    }
    let b = Setup::new("pollux")
        .listen("[::]:0".parse().unwrap())
        .start();
    let to = SocketAddr::from(([127, 0, 0, 1], b.address().port()));
    let a = Setup::new("castor").knows("pollux", to).start();
    a.link.send(&host("pollux"), &message(1));
    assert_eq!(b.message().1, 1);
}

#[test]
fn messages_arrive_in_their_order_whatever_their_size() {
    let b = Setup::new("pollux").start();
    let a = Setup::new("castor").knows("pollux", b.address()).start();
    let long = |n: u64| PeerMessage::GaveUp {
        session: SessionId([1; 16]),
        cause: ft::Cause::Diverged,
        report: Some(ft::DivergenceReport {
            exit: format::ExitNumber(n),
            expected: 1,
            actual: 2,
            text: "x".repeat(n as usize % ft::MAX_REPORT_LEN),
        }),
    };
    for n in (0..4000).step_by(20) {
        let n = n * 131;
        while !a.link.send(&host("pollux"), &long(n)) {
            std::thread::yield_now();
        }
    }
    for n in (0..4000).step_by(20) {
        let got = b.wait(|event| match event {
            LinkEvent::Message { message, .. } => Some(message),
            _ => None,
        });
        assert_eq!(got, long(n * 131));
    }
}

#[test]
fn two_hosts_that_dial_each_other_at_once_lose_nothing() {
    const MESSAGES: u64 = 100;
    // Each must know the other's address before either listens. Nobody else uses this one.
    let reserve = || std::net::TcpListener::bind("127.0.0.3:0").unwrap();
    let (hold_a, hold_b) = (reserve(), reserve());
    let (at_a, at_b) = (hold_a.local_addr().unwrap(), hold_b.local_addr().unwrap());
    drop((hold_a, hold_b));
    let a = Setup::new("castor")
        .listen(at_a)
        .knows("pollux", at_b)
        .start();
    let b = Setup::new("pollux")
        .listen(at_b)
        .knows("castor", at_a)
        .start();
    let start = Arc::new(Barrier::new(2));
    std::thread::scope(|scope| {
        for (link, to) in [(&a.link, "pollux"), (&b.link, "castor")] {
            let start = Arc::clone(&start);
            scope.spawn(move || {
                start.wait();
                for n in 0..MESSAGES {
                    assert!(link.send(&host(to), &message(n)));
                }
            });
        }
    });
    for node in [&a, &b] {
        let mut got: Vec<u64> = (0..MESSAGES).map(|_| node.message().1).collect();
        got.sort_unstable();
        assert_eq!(got, (0..MESSAGES).collect::<Vec<_>>());
        assert_eq!(node.link.counts().dropped, 0);
    }
}

#[test]
fn the_second_address_of_a_host_serves_where_the_first_does_not() {
    let b = Setup::new("pollux").start();
    let dead = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let mut setup = Setup::new("castor").knows("pollux", dead);
    setup.peers[0].1.push(b.address());
    let a = setup.start();
    a.link.send(&host("pollux"), &message(1));
    assert_eq!(b.message(), (host("castor"), 1));
}

#[test]
fn a_bulk_connection_is_handed_over_with_every_byte_after_the_handshake() {
    const LEN: usize = 8 << 20;
    let b = Setup::new("pollux").start();
    let a = Setup::new("castor").knows("pollux", b.address()).start();
    let session = SessionId([9; 16]);
    let data: Vec<u8> = (0..LEN).map(|i| (i * 31 / 7) as u8).collect();
    std::thread::scope(|scope| {
        let link = &a.link;
        let data = &data;
        scope.spawn(move || {
            let mut stream = link.open_bulk(&host("pollux"), session).unwrap();
            stream.write_all(data).unwrap();
        });
        let (from, of, mut stream) = b.wait(|event| match event {
            LinkEvent::Bulk {
                from,
                session,
                stream,
            } => Some((from, session, stream)),
            _ => None,
        });
        assert_eq!((from, of), (host("castor"), session));
        assert_eq!(stream.read_timeout().unwrap(), None);
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        assert!(got == *data, "{} bytes", got.len());
    });
    let error = a.link.open_bulk(&host("helen"), session).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
}
