//! Clients of the VM: each has one request out, asks again when no answer comes, and remembers what it was
//! told.

use crate::guest::{KEYS, Packet, Request};
use crate::plan::{MS, US};
use crate::rng::mix2;

use super::{Ev, Sim};

/// After which an answer is asked for again.
const RETRY: u64 = 60 * MS;

/// A client.
#[derive(Debug)]
pub(super) struct Client {
    index: usize,
    number: u32,
    /// The request that is out, and since when.
    pub(super) out: Option<(Request, u64)>,
    /// When it does something next; other turns are void.
    turn_at: u64,
}

impl Client {
    pub(super) fn new(index: usize) -> Self {
        Self {
            index,
            number: 0,
            out: None,
            turn_at: u64::MAX,
        }
    }
}

impl Sim {
    pub(super) fn client_turn(&mut self, index: usize) {
        let (now, seed) = (self.now, self.plan.seed);
        let client = &mut self.clients[index];
        if client.turn_at != u64::MAX && client.turn_at != now {
            return;
        }
        match client.out {
            None => {
                client.number += 1;
                let random = mix2(mix2(seed, index as u64), u64::from(client.number));
                let request = Request {
                    client: client.index as u8,
                    number: client.number,
                    key: (random % KEYS as u64) as u8,
                    put: (random >> 8 & 1 == 0).then_some(random | 1),
                };
                client.out = Some((request, now));
                self.check.asks(&request);
                self.ask(request);
            }
            Some((request, _)) => self.ask(request),
        }
        self.turn_later(index, RETRY);
    }

    fn turn_later(&mut self, index: usize, ns: u64) {
        self.clients[index].turn_at = self.now + ns;
        self.after(ns, Ev::Client(index));
    }

    fn ask(&mut self, request: Request) {
        let ns = self.latency();
        let bytes = request.encode();
        self.after(ns, Ev::Request { bytes });
    }

    /// A request comes to the host that the switch knows for the VM's.
    pub(super) fn request(&mut self, bytes: &[u8; 15]) {
        let port = self.port;
        if self.hosts[port].world_gone > self.now {
            return;
        }
        if let Some(live) = self.live(port)
            && live.rx.len() < super::primary::MAX_RX
        {
            live.rx.push_back(*bytes);
        }
    }

    /// A packet of the VM is on the network.
    pub(super) fn send_to_client(&mut self, host: usize, packet: Packet) {
        self.port = host;
        let Some((client, _)) = packet.answers else {
            return;
        };
        let client = usize::from(client);
        if client < self.clients.len() {
            let ns = self.latency();
            self.after(ns, Ev::Reply { client, packet });
        }
    }

    pub(super) fn reply(&mut self, index: usize, packet: Packet) {
        let Some((request, _)) = self.clients[index].out else {
            return;
        };
        if packet.answers != Some((request.client, request.number)) {
            return;
        }
        self.seen.answers += 1;
        self.heal.answers += 1;
        self.check.answered(self.now, &request, &packet);
        self.clients[index].out = None;
        let think = self.rng.range(1, self.plan.options.think_us) * US;
        self.turn_later(index, think);
    }
}
