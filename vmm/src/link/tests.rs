//! Links over loopback, with relays, strangers and recordings between them.

mod failures;
mod relay;
mod strangers;
mod traffic;

use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use format::{Epoch, Seq, SessionId};
use ft::{HostId, PeerMessage};

use super::{Key, Link, LinkConfig, LinkEvent, LinkTimes};

/// How long a test waits for what must come.
const PATIENCE: Duration = Duration::from_secs(30);

fn host(name: &str) -> HostId {
    name.parse().unwrap()
}

fn key(byte: u8) -> Key {
    Key::derive(&[byte; 32]).unwrap()
}

/// Message number `n`.
fn message(n: u64) -> PeerMessage {
    PeerMessage::Progress {
        session: SessionId([7; 16]),
        epoch: Epoch(3),
        named: true,
        released: Seq(n),
    }
}

fn number(message: &PeerMessage) -> u64 {
    match message {
        PeerMessage::Progress { released, .. } => released.0,
        other => panic!("not one of the test's messages: {other:?}"),
    }
}

/// A link and what it delivers.
struct Node {
    link: Link,
    events: Receiver<LinkEvent>,
}

/// What a node is made of.
struct Setup {
    name: &'static str,
    listen: SocketAddr,
    key: Key,
    peers: Vec<(HostId, Vec<SocketAddr>)>,
    times: LinkTimes,
}

impl Setup {
    fn new(name: &'static str) -> Self {
        Self {
            name,
            listen: "127.0.0.1:0".parse().unwrap(),
            key: key(1),
            peers: Vec::new(),
            times: LinkTimes::default(),
        }
    }

    fn knows(mut self, name: &str, address: SocketAddr) -> Self {
        self.peers.push((host(name), vec![address]));
        self
    }

    fn key(mut self, byte: u8) -> Self {
        self.key = key(byte);
        self
    }

    fn listen(mut self, address: SocketAddr) -> Self {
        self.listen = address;
        self
    }

    fn times(mut self, change: impl FnOnce(&mut LinkTimes)) -> Self {
        change(&mut self.times);
        self
    }

    fn start(self) -> Node {
        let (sender, events) = channel();
        let config = LinkConfig {
            me: host(self.name),
            listen: self.listen,
            key: self.key,
            peers: self.peers,
            times: self.times,
        };
        let deliver = Box::new(move |event| {
            // The test may be over.
            let _ = sender.send(event);
        });
        let link = Link::start(config, deliver).unwrap();
        Node { link, events }
    }
}

impl Node {
    fn address(&self) -> SocketAddr {
        self.link.local_addr()
    }

    fn event(&self) -> LinkEvent {
        self.events.recv_timeout(PATIENCE).expect("an event")
    }

    /// The next event that `pick` takes; others are passed over.
    fn wait<T>(&self, pick: impl Fn(LinkEvent) -> Option<T>) -> T {
        loop {
            if let Some(picked) = pick(self.event()) {
                return picked;
            }
        }
    }

    fn message(&self) -> (HostId, u64) {
        self.wait(|event| match event {
            LinkEvent::Message { from, message } => Some((from, number(&message))),
            _ => None,
        })
    }

    fn broken(&self) -> String {
        self.wait(|event| match event {
            LinkEvent::Broken { why, .. } => Some(why),
            _ => None,
        })
    }

    /// Sends messages from `first` on until one is delivered at `to`, as the protocol does.
    fn send_until_delivered(&self, to: &Node, name: &str, first: u64) {
        for n in first.. {
            self.link.send(&host(name), &message(n));
            while let Ok(event) = to.events.recv_timeout(Duration::from_millis(50)) {
                if matches!(&event, LinkEvent::Message { message, .. } if number(message) >= first)
                {
                    return;
                }
            }
            assert!(n < first + 600, "nothing is delivered");
        }
    }

    fn nothing_was_delivered(&self) {
        if let Ok(event) = self.events.try_recv() {
            panic!("delivered: {event:?}");
        }
    }

    /// Waits until so many connections were rejected.
    fn rejected(&self, count: u64) {
        let until = std::time::Instant::now() + PATIENCE;
        while self.link.counts().rejected < count {
            assert!(
                std::time::Instant::now() < until,
                "{:?}",
                self.link.counts()
            );
            std::thread::yield_now();
        }
    }
}
