//! Connections that break, hosts that vanish, and what happens to messages meanwhile.

use std::net::TcpListener;
use std::time::Instant;

use super::relay::Relay;
use super::*;

fn impatient(times: &mut LinkTimes) {
    times.ping = Duration::from_millis(20);
    times.silence = Duration::from_millis(400);
    times.handshake = Duration::from_millis(400);
}

#[test]
fn a_half_open_connection_is_noticed_by_both_sides_and_made_anew() {
    let b = Setup::new("pollux").times(impatient).start();
    let relay = Relay::start(b.address());
    let a = Setup::new("castor")
        .times(impatient)
        .knows("pollux", relay.address)
        .start();
    a.link.send(&host("pollux"), &message(1));
    assert_eq!(b.message().1, 1);
    relay.freeze(true);
    for node in [&a, &b] {
        assert!(node.broken().contains("nothing came"));
    }
    relay.freeze(false);
    a.send_until_delivered(&b, "pollux", 2);
}

#[test]
fn pings_keep_an_idle_connection() {
    const PING_LEN: usize = 18;
    let often = |times: &mut LinkTimes| {
        times.ping = Duration::from_millis(20);
        times.silence = Duration::from_secs(2);
    };
    let b = Setup::new("pollux").times(often).start();
    let relay = Relay::start(b.address());
    let a = Setup::new("castor")
        .times(often)
        .knows("pollux", relay.address)
        .start();
    a.link.send(&host("pollux"), &message(1));
    assert_eq!(b.message().1, 1);
    // They take longer than the silence that would break it.
    relay.wait_until_heard(relay.heard().len() + 110 * PING_LEN);
    b.nothing_was_delivered();
    a.link.send(&host("pollux"), &message(2));
    assert_eq!(b.message().1, 2);
}

#[test]
fn a_host_that_comes_back_is_reached_again() {
    // An address of its own: nobody else is given its port meanwhile.
    let own = "127.0.0.4:0".parse().unwrap();
    let b = Setup::new("pollux").listen(own).start();
    let at = b.address();
    let a = Setup::new("castor").knows("pollux", at).start();
    a.link.send(&host("pollux"), &message(1));
    assert_eq!(b.message().1, 1);
    drop(b);
    a.broken();
    // Refused for now: queued, and dropped with the attempt.
    a.link.send(&host("pollux"), &message(2));
    let until = Instant::now() + PATIENCE;
    while a.link.counts().dropped == 0 {
        assert!(Instant::now() < until);
        std::thread::yield_now();
    }
    let b = Setup::new("pollux").listen(at).start();
    a.send_until_delivered(&b, "pollux", 3);
}

#[test]
fn a_dialer_that_comes_back_takes_the_place_of_its_old_connection() {
    let b = Setup::new("pollux").start();
    let relay = Relay::start(b.address());
    let a = Setup::new("castor").knows("pollux", relay.address).start();
    a.link.send(&host("pollux"), &message(1));
    assert_eq!(b.message().1, 1);
    // The old host vanished without a word; pollux must not go on sending to it.
    relay.freeze(true);
    let again = Setup::new("castor").knows("pollux", b.address()).start();
    again.link.send(&host("pollux"), &message(2));
    let (mut delivered, mut why) = (None, None);
    while delivered.is_none() || why.is_none() {
        match b.event() {
            LinkEvent::Message { message, .. } => delivered = Some(number(&message)),
            LinkEvent::Broken { why: reason, .. } => why = Some(reason),
            _ => {}
        }
    }
    assert_eq!(delivered, Some(2));
    assert!(why.unwrap().contains("newer"));
    assert!(b.link.send(&host("castor"), &message(3)));
    assert_eq!(again.message().1, 3);
}

#[test]
fn a_queue_is_bounded_and_sending_never_waits() {
    // It lets itself be connected to, and says nothing.
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let a = Setup::new("castor")
        .times(|times| times.handshake = Duration::from_secs(3600))
        .knows("pollux", mute.local_addr().unwrap())
        .start();
    let queued = (0..1000)
        .filter(|n| a.link.send(&host("pollux"), &message(*n)))
        .count();
    assert_eq!(queued, crate::link::MAX_QUEUED_MESSAGES);
    assert_eq!(a.link.counts().dropped, 1000 - queued as u64);
    assert!(!a.link.send(&host("helen"), &message(0)), "an unknown host");
    // Ends the handshake, for which the link would wait.
    drop(mute);
}

#[test]
fn a_damaged_record_breaks_the_connection_and_is_not_delivered() {
    let b = Setup::new("pollux").start();
    let no_pings = |times: &mut LinkTimes| times.ping = PATIENCE;
    let probe = Relay::start(b.address());
    let a = Setup::new("castor")
        .times(no_pings)
        .knows("pollux", probe.address)
        .start();
    a.link.send(&host("pollux"), &message(1));
    assert_eq!(b.message().1, 1);
    let whole = probe.heard().len();
    drop(a);
    b.broken();
    // The last byte of the same first message.
    let relay = Relay::start(b.address());
    relay.damage(whole - 1);
    let a = Setup::new("castor")
        .times(no_pings)
        .knows("pollux", relay.address)
        .start();
    a.link.send(&host("pollux"), &message(1));
    assert!(b.broken().contains("not authentic"));
    b.nothing_was_delivered();
}

#[test]
fn dropping_a_link_ends_its_connections_and_frees_its_address() {
    let b = Setup::new("pollux").start();
    let at = b.address();
    let a = Setup::new("castor").knows("pollux", at).start();
    a.link.send(&host("pollux"), &message(1));
    assert_eq!(b.message().1, 1);
    drop(b.link);
    assert!(a.broken().contains("closed"));
    // All senders of its events are gone with its threads.
    while b.events.recv_timeout(PATIENCE).is_ok() {}
    assert!(matches!(
        b.events.try_recv(),
        Err(std::sync::mpsc::TryRecvError::Disconnected)
    ));
    TcpListener::bind(at).unwrap();
}
