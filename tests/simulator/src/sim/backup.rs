//! The backup's threads: takes the state, follows the log, goes live.
//!
//! It leaves an exit only when the log holds an entry for a later one (R1), takes a delta whole or not at
//! all (R2), and compares what its guest sends with what the log says that the primary's sent (R7).

use std::collections::VecDeque;

use format::{Assembler, Entry, EntryReader, Event as LogEvent, ExitNumber, SessionId};
use ft::canary::{self, Canary};
use ft::{DivergenceReport, Event};

use crate::guest::{Effect, Guest, Packet, encode_effects};
use crate::plan::US;

use super::{Chunk, Ev, Sim};

/// Packets kept because the primary may not have sent them.
const MAX_RECENT: usize = 4096;
/// Largest delta.
const MAX_DELTA: u64 = 1 << 16;

/// A replica that follows.
#[derive(Debug)]
pub(super) struct Follow {
    pub(super) session: SessionId,
    pub(super) guest: Option<Guest>,
    bytes: u64,
    pub(super) replayed: u64,
    pub(super) told: Option<u64>,
    pub(super) drain: Option<u64>,
    drained: bool,
    pub(super) diverged: bool,
    parts: Assembler,
    /// What left at the present exit, and waits for its entry.
    out: Vec<Effect>,
    pub(super) recent: VecDeque<(u64, Packet)>,
}

impl Follow {
    pub(super) fn new(session: SessionId) -> Self {
        Self {
            session,
            guest: None,
            bytes: 0,
            replayed: 0,
            told: None,
            drain: None,
            drained: false,
            diverged: false,
            parts: Assembler::new(MAX_DELTA),
            out: Vec::new(),
            recent: VecDeque::new(),
        }
    }

    /// Goes to `exit`; says what is wrong if the log is not this machine's.
    fn advance(&mut self, exit: u64) -> Result<u64, &'static str> {
        let Some(guest) = self.guest.as_mut() else {
            return Err("no state");
        };
        let mut exits = 0;
        while guest.exit < exit {
            if !self.out.is_empty() {
                return Err("the log has no entry for an exit that made output");
            }
            guest.run_to_exit(&mut self.out);
            exits += 1;
        }
        if guest.exit > exit && !canary::on(Canary::RunPastHorizon) {
            return Err("an entry for an exit that is behind");
        }
        Ok(exits)
    }

    /// Replays one append; returns the exits that it took.
    fn replay(&mut self, entry: &Entry<'_>) -> Result<u64, &'static str> {
        if let LogEvent::Part(part, data) = entry.event {
            if canary::on(Canary::PartialDelta) && part.offset == 0 {
                self.advance(entry.exit.0)?;
                if let Some(guest) = self.guest.as_mut() {
                    let _ = guest.load_point(&data[6..]);
                }
            }
            let whole = self.parts.push(entry.exit, part, data);
            if !whole.map_err(|_| "a part out of order")? {
                return Ok(0);
            }
            let staged = std::mem::replace(&mut self.parts, Assembler::new(MAX_DELTA));
            let entry = staged.whole().map_err(|_| "parts that are no entry")?;
            return self.replay(&entry);
        }
        let exits = self.advance(entry.exit.0)?;
        let Some(guest) = self.guest.as_mut() else {
            return Err("no state");
        };
        match entry.event {
            LogEvent::Output { bytes, crc, digest } => {
                let mut made = Vec::new();
                encode_effects(&self.out, &mut made);
                if made.len() != bytes as usize || format::crc32c(&made) != crc {
                    return Err("other output");
                }
                if guest.digest != digest {
                    return Err("other registers");
                }
                self.keep_recent();
            }
            LogEvent::Reached { digest } => {
                if guest.digest != digest {
                    return Err("other registers");
                }
                if !self.out.is_empty() {
                    return Err("output that the primary did not make");
                }
            }
            LogEvent::Delta(bytes) => {
                if !guest.load_point(bytes) {
                    return Err("a delta that is none");
                }
            }
            event => {
                if !guest.apply(&event) {
                    return Err("an event that does not fit");
                }
            }
        }
        Ok(exits)
    }

    fn keep_recent(&mut self) {
        let needs = self.replayed + 1;
        for effect in self.out.drain(..) {
            if let Effect::Net(packet) = effect {
                if self.recent.len() == MAX_RECENT {
                    self.recent.pop_front();
                }
                self.recent.push_back((needs, packet));
            }
        }
    }
}

/// Entries that only say what came in: their order within an exit is part of the log.
fn is_input(event: &LogEvent<'_>) -> bool {
    matches!(
        event,
        LogEvent::Time { .. }
            | LogEvent::Entropy { .. }
            | LogEvent::NetRx(_)
            | LogEvent::ConsoleRx(_)
            | LogEvent::DiskDone { .. }
    )
}

impl Sim {
    pub(super) fn follow(&mut self, host: usize) -> Option<&mut Follow> {
        self.hosts[host].vmm.as_mut()?.follow.as_deref_mut()
    }

    /// A piece of the state arrives; the next one is sent.
    pub(super) fn chunk(&mut self, mut chunk: Box<Chunk>) {
        let (from, to, session) = (chunk.from, chunk.to, chunk.session);
        let sends = self.hosts[from].vmm.as_ref().is_some_and(|vmm| {
            let of_session = vmm.log.as_ref().is_some_and(|log| log.session == session);
            vmm.inc == chunk.inc && of_session
        });
        if !sends {
            return;
        }
        let every = self.plan.options.chunk_us;
        let wait = self.work(from, every) + self.latency();
        let stands = self.hosts[from].vmm_paused.max(self.hosts[to].vmm_paused);
        let passes = self
            .net
            .passes(self.now, super::net::Flow::Messages, from, to);
        if stands > self.now || !passes {
            return self.after(wait, Ev::Chunk(chunk));
        }
        let Some(follow) = self.follow(to).filter(|follow| follow.session == session) else {
            self.log(from, format_args!("nobody takes the state on host{to}"));
            let why = "the connection was refused".to_owned();
            return self.tell(from, Event::TransferFailed { session, why });
        };
        chunk.left -= 1;
        follow.bytes += 1_000;
        let bytes = follow.bytes;
        if chunk.left > 0 {
            self.tell(to, Event::StateReceived { session, bytes });
            self.milestone(to, "state");
            return self.after(wait, Ev::Chunk(chunk));
        }
        follow.guest = Some(chunk.state);
        self.tell(to, Event::StateReceived { session, bytes });
        self.log(to, format_args!("the state is here"));
        self.milestone(to, "state complete");
        self.run_replay(to, 100 * US);
    }

    pub(super) fn run_replay(&mut self, host: usize, ns: u64) {
        let at = self.now + ns;
        if let Some(vmm) = self.hosts[host].vmm.as_mut()
            && vmm.follow.is_some()
            && vmm.replay_at > at
        {
            vmm.replay_at = at;
            let inc = vmm.inc;
            self.at(at, Ev::Replay(host, inc));
        }
    }

    /// The replica's thread: one frame, or the end of the log.
    pub(super) fn replay(&mut self, host: usize) {
        let now = self.now;
        let slow = self.hosts[host].slowness(now);
        let place = &mut self.hosts[host];
        let Some(vmm) = place.vmm.as_mut() else {
            return;
        };
        if vmm.replay_at > now {
            return;
        }
        vmm.replay_at = u64::MAX;
        let inc = vmm.inc;
        let Some(follow) = vmm.follow.as_mut().filter(|follow| !follow.diverged) else {
            return self.drained_if_so(host);
        };
        let Some(shm) = place
            .shm
            .as_mut()
            .filter(|shm| shm.session == follow.session)
        else {
            return;
        };
        if follow.guest.is_none() {
            return self.drained_if_so(host);
        }
        let Some(body) = shm.delivered.pop_front() else {
            if canary::on(Canary::RunPastHorizon)
                && let Some(guest) = follow.guest.as_mut()
            {
                guest.run_to_exit(&mut Vec::new());
            }
            return self.drained_if_so(host);
        };
        let mut exits = 0;
        let mut wrong = None;
        for entry in order(&body) {
            match follow.replay(&entry) {
                Ok(took) => exits += took,
                Err(why) => {
                    wrong = Some((entry.exit, why));
                    break;
                }
            }
            follow.replayed += 1;
        }
        shm.replayed = follow.replayed;
        if let Some((exit, why)) = wrong {
            follow.diverged = true;
            return self.diverged(host, exit, why);
        }
        self.check.replayed(follow.session, follow.replayed);
        let options = &self.plan.options;
        let exit_us = (options.exit_us.0 + options.exit_us.1) / 2;
        let cost = exits * exit_us * options.replay_percent / 100 + 20;
        self.acknowledge_soon(host, inc);
        self.wake_soon_if_draining(host);
        self.run_replay(host, cost * slow * US);
    }

    /// Replay progress is told at the loop's next turns; a turn comes soon enough but for the drain.
    fn wake_soon_if_draining(&mut self, host: usize) {
        let waits = self
            .follow(host)
            .is_some_and(|follow| follow.told.is_none());
        if waits {
            self.wake_soon(host);
        }
    }

    fn diverged(&mut self, host: usize, exit: ExitNumber, why: &str) {
        let Some(follow) = self.follow(host) else {
            return;
        };
        let session = follow.session;
        let report = DivergenceReport {
            exit,
            expected: 0,
            actual: 0,
            text: why.to_owned(),
        };
        self.log(host, format_args!("diverged: {why}"));
        self.tell(host, Event::Diverged { session, report });
        self.drained_if_so(host);
    }

    /// Tells when everything below the end is replayed.
    fn drained_if_so(&mut self, host: usize) {
        let Some(follow) = self.follow(host) else {
            return;
        };
        if follow.told.is_none() && follow.guest.is_some() {
            self.wake_soon(host);
        }
        let Some(follow) = self.follow(host) else {
            return;
        };
        let Some(end) = follow.drain else { return };
        let early = canary::on(Canary::DivergedCompetes);
        if follow.drained || (follow.replayed < end && !early) {
            return;
        }
        follow.drained = true;
        follow.parts.clear();
        let session = follow.session;
        let (writes, guest_off) = match &follow.guest {
            Some(guest) => (Self::outstanding_writes(guest), guest.off),
            None => (Vec::new(), false),
        };
        self.tell(
            host,
            Event::Drained {
                session,
                writes,
                guest_off,
            },
        );
        self.milestone(host, "drained");
    }
}

/// The entries of a body, in the order of the log: or, with a planted bug, in another one.
fn order(body: &[u8]) -> impl Iterator<Item = Entry<'_>> {
    let mut entries = EntryReader::new(body).map_while(Result::ok).peekable();
    let mut next = None;
    std::iter::from_fn(move || {
        if let Some(held) = next.take() {
            return Some(held);
        }
        let entry = entries.next()?;
        if canary::on(Canary::InputsReordered)
            && let Some(after) = entries.peek()
            && is_input(&entry.event)
            && is_input(&after.event)
            && after.exit == entry.exit
        {
            next = Some(entry);
            return entries.next();
        }
        Some(entry)
    })
}
