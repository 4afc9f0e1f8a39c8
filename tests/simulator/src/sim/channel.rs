//! The logging channel: a daemon on each host, the memory that it shares with its VMM, one connection.
//!
//! As the real one does: what is published is sent whatever becomes of the VMM; a frame is checked, then
//! published to the VMM (the commit point), and only then acknowledged (R9); nothing is acknowledged for a
//! VMM that is dead (R10) or in a session that is closed (R13).

use std::collections::VecDeque;

use format::{
    AckRecord, Entry, Epoch, Event, Frame, FrameFlags, FrameHeader, Seq, SessionId, encode_frame,
};
use ft::canary::{self, Canary};

use crate::plan::{MS, US};

use super::net::Flow;
use super::{Ev, Sim};

/// Frames that wait for the replica at the most; more wait in the connection.
const MAX_DELIVERED: usize = 64;

/// Whether an append is a part of a delta, and not the first.
fn continues_a_delta(append: &[u8]) -> bool {
    let entry = Entry::decode(&mut &*append);
    entry.is_ok_and(|entry| matches!(entry.event, Event::Part(part, _) if part.offset > 0))
}

/// Which side of the log a host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Sender,
    Receiver,
}

/// What VMM and daemon share.
#[derive(Debug)]
pub(super) struct Shm {
    pub(super) session: SessionId,
    pub(super) epoch: Epoch,
    pub(super) role: Role,
    /// The standby's host, on the sender.
    pub(super) peer: usize,
    /// Appends that are not acknowledged: from `base` on.
    pub(super) appends: VecDeque<Vec<u8>>,
    pub(super) base: u64,
    pub(super) peer_replayed: u64,
    /// Every append below is visible to the replica.
    pub(super) committed: u64,
    pub(super) delivered: VecDeque<Vec<u8>>,
    pub(super) replayed: u64,
    pub(super) closed: bool,
    ended: bool,
}

impl Shm {
    pub(super) fn new(session: SessionId, epoch: Epoch, role: Role) -> Self {
        Self {
            session,
            epoch,
            role,
            peer: 0,
            appends: VecDeque::new(),
            base: 0,
            peer_replayed: 0,
            committed: 0,
            delivered: VecDeque::new(),
            replayed: 0,
            closed: false,
            ended: false,
        }
    }
}

/// One end of a connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct Conn {
    pub(super) id: u64,
    peer: usize,
}

/// The daemon's process.
#[derive(Debug)]
pub(super) struct Daemon {
    pub(super) inc: u32,
    pub(super) conn: Option<Conn>,
    next_send: u64,
    pub(super) flushing: bool,
    acknowledging: bool,
    acked: AckRecord,
    /// It has noticed that its VMM is dead.
    mourns: bool,
    end_sent: bool,
    /// Frames that wait in the connection's buffers.
    held: VecDeque<(u64, Vec<u8>)>,
}

impl Daemon {
    pub(super) fn new(inc: u32) -> Self {
        Self {
            inc,
            conn: None,
            next_send: 0,
            flushing: false,
            acknowledging: false,
            acked: AckRecord::default(),
            mourns: false,
            end_sent: false,
            held: VecDeque::new(),
        }
    }

    /// A new session.
    pub(super) fn reset(&mut self) {
        *self = Self {
            flushing: self.flushing,
            acknowledging: self.acknowledging,
            ..Self::new(self.inc)
        };
    }
}

impl Sim {
    /// A connection is gone, on both sides; the sender connects again.
    pub(super) fn break_conn(&mut self, id: u64) {
        for host in 0..self.hosts.len() {
            let Some(daemon) = self.hosts[host].daemon.as_mut() else {
                continue;
            };
            if daemon.conn.is_some_and(|conn| conn.id == id) {
                daemon.conn = None;
                daemon.held.clear();
                let inc = daemon.inc;
                self.after(3 * MS, Ev::Connect(host, inc));
            }
        }
    }

    pub(super) fn drop_conn(&mut self, host: usize) {
        let conn = self.hosts[host]
            .daemon
            .as_ref()
            .and_then(|daemon| daemon.conn);
        if let Some(conn) = conn {
            self.break_conn(conn.id);
        }
    }

    /// The sender's daemon connects to the receiver's, which says how far it is.
    pub(super) fn connect(&mut self, host: usize) {
        let place = &self.hosts[host];
        let (Some(daemon), Some(shm)) = (&place.daemon, &place.shm) else {
            return;
        };
        if daemon.conn.is_some() || shm.role != Role::Sender {
            return;
        }
        let (inc, peer, session) = (daemon.inc, shm.peer, shm.session);
        let (base, next) = (shm.base, shm.base + shm.appends.len() as u64);
        let passes = self.net.passes(self.now, Flow::Log, host, peer)
            && self.net.passes(self.now, Flow::Log, peer, host);
        let there = &self.hosts[peer];
        let runs = there.daemon.is_some() && there.daemon_paused <= self.now;
        let any = canary::on(Canary::AcceptOldEpoch);
        let theirs = there.shm.as_ref().filter(|shm| {
            let open = shm.role == Role::Receiver && !shm.closed;
            open && (shm.session == session || any)
        });
        let at = theirs
            .map(|shm| shm.committed)
            .filter(|at| (base..=next).contains(at));
        let (true, true, Some(at)) = (passes, runs, at) else {
            return self.after(8 * MS, Ev::Connect(host, inc));
        };
        self.drop_conn(peer);
        self.conns += 1;
        let id = self.conns;
        if let Some(daemon) = self.hosts[peer].daemon.as_mut() {
            daemon.conn = Some(Conn { id, peer: host });
            daemon.held.clear();
            daemon.acked = AckRecord::default();
        }
        if let Some(daemon) = self.hosts[host].daemon.as_mut() {
            daemon.conn = Some(Conn { id, peer });
            daemon.next_send = at;
            daemon.end_sent = false;
        }
        self.log(host, format_args!("channel connects to host{peer} at {at}"));
        let wait = self.latency();
        self.after(wait, Ev::Flush(host, inc));
        self.acknowledge_soon(peer, 0);
    }

    /// Sends what is published.
    pub(super) fn flush(&mut self, host: usize) {
        let place = &mut self.hosts[host];
        let (Some(daemon), Some(shm)) = (place.daemon.as_mut(), place.shm.as_ref()) else {
            return;
        };
        daemon.flushing = false;
        let (Some(conn), Role::Sender) = (daemon.conn, shm.role) else {
            return;
        };
        let inc = daemon.inc;
        if !self.net.passes(self.now, Flow::Log, host, conn.peer) {
            daemon.flushing = true;
            return self.after(5 * MS, Ev::Flush(host, inc));
        }
        let most = self.plan.options.frame_appends;
        let skip = (daemon.next_send - shm.base) as usize;
        let mut body = Vec::new();
        let mut count = 0;
        for append in shm.appends.iter().skip(skip).take(most) {
            body.extend_from_slice(append);
            count += 1;
        }
        let first = Seq(daemon.next_send);
        let end = count == 0;
        if end && (!daemon.mourns || daemon.end_sent) {
            return;
        }
        daemon.end_sent |= end;
        daemon.next_send += u64::from(count);
        let header = FrameHeader {
            flags: if end {
                FrameFlags::END
            } else {
                FrameFlags::NONE
            },
            session: shm.session,
            epoch: shm.epoch,
            first,
            count,
            body_len: 0,
            stamp_ns: 0,
        };
        let mut bytes = Vec::with_capacity(body.len() + 72);
        encode_frame(header, &body, &mut bytes);
        let next = shm.appends.get(skip + count as usize);
        let within = next.is_some_and(|append| continues_a_delta(append));
        let more = skip + (count as usize) < shm.appends.len() || daemon.mourns;
        daemon.flushing = more && !end;
        if daemon.flushing {
            self.after(100 * US, Ev::Flush(host, inc));
        }
        let at = self.arrival(Flow::Log, host, conn.peer);
        let (to, conn) = (conn.peer, conn.id);
        self.at(at, Ev::Frame { to, conn, bytes });
        if within {
            self.milestone(host, "within a delta");
        }
    }

    /// A frame arrives.
    pub(super) fn frame(&mut self, to: usize, conn: u64, bytes: Vec<u8>) {
        let until = self.hosts[to].daemon_paused;
        if until > self.now {
            return self.at(until, Ev::Frame { to, conn, bytes });
        }
        let place = &mut self.hosts[to];
        let (Some(daemon), Some(shm)) = (place.daemon.as_mut(), place.shm.as_ref()) else {
            return;
        };
        let stale = daemon.conn.is_none_or(|mine| mine.id != conn);
        let any = canary::on(Canary::AcceptOldEpoch) || canary::on(Canary::AckAfterClose);
        if (stale && !any) || shm.role != Role::Receiver {
            return;
        }
        if shm.delivered.len() >= MAX_DELIVERED || !daemon.held.is_empty() {
            daemon.held.push_back((conn, bytes));
            return;
        }
        self.receive(to, conn, &bytes);
        self.heard(to);
    }

    /// Takes what waits in the connection, as far as there is room.
    pub(super) fn take_held(&mut self, host: usize) {
        loop {
            let place = &mut self.hosts[host];
            let (Some(daemon), Some(shm)) = (place.daemon.as_mut(), place.shm.as_ref()) else {
                return;
            };
            if shm.delivered.len() >= MAX_DELIVERED {
                return;
            }
            let Some((conn, bytes)) = daemon.held.pop_front() else {
                return;
            };
            self.receive(host, conn, &bytes);
        }
    }

    fn receive(&mut self, host: usize, conn: u64, bytes: &[u8]) {
        let place = &mut self.hosts[host];
        let (Some(daemon), Some(shm)) = (place.daemon.as_mut(), place.shm.as_mut()) else {
            return;
        };
        let any = canary::on(Canary::AcceptOldEpoch);
        let frame = match Frame::decode(&mut &*bytes) {
            Ok(frame) => frame,
            Err(error) => {
                return self.violated("format", format_args!("a frame does not decode: {error}"));
            }
        };
        let header = frame.header;
        let of_session = header.session == shm.session && header.epoch >= shm.epoch;
        // Who takes frames of other sessions has nothing to compare their numbers with.
        let in_order = header.first.0 == shm.committed || (any && !of_session);
        let closed = shm.closed && !canary::on(Canary::AckAfterClose);
        if !(of_session || any) || !in_order || closed {
            return self.break_conn(conn);
        }
        if header.flags.contains(FrameFlags::END) {
            shm.ended = true;
            let session = shm.session;
            self.log(
                host,
                format_args!("the peer's log has ended at {}", header.first),
            );
            return self.peer_end(host, session);
        }
        let (next, inc, body) = (header.next().0, daemon.inc, frame.body.to_vec());
        if canary::on(Canary::AckBeforePublish) {
            shm.committed = next;
            self.after(MS, Ev::Commit(host, inc, next, body));
        } else {
            self.commit(host, next, body);
        }
        self.acknowledge_soon(host, 0);
    }

    /// From here on a live replica sees the frame.
    fn commit(&mut self, host: usize, next: u64, body: Vec<u8>) {
        let place = &mut self.hosts[host];
        let Some(shm) = place.shm.as_mut() else {
            return;
        };
        shm.committed = next;
        shm.delivered.push_back(body);
        let mourns = place.daemon.as_ref().is_some_and(|daemon| daemon.mourns);
        if !mourns && !shm.closed {
            let session = shm.session;
            self.check.committed(session, next);
        }
        self.run_replay(host, 30 * US);
    }

    pub(super) fn commit_late(&mut self, host: usize, next: u64, body: Vec<u8>) {
        // The planted bug: what was acknowledged is published only now, unless the session is closed.
        if self.hosts[host].shm.as_ref().is_some_and(|shm| !shm.closed) {
            self.commit(host, next, body);
        }
    }

    pub(super) fn acknowledge_soon(&mut self, host: usize, _inc: u32) {
        self.take_held(host);
        let us = self.rng.range(10, 300);
        if let Some(daemon) = self.hosts[host].daemon.as_mut()
            && !daemon.acknowledging
        {
            daemon.acknowledging = true;
            let inc = daemon.inc;
            self.after(us * US, Ev::Acknowledge(host, inc));
        }
    }

    /// Sends the record, if it says anything new.
    pub(super) fn acknowledge(&mut self, host: usize) {
        let place = &mut self.hosts[host];
        let (Some(daemon), Some(shm)) = (place.daemon.as_mut(), place.shm.as_ref()) else {
            return;
        };
        daemon.acknowledging = false;
        let (Some(conn), Role::Receiver) = (daemon.conn, shm.role) else {
            return;
        };
        let dead = daemon.mourns && !canary::on(Canary::AckForDeadVmm);
        let closed = shm.closed && !canary::on(Canary::AckAfterClose);
        let record = AckRecord {
            received: Seq(shm.committed),
            replayed: Seq(shm.replayed.min(shm.committed)),
        };
        if dead || closed || record == daemon.acked {
            return;
        }
        let inc = daemon.inc;
        if !self.net.passes(self.now, Flow::Log, host, conn.peer) {
            daemon.acknowledging = true;
            return self.after(5 * MS, Ev::Acknowledge(host, inc));
        }
        daemon.acked = record;
        let bytes = record.encode(shm.session);
        let at = self.arrival(Flow::Log, host, conn.peer);
        let (to, conn) = (conn.peer, conn.id);
        self.at(at, Ev::Ack { to, conn, bytes });
    }

    /// An acknowledgement arrives at the sender's daemon, which gives the space back: used means
    /// replicated (R8).
    pub(super) fn ack(&mut self, to: usize, conn: u64, bytes: &[u8; format::ACK_LEN]) {
        let until = self.hosts[to].daemon_paused;
        if until > self.now {
            let bytes = *bytes;
            return self.at(until, Ev::Ack { to, conn, bytes });
        }
        let place = &mut self.hosts[to];
        let (Some(daemon), Some(shm)) = (place.daemon.as_ref(), place.shm.as_mut()) else {
            return;
        };
        let stale = daemon.conn.is_none_or(|mine| mine.id != conn);
        if stale || shm.role != Role::Sender {
            return;
        }
        let record = match AckRecord::decode(bytes, shm.session) {
            Ok(record) => record,
            Err(_) if canary::on(Canary::AcceptOldEpoch) => return,
            Err(error) => {
                return self.violated("format", format_args!("an acknowledgement: {error}"));
            }
        };
        while shm.base < record.received.0 && shm.appends.pop_front().is_some() {
            shm.base += 1;
        }
        shm.peer_replayed = shm.peer_replayed.max(record.replayed.0);
        let session = shm.session;
        self.check.acked(session, record.received.0);
        let us = self.work(to, 20) / US;
        self.run_gate(to, us * US);
        self.heard(to);
    }

    /// The daemon learns that its VMM is dead: it sends all that was published and an end, or, on the
    /// backup, acknowledges no more and says so.
    pub(super) fn daemon_notices(&mut self, host: usize) {
        let place = &mut self.hosts[host];
        if place.vmm.is_some() {
            return;
        }
        let Some(daemon) = place.daemon.as_mut() else {
            return;
        };
        daemon.mourns = true;
        let inc = daemon.inc;
        let Some(shm) = place.shm.as_ref() else {
            return;
        };
        let session = shm.session;
        match (shm.role, daemon.conn) {
            (Role::Sender, _) => self.after(0, Ev::Flush(host, inc)),
            (Role::Receiver, Some(conn)) => {
                if self.net.passes(self.now, Flow::Log, host, conn.peer) {
                    let at = self.arrival(Flow::Log, host, conn.peer);
                    let to = conn.peer;
                    self.at(at, Ev::AckEnd { to, session });
                }
            }
            (Role::Receiver, None) => {}
        }
    }
}
