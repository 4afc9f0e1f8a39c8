//! The network between hosts: what passes, what does not, and when.
//!
//! Messages, the log and heartbeats are flows of their own: in order within one (but for heartbeats, which
//! are datagrams), not between them. What does not pass is lost for messages and heartbeats, which their
//! senders repeat; a frame of the log waits with its sender, as TCP's retransmission does, or is lost with
//! its connection.

use format::SessionId;
use ft::{Event, HeartbeatReply, PeerMessage, VmmSign};

use crate::plan::{Flows, MAX_HOSTS, US};

use super::{Ev, Sim};

/// Messages that wait for a VMM at the most: what a socket's buffers hold.
const MAX_INBOX: usize = 512;

/// Kinds of flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    Messages = 0,
    Log = 1,
    Beats = 2,
}

/// Between hosts.
#[derive(Debug, Default)]
pub(super) struct Net {
    cut_until: [[[u64; MAX_HOSTS]; MAX_HOSTS]; 3],
    last: [[[u64; MAX_HOSTS]; MAX_HOSTS]; 3],
    /// Until when a host does not reach the storage.
    pub(super) storage_cut: [u64; MAX_HOSTS],
}

impl Net {
    pub(super) fn cut(&mut self, from: usize, to: usize, flows: Flows, until: u64) {
        let kinds: &[Flow] = match flows {
            Flows::All => &[Flow::Messages, Flow::Log, Flow::Beats],
            Flows::Messages => &[Flow::Messages],
            Flows::Log => &[Flow::Log],
            Flows::Beats => &[Flow::Beats],
        };
        for kind in kinds {
            let cut = &mut self.cut_until[*kind as usize][from][to];
            *cut = until.max(*cut);
        }
    }

    pub(super) fn passes(&self, now: u64, flow: Flow, from: usize, to: usize) -> bool {
        self.cut_until[flow as usize][from][to] <= now
    }

    pub(super) fn heal(&mut self) {
        self.cut_until = Default::default();
        self.storage_cut = Default::default();
    }
}

impl Sim {
    pub(super) fn latency(&mut self) -> u64 {
        let options = &self.plan.options;
        let (base, jitter) = (options.latency_us * US, options.jitter_us * US);
        let jitter = if self.healed { jitter / 8 } else { jitter };
        base / 2 + self.rng.below(base + 1) + self.rng.below(jitter + 1)
    }

    /// When something that is sent now in a flow arrives, in order.
    pub(super) fn arrival(&mut self, flow: Flow, from: usize, to: usize) -> u64 {
        let at = self.now + self.latency();
        let last = &mut self.net.last[flow as usize][from][to];
        *last = at.max(*last);
        *last
    }

    pub(super) fn reaches_storage(&self, host: usize) -> bool {
        self.net.storage_cut[host] <= self.now
    }

    pub(super) fn send(&mut self, from: usize, to: usize, message: &PeerMessage) {
        let loss = if self.healed {
            0
        } else {
            self.plan.options.message_loss
        };
        if self.rng.chance(loss) || !self.net.passes(self.now, Flow::Messages, from, to) {
            self.log(from, format_args!("to host{to}, lost: {}", message.name()));
            return;
        }
        let at = self.arrival(Flow::Messages, from, to);
        // What is sent is what is understood.
        let bytes = message.encode();
        self.at(at, Ev::Message { from, to, bytes });
    }

    pub(super) fn message(&mut self, from: usize, to: usize, bytes: &[u8]) {
        let id = self.hosts[from].id;
        let Some(vmm) = self.hosts[to].vmm.as_mut() else {
            return;
        };
        if vmm.inbox.len() >= MAX_INBOX {
            return;
        }
        match PeerMessage::decode(&mut &*bytes) {
            Ok(message) => {
                vmm.inbox.push_back(Event::Peer { from: id, message });
                self.wake_soon(to);
            }
            Err(error) => {
                self.violated("format", format_args!("a message does not decode: {error}"))
            }
        }
    }

    pub(super) fn send_beat(&mut self, from: usize, to: usize, session: SessionId, probe: u64) {
        let options = &self.plan.options;
        let (loss, twice) = (options.beat_loss, options.beat_twice);
        let loss = if self.healed { 0 } else { loss };
        if self.rng.chance(loss) || !self.net.passes(self.now, Flow::Beats, from, to) {
            return;
        }
        let copies = 1 + u32::from(self.rng.chance(twice));
        for _ in 0..copies {
            let at = self.latency();
            self.after(
                at,
                Ev::Beat {
                    from,
                    to,
                    session,
                    probe,
                },
            );
        }
    }

    /// The kernel of `to` answers, whatever its processes do.
    pub(super) fn beat(&mut self, from: usize, to: usize, session: SessionId, probe: u64) {
        let host = &self.hosts[to];
        if !host.up || host.beats != Some(session) {
            return;
        }
        if !self.net.passes(self.now, Flow::Beats, to, from) {
            return;
        }
        let sign = match &host.vmm {
            Some(_) => VmmSign::Progress(host.progress),
            None => VmmSign::Dead,
        };
        let at = self.latency();
        self.after(
            at,
            Ev::BeatReply {
                to: from,
                session,
                probe,
                sign,
            },
        );
    }

    pub(super) fn beat_reply(&mut self, to: usize, session: SessionId, probe: u64, sign: VmmSign) {
        let received_at = self.hosts[to].clock(self.now);
        let Some(vmm) = self.hosts[to].vmm.as_mut() else {
            return;
        };
        if vmm.inbox.len() >= MAX_INBOX {
            return;
        }
        let reply = HeartbeatReply {
            probe,
            received_at,
            vmm: sign,
            daemon: None,
        };
        vmm.inbox.push_back(Event::Heartbeat { session, reply });
        self.wake_soon(to);
    }

    /// Traffic of the peer is a sign of life, where this world's probes look for it.
    pub(super) fn heard(&mut self, host: usize) {
        if self.plan.seed & 1 == 0 || self.now < self.hosts[host].heard_at + 10_000 * US {
            return;
        }
        self.hosts[host].heard_at = self.now;
        if let Some(vmm) = self.hosts[host].vmm.as_mut()
            && let Some((_, session)) = vmm.watched
            && vmm.inbox.len() < MAX_INBOX
        {
            vmm.inbox.push_back(Event::Heard(session));
            self.wake_soon(host);
        }
    }

    /// The peer's VMM is dead, and everything that it had is here.
    pub(super) fn peer_end(&mut self, to: usize, session: SessionId) {
        if let Some(vmm) = self.hosts[to].vmm.as_mut() {
            vmm.inbox.push_back(Event::PeerEnd(session));
            self.wake_soon(to);
        }
    }
}
