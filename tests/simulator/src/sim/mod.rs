//! The world: hosts, network, storage and clients on one clock, driven by one queue of happenings.
//!
//! Nothing here decides anything about roles: the decisions are those of `ft::Replica`, the same code as
//! in the VMM, and what it asks for is done here as a VMM does it, only slower, later, or not at all.
//!
//! ```text
//!   phase of trouble ──plan.options.trouble_ms──► everything is repaired ──► redundancy must come back
//! ```

mod actions;
mod arbiter;
mod backup;
mod channel;
mod clients;
mod faults;
mod heal;
mod host;
mod net;
mod primary;
mod process;
mod record;
mod storage;
mod words;
mod world;

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use format::SessionId;
use ft::directory::{FileOp, FileResult};

use crate::check::{Checker, Violation};
use crate::guest::Guest;
use crate::plan::{MS, Plan, US};
use crate::rng::{Rng, mix2};
use crate::trace::Trace;

use clients::Client;
use host::Host;
use net::Net;
use storage::{IoOp, Store};

pub use heal::LIVENESS_MS;

/// Happenings of one run at the most: a run that does not end is a mistake of the simulator or a storm.
const MAX_EVENTS: u64 = 2_000_000;

/// Something that is going to happen. `inc` names the process that it is meant for.
#[derive(Debug)]
enum Ev {
    /// The VMM's event loop runs.
    Loop(usize, u32),
    /// The vCPU runs to its next point.
    Vcpu(usize, u32),
    /// The replica's thread runs.
    Replay(usize, u32),
    /// The I/O thread looks at the gate.
    Gate(usize, u32),
    /// The daemon sends what is published.
    Flush(usize, u32),
    /// The sender's daemon connects.
    Connect(usize, u32),
    /// The daemon commits what it has taken (a planted bug only).
    Commit(usize, u32, u64, Vec<u8>),
    /// The daemon acknowledges.
    Acknowledge(usize, u32),
    /// The daemon notices that its VMM is dead.
    Dead(usize, u32),
    Frame {
        to: usize,
        conn: u64,
        bytes: Vec<u8>,
    },
    Ack {
        to: usize,
        conn: u64,
        bytes: [u8; format::ACK_LEN],
    },
    /// The peer's daemon says that its VMM is dead.
    AckEnd {
        to: usize,
        session: SessionId,
    },
    Message {
        from: usize,
        to: usize,
        bytes: Vec<u8>,
    },
    Beat {
        from: usize,
        to: usize,
        session: SessionId,
        probe: u64,
    },
    BeatReply {
        to: usize,
        session: SessionId,
        probe: u64,
        sign: ft::VmmSign,
    },
    Chunk(Box<Chunk>),
    DirOp {
        host: usize,
        inc: u32,
        boot: u32,
        op: FileOp,
    },
    DirDone {
        host: usize,
        inc: u32,
        result: FileResult,
    },
    Io(IoOp),
    IoDone {
        op: IoOp,
        data: crate::guest::Sector,
    },
    ProbeWorld {
        host: usize,
        inc: u32,
    },
    GoLive {
        host: usize,
        inc: u32,
        go: Box<ft::GoLive>,
    },
    Fold {
        host: usize,
        inc: u32,
    },
    Fence {
        host: usize,
        inc: u32,
        target: usize,
    },
    Discard {
        host: usize,
        inc: u32,
    },
    Fault(usize),
    Trigger(crate::plan::FaultKind),
    StartHost(usize, u32),
    StartVmm(usize, u32),
    StartDaemon(usize, u32),
    Client(usize),
    Request {
        bytes: [u8; 15],
    },
    Reply {
        client: usize,
        packet: crate::guest::Packet,
    },
    Writeback {
        host: usize,
        boot: u32,
        name: String,
    },
    Heal,
    Operator,
}

/// A piece of the state on its way to a standby; the last one brings it.
#[derive(Debug)]
struct Chunk {
    from: usize,
    to: usize,
    inc: u32,
    session: SessionId,
    left: u64,
    state: Guest,
}

#[derive(Debug)]
struct Item {
    at: u64,
    order: u64,
    ev: Ev,
}

impl PartialEq for Item {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}

impl Eq for Item {}

impl PartialOrd for Item {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Item {
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    /// What was broken, if anything was.
    pub violation: Option<Violation>,
    /// Happenings.
    pub events: u64,
    /// Simulated time in ns.
    pub simulated_ns: u64,
    /// Faults at milestones that came, by their number.
    pub triggers: Vec<u64>,
    /// Milestones passed.
    pub milestones: u64,
    /// What was seen on the way: so that a world in which nothing happens is noticed.
    pub seen: Seen,
    /// The trace, if it was asked for.
    pub trace: Trace,
}

/// Counts of what makes a run worth its time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
#[allow(missing_docs)] // Named for what they are.
pub struct Seen {
    pub failovers: u64,
    pub alone: u64,
    pub protected: u64,
    pub cold_starts: u64,
    pub answers: u64,
    pub quarantined: u64,
    pub folded: u64,
    pub late_writes: u64,
    pub deltas: u64,
    pub divergences: u64,
    pub switch_overs: u64,
    pub power_offs: u64,
    pub renewals: u64,
}

/// The world.
#[derive(Debug)]
pub(crate) struct Sim {
    now: u64,
    order: u64,
    queue: BinaryHeap<Item>,
    rng: Rng,
    plan: Plan,
    hosts: Vec<Host>,
    net: Net,
    store: Store,
    clients: Vec<Client>,
    /// The host that the switch sends the VM's packets to.
    port: usize,
    check: Checker,
    trace: Trace,
    healed: bool,
    interrupted: bool,
    milestones: u64,
    triggers: Vec<u64>,
    incarnations: u32,
    conns: u64,
    births: Vec<(u64, u64)>,
    seen: Seen,
    heal: heal::Heal,
    scratch: Vec<u8>,
}

/// Runs the world of `plan` to its end.
#[must_use]
pub fn run(plan: &Plan, trace: bool) -> Outcome {
    let mut sim = Sim::new(plan.clone(), trace);
    let mut events = 0;
    while sim.check.violation.is_none() && !sim.heal.done {
        let Some(item) = sim.queue.pop() else { break };
        events += 1;
        debug_assert!(item.at >= sim.now, "time goes on");
        sim.now = item.at;
        sim.interrupted = false;
        sim.happen(item.ev);
        if events >= MAX_EVENTS {
            sim.violated(
                "storm",
                format_args!("the run does not end within {MAX_EVENTS} happenings"),
            );
        }
    }
    Outcome {
        violation: sim.check.violation.take(),
        events,
        simulated_ns: sim.now,
        triggers: sim.triggers,
        milestones: sim.milestones,
        seen: sim.seen,
        trace: sim.trace,
    }
}

impl Sim {
    fn new(plan: Plan, trace: bool) -> Self {
        let options = plan.options.clone();
        let mut sim = Self {
            now: MS,
            order: 0,
            queue: BinaryHeap::with_capacity(256),
            rng: Rng::new(plan.seed, 3),
            hosts: Vec::with_capacity(options.hosts),
            net: Net::default(),
            store: Store::new(),
            clients: (0..options.clients).map(Client::new).collect(),
            port: 0,
            check: Checker::new(),
            trace: Trace::new(trace),
            healed: false,
            interrupted: false,
            milestones: 0,
            triggers: Vec::new(),
            incarnations: 0,
            conns: 0,
            births: Vec::new(),
            seen: Seen::default(),
            heal: heal::Heal::default(),
            scratch: Vec::with_capacity(512),
            plan,
        };
        for index in 0..options.hosts {
            let drift = sim.rng.below(2 * options.drift_ppm + 1) as i64 - options.drift_ppm as i64;
            let offset = sim.rng.below(1 << 40);
            sim.hosts.push(Host::new(index, offset, drift));
        }
        for index in 0..options.hosts {
            sim.start_daemon(index);
            let boots = index == 0;
            sim.start_vmm(index, boots);
        }
        for index in 0..options.clients {
            sim.after(20 * MS + index as u64 * MS, Ev::Client(index));
        }
        for index in 0..sim.plan.faults.len() {
            let at = sim.plan.faults[index].at_us * US;
            sim.at(at.max(sim.now), Ev::Fault(index));
        }
        sim.at(options.trouble_ms * MS, Ev::Heal);
        sim
    }

    fn at(&mut self, at: u64, ev: Ev) {
        self.order += 1;
        let (at, order) = (at.max(self.now), self.order);
        self.queue.push(Item { at, order, ev });
    }

    fn after(&mut self, ns: u64, ev: Ev) {
        self.at(self.now + ns, ev);
    }

    /// About `us` microseconds of work on `host`, which may be starved: in ns.
    fn work(&mut self, host: usize, us: u64) -> u64 {
        let ns = self.rng.range(us * US / 2, us * US * 3 / 2);
        ns * self.hosts[host].slowness(self.now)
    }

    fn violated(&mut self, kind: &'static str, what: std::fmt::Arguments<'_>) {
        self.trace
            .line(self.now, None, "VIOLATION", format_args!("{kind}: {what}"));
        self.check.violated(kind, self.now, what);
    }

    fn log(&mut self, host: usize, what: std::fmt::Arguments<'_>) {
        if self.trace.on {
            let state = self.hosts[host].state();
            self.trace.line(self.now, Some(host), state, what);
        }
    }

    /// A moment at which things like to go wrong.
    fn milestone(&mut self, host: usize, name: &'static str) {
        self.milestones += 1;
        let number = self.milestones;
        let mute = self.plan.muted.contains(&number) || number >= self.plan.muted_from;
        let options = &self.plan.options;
        if self.healed || mute || (options.trigger == 0 && options.relapse == 0) {
            return;
        }
        let mut rng = Rng::new(mix2(self.plan.seed, number), 4);
        let kind = if rng.chance(options.trigger) {
            faults::at_milestone(&mut rng, host, options.hosts)
        } else if ["won", "go live"].contains(&name)
            && self.quarantines(host)
            && rng.chance(options.relapse)
        {
            faults::relapse(&mut rng, host)
        } else {
            return;
        };
        self.log(host, format_args!("trigger {number} at {name}: {kind:?}"));
        self.triggers.push(number);
        self.interrupted = true;
        self.after(0, Ev::Trigger(kind));
    }

    fn quarantines(&self, host: usize) -> bool {
        let vmm = self.hosts[host].vmm.as_ref();
        vmm.is_some_and(|vmm| vmm.replica.status().quarantine)
    }

    /// Whether a happening is for a thread of a process that stands still or is gone; it is put off, or
    /// dropped.
    fn gone_or_paused(&mut self, host: usize, inc: u32, ev: Ev) -> Option<Ev> {
        let place = &self.hosts[host];
        if place.vmm.as_ref().is_none_or(|vmm| vmm.inc != inc) {
            return None;
        }
        let until = place.vmm_paused;
        if until > self.now {
            self.at(until, ev);
            return None;
        }
        Some(ev)
    }

    fn daemon_gone_or_paused(&mut self, host: usize, inc: u32, ev: Ev) -> Option<Ev> {
        let place = &self.hosts[host];
        if place.daemon.as_ref().is_none_or(|daemon| daemon.inc != inc) {
            return None;
        }
        let until = place.daemon_paused;
        if until > self.now {
            self.at(until, ev);
            return None;
        }
        Some(ev)
    }

    fn happen(&mut self, ev: Ev) {
        let ev = match ev {
            Ev::Loop(host, inc)
            | Ev::Vcpu(host, inc)
            | Ev::Replay(host, inc)
            | Ev::Gate(host, inc)
            | Ev::ProbeWorld { host, inc }
            | Ev::GoLive { host, inc, .. }
            | Ev::Fold { host, inc }
            | Ev::Fence { host, inc, .. }
            | Ev::Discard { host, inc }
            | Ev::DirDone { host, inc, .. } => self.gone_or_paused(host, inc, ev),
            Ev::IoDone { op, .. } => self.gone_or_paused(op.host, op.inc, ev),
            Ev::Flush(host, inc)
            | Ev::Connect(host, inc)
            | Ev::Commit(host, inc, ..)
            | Ev::Acknowledge(host, inc)
            | Ev::Dead(host, inc) => self.daemon_gone_or_paused(host, inc, ev),
            other => Some(other),
        };
        let Some(ev) = ev else { return };
        self.dispatch(ev);
    }

    fn dispatch(&mut self, ev: Ev) {
        match ev {
            Ev::Loop(host, _) => self.turn(host),
            Ev::Vcpu(host, _) => self.vcpu(host),
            Ev::Replay(host, _) => self.replay(host),
            Ev::Gate(host, _) => self.gate_thread(host),
            Ev::Flush(host, _) => self.flush(host),
            Ev::Connect(host, _) => self.connect(host),
            Ev::Commit(host, _, next, body) => self.commit_late(host, next, body),
            Ev::Acknowledge(host, _) => self.acknowledge(host),
            Ev::Dead(host, _) => self.daemon_notices(host),
            Ev::Frame { to, conn, bytes } => self.frame(to, conn, bytes),
            Ev::Ack { to, conn, bytes } => self.ack(to, conn, &bytes),
            Ev::AckEnd { to, session } => self.peer_end(to, session),
            Ev::Message { from, to, bytes } => self.message(from, to, &bytes),
            Ev::Beat {
                from,
                to,
                session,
                probe,
            } => self.beat(from, to, session, probe),
            Ev::BeatReply {
                to,
                session,
                probe,
                sign,
            } => self.beat_reply(to, session, probe, sign),
            Ev::Chunk(chunk) => self.chunk(chunk),
            Ev::DirOp {
                host,
                inc,
                boot,
                op,
            } => self.dir_op(host, inc, boot, op),
            Ev::DirDone { host, result, .. } => self.dir_done(host, result),
            Ev::Io(op) => self.io(op),
            Ev::IoDone { op, data } => self.io_done(op, data),
            Ev::ProbeWorld { host, .. } => self.probe_world(host),
            Ev::GoLive { host, go, .. } => self.go_live(host, go),
            Ev::Fold { host, .. } => self.fold(host),
            Ev::Fence { host, target, .. } => self.fence(host, target),
            Ev::Discard { host, .. } => self.discard(host),
            Ev::Fault(index) => self.fault(self.plan.faults[index].kind),
            Ev::Trigger(kind) => self.fault(kind),
            Ev::StartHost(host, boot) => self.start_host(host, boot),
            Ev::StartVmm(host, ticket) => self.start_vmm_if(host, ticket),
            Ev::StartDaemon(host, boot) => self.start_daemon_if(host, boot),
            Ev::Client(client) => self.client_turn(client),
            Ev::Request { bytes } => self.request(&bytes),
            Ev::Reply { client, packet } => self.reply(client, packet),
            Ev::Writeback { host, boot, name } => self.writeback(host, boot, &name),
            Ev::Heal => self.begin_heal(),
            Ev::Operator => self.operator(),
        }
    }
}

/// What the judges look at.
impl Sim {
    pub(crate) fn time(&self) -> u64 {
        self.now
    }

    pub(crate) fn checker(&mut self) -> &mut Checker {
        &mut self.check
    }

    pub(crate) fn host_name(&self, host: usize) -> ft::HostId {
        self.hosts[host].id
    }

    pub(crate) fn newest_record(&self) -> Option<ft::EpochRecord> {
        self.store.newest()
    }

    pub(crate) fn acts(&self, host: usize) -> bool {
        let vmm = self.hosts[host].vmm.as_ref();
        vmm.is_some_and(|vmm| vmm.replica.record().is_some())
    }

    pub(crate) fn follows_session(&self, host: usize, session: SessionId) -> bool {
        let vmm = self.hosts[host].vmm.as_ref();
        let follow = vmm.and_then(|vmm| vmm.follow.as_ref());
        follow.is_some_and(|follow| follow.session == session)
    }

    /// The host of a living process, other than `except`, which may go on with the VM by `base`.
    pub(crate) fn who_could_go_on(&self, base: &ft::EpochRecord, except: u32) -> Option<usize> {
        self.hosts.iter().position(|host| {
            let Some(vmm) = host.vmm.as_ref().filter(|vmm| vmm.inc != except) else {
                return false;
            };
            let acts = vmm.replica.record().is_some() && base.tenure != ft::Tenure::Closed;
            let owner = acts && self.check.holder(base) == Some(vmm.inc);
            let named = match base.tenure {
                ft::Tenure::Pair { backup, session } => {
                    let follow = vmm
                        .follow
                        .as_ref()
                        .filter(|follow| follow.session == session);
                    backup == host.id && follow.is_some() && vmm.replica.status().protected
                }
                _ => false,
            };
            owner || named
        })
    }
}
