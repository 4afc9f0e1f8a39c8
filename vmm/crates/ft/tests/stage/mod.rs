//! A stage for protocol tests: a few replicas on one clock, whose drivers do at once what they are
//! asked, unless a test withholds it. Messages arrive after a millisecond, in order.
//!
//! The simulator is where things go wrong by chance; here a test says exactly what goes wrong.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use format::{AckRecord, ExitNumber, Seq, SessionId};
use ft::directory::{DirectoryCall, DirectoryStep, FileOp, FileResult, MARKER};
use ft::{
    Action, Actions, ArbiterReply, ArbiterRequest, CallId, Config, EpochRecord, Event, GateMode,
    HeartbeatReply, HostId, Incarnation, Leave, Mark, Notice, PeerMessage, Replica, RoleName,
    SectorRange, Tenure, Time, VmmSign,
};

pub const MS: u64 = 1_000_000;

pub fn host(name: &str) -> HostId {
    name.parse().unwrap()
}

/// What one host's driver has seen and done.
pub struct Node {
    pub replica: Replica,
    pub gate: GateMode,
    pub notices: Vec<Notice>,
    pub acts: Vec<String>,
    pub alive: bool,
    /// The VMM's event loop stands still; the kernel answers.
    pub stopped: bool,
    pub world_usable: bool,
    pub guest_off: bool,
    pub live: Option<EpochRecord>,
    pub ended: Option<Leave>,
    /// Writes that the guest has outstanding when the log is drained.
    pub writes: Vec<SectorRange>,
    inbox: VecDeque<(u64, Event)>,
    session: Option<SessionId>,
    log: u64,
    closed: bool,
    progress: u64,
}

pub struct Stage {
    pub now: u64,
    pub nodes: BTreeMap<HostId, Node>,
    pub files: BTreeMap<String, Vec<u8>>,
    /// Hosts from which the arbiter cannot be reached.
    pub arbiter_cut: BTreeSet<HostId>,
    /// Pairs between which nothing passes, in either direction.
    pub cut: BTreeSet<(HostId, HostId)>,
    /// Names of actions that no driver answers, by host.
    pub withheld: BTreeSet<(HostId, &'static str)>,
    /// The directory is seen as it was before there were records.
    pub records_unseen: bool,
    /// Hosts whose claims are on their way to the directory until [`Stage::land`].
    pub claims_held: BTreeSet<HostId>,
    held: Vec<(HostId, CallId, ArbiterRequest)>,
    /// Acknowledgements do not arrive.
    pub acks_stopped: bool,
    /// Backups receive, and replay no further than here.
    pub replay_stopped_at: Option<u64>,
    made: u128,
}

impl Stage {
    pub fn new() -> Self {
        Self {
            now: MS,
            nodes: BTreeMap::new(),
            files: BTreeMap::from([(MARKER.to_owned(), vec![])]),
            arbiter_cut: BTreeSet::new(),
            cut: BTreeSet::new(),
            withheld: BTreeSet::new(),
            records_unseen: false,
            claims_held: BTreeSet::new(),
            held: Vec::new(),
            acks_stopped: false,
            replay_stopped_at: None,
            made: 0,
        }
    }

    pub fn config(me: &str) -> Config {
        let all = ["castor", "pollux", "helen"].map(host);
        Config::new(host(me), all.to_vec())
    }

    /// A stage on which castor is protected by pollux, with helen as another standby.
    pub fn protected() -> Self {
        let mut stage = Self::new();
        stage.boot(Self::config("castor"));
        stage.standby(Self::config("pollux"));
        stage.standby(Self::config("helen"));
        stage.run_until(2000, |stage| stage.status("castor") == "protected");
        stage.run(200);
        stage
    }

    pub fn boot(&mut self, config: Config) {
        self.add(config, true);
    }

    pub fn standby(&mut self, config: Config) {
        self.add(config, false);
    }

    fn add(&mut self, config: Config, boot: bool) {
        self.made += 1;
        let (me, incarnation) = (config.me, Incarnation(self.made << 64));
        let replica = if boot {
            Replica::boot(config, incarnation)
        } else {
            Replica::standby(config, incarnation)
        };
        let node = Node {
            replica,
            gate: GateMode::Shut,
            notices: Vec::new(),
            acts: Vec::new(),
            alive: true,
            stopped: false,
            world_usable: true,
            guest_off: false,
            live: None,
            ended: None,
            writes: Vec::new(),
            inbox: VecDeque::new(),
            session: None,
            log: 0,
            closed: false,
            progress: 0,
        };
        self.nodes.insert(me, node);
        self.tell(me, Event::Tick);
    }

    pub fn node(&mut self, name: &str) -> &mut Node {
        self.nodes.get_mut(&host(name)).unwrap()
    }

    pub fn status(&self, name: &str) -> &'static str {
        self.nodes[&host(name)].replica.status().state
    }

    pub fn session_of(&self, name: &str) -> Option<SessionId> {
        self.nodes[&host(name)].session
    }

    pub fn role(&self, name: &str) -> RoleName {
        self.nodes[&host(name)].replica.status().role
    }

    pub fn epoch(&self, name: &str) -> u64 {
        self.nodes[&host(name)].replica.status().epoch.unwrap().0
    }

    /// Whether a standby may be named.
    pub fn confirmed(&self, name: &str) -> bool {
        self.nodes[&host(name)].replica.status().protected
    }

    pub fn kill(&mut self, name: &str) {
        self.node(name).alive = false;
    }

    pub fn part(&mut self, a: &str, b: &str) {
        self.cut.insert((host(a), host(b)));
        self.cut.insert((host(b), host(a)));
    }

    pub fn withhold(&mut self, name: &str, action: &'static str) {
        self.withheld.insert((host(name), action));
    }

    /// The session of a host, as its driver knows it.
    pub fn session(&self, name: &str) -> SessionId {
        self.nodes[&host(name)].session.unwrap()
    }

    /// The records in their order.
    pub fn records(&self) -> Vec<EpochRecord> {
        let named = self.files.iter();
        named
            .filter(|(name, _)| name.starts_with("epoch-"))
            .map(|(_, bytes)| EpochRecord::decode(bytes).unwrap())
            .collect()
    }

    pub fn newest(&self) -> EpochRecord {
        self.records().pop().unwrap()
    }

    /// Hosts that may release effects of the VM now.
    pub fn acting(&self) -> Vec<&'static str> {
        ["castor", "pollux", "helen"]
            .into_iter()
            .filter(|name| {
                let node = self.nodes.get(&host(name));
                node.is_some_and(|node| {
                    node.alive && node.live.is_some() && node.gate == GateMode::Open
                })
            })
            .collect()
    }

    pub fn run_until(&mut self, ms: u64, done: impl Fn(&Self) -> bool) {
        for _ in 0..ms {
            if done(self) {
                return;
            }
            self.run(1);
        }
        let states: Vec<_> = self
            .nodes
            .iter()
            .map(|(h, n)| (*h, n.replica.status()))
            .collect();
        panic!("not within {ms} ms: {states:#?}");
    }

    pub fn run(&mut self, ms: u64) {
        for _ in 0..ms {
            self.now += MS;
            let hosts: Vec<_> = self.nodes.keys().copied().collect();
            for me in hosts {
                self.log(me);
                self.deliver(me);
            }
            let acting = self.acting();
            assert!(acting.len() <= 1, "two act: {acting:?}");
        }
    }

    /// The guest makes an append each millisecond; the backup has it, acknowledges, and has replayed
    /// it at once.
    fn log(&mut self, me: HostId) {
        let Some((session, mut log)) = self.nodes.get(&me).and_then(|node| {
            let logs = node.alive && !node.stopped && node.replica.record().is_some();
            node.session
                .filter(|_| logs)
                .map(|session| (session, node.log))
        }) else {
            return;
        };
        log += 1;
        let mark = Mark {
            next: Seq(log),
            exit: ExitNumber(log),
            ran: Duration::from_millis(log),
            at: Time(self.now),
        };
        self.nodes.get_mut(&me).unwrap().log = log;
        self.tell(me, Event::Appended { session, mark });
        let follows = |node: &Node| node.session == Some(session) && !node.closed;
        let peer = self
            .nodes
            .iter()
            .find(|(h, node)| **h != me && follows(node));
        let Some(peer) = peer.map(|(h, _)| *h) else {
            return;
        };
        let node = &self.nodes[&peer];
        if !node.alive || node.stopped || self.cut.contains(&(me, peer)) || self.acks_stopped {
            return;
        }
        self.nodes.get_mut(&peer).unwrap().log = log;
        let loading = self.withheld.contains(&(peer, "LoadState"));
        if !loading {
            let upto = Seq(log);
            self.tell(peer, Event::Replayed { session, upto });
        }
        let record = AckRecord {
            received: Seq(log),
            replayed: Seq(log.min(self.replay_stopped_at.unwrap_or(log))),
        };
        self.tell(me, Event::Acked { session, record });
        self.tell(
            me,
            Event::Released {
                session,
                upto: Seq(log),
            },
        );
    }

    fn deliver(&mut self, me: HostId) {
        let node = self.nodes.get_mut(&me).unwrap();
        if !node.alive || node.stopped {
            return;
        }
        node.progress += 1;
        loop {
            let node = self.nodes.get_mut(&me).unwrap();
            let due = node.inbox.front().is_some_and(|(at, _)| *at <= self.now);
            if !due {
                break;
            }
            let (_, event) = node.inbox.pop_front().unwrap();
            self.tell(me, event);
        }
        let deadline = self.nodes[&me].replica.next_deadline();
        if deadline.is_some_and(|at| at.0 <= self.now) {
            self.tell(me, Event::Tick);
        }
    }

    /// Brings an event to a replica now, and does what it asks.
    pub fn tell(&mut self, me: HostId, event: Event) {
        let mut out = Actions::new();
        let node = self.nodes.get_mut(&me).unwrap();
        node.replica.handle(Time(self.now), event, &mut out);
        while let Some(action) = out.pop() {
            self.act(me, action);
        }
    }

    fn answer(&mut self, me: HostId, event: Event) {
        let at = self.now + MS;
        self.nodes
            .get_mut(&me)
            .unwrap()
            .inbox
            .push_back((at, event));
    }

    fn act(&mut self, me: HostId, action: Action) {
        let debug = format!("{action:?}");
        let name: String = debug.chars().take_while(|c| c.is_alphanumeric()).collect();
        self.nodes.get_mut(&me).unwrap().acts.push(debug);
        if self
            .withheld
            .iter()
            .any(|(h, withheld)| *h == me && *withheld == name)
        {
            return self.act_without_answer(me, action);
        }
        match action {
            Action::Arbiter { call, request } => self.arbiter(me, call, request),
            Action::Send { to, message } => self.send(me, to, message),
            Action::Probe { peer, probe } => self.probe(me, peer, probe),
            Action::Gate(mode) => {
                self.nodes.get_mut(&me).unwrap().gate = mode;
                if let GateMode::Holding(session) = mode {
                    let at = Seq(self.nodes[&me].log);
                    self.answer(me, Event::GateHolds { session, at });
                }
            }
            Action::StartTransfer { session, .. } => {
                let start = Mark {
                    next: Seq(0),
                    exit: ExitNumber(0),
                    ran: Duration::ZERO,
                    at: Time(self.now),
                };
                let node = self.nodes.get_mut(&me).unwrap();
                (node.session, node.log) = (Some(session), 0);
                self.answer(me, Event::TransferStarted { session, start });
            }
            Action::CloseSession(session) => {
                let node = self.nodes.get_mut(&me).unwrap();
                node.closed = true;
                let end = Seq(node.log);
                self.answer(me, Event::SessionClosed { session, end });
            }
            Action::Drain { session, .. } => {
                let node = &self.nodes[&me];
                let (writes, guest_off) = (node.writes.clone(), node.guest_off);
                self.answer(
                    me,
                    Event::Drained {
                        session,
                        writes,
                        guest_off,
                    },
                );
            }
            Action::ProbeWorld => {
                let usable = self.nodes[&me].world_usable;
                self.answer(me, Event::WorldProbed { usable });
            }
            Action::GoLive(go) => {
                self.nodes.get_mut(&me).unwrap().live = Some(go.record);
                self.answer(me, Event::Live);
            }
            Action::Fence(other) => self.answer(me, Event::Fenced(other)),
            Action::Fold(_) => self.answer(me, Event::Folded),
            Action::Quiesce(why) => {
                let end = Seq(self.nodes[&me].log);
                self.answer(me, Event::Quiesced { why, end });
            }
            Action::Discard(_) => {
                self.act_without_answer(me, action);
                self.answer(me, Event::Discarded);
            }
            other => self.act_without_answer(me, other),
        }
    }

    fn act_without_answer(&mut self, me: HostId, action: Action) {
        let node = self.nodes.get_mut(&me).unwrap();
        match action {
            Action::Notice(notice) => node.notices.push(notice),
            Action::EndSession(_) => node.session = None,
            Action::LoadState { session, .. } => {
                (node.session, node.log, node.closed) = (Some(session), 0, false);
            }
            Action::Discard(_) => {
                (node.session, node.log, node.live) = (None, 0, None);
                node.gate = GateMode::Shut;
            }
            Action::End(leave) => node.ended = Some(leave),
            _ => {}
        }
    }

    fn send(&mut self, me: HostId, to: HostId, message: PeerMessage) {
        let up = self.nodes.get(&to).is_some_and(|node| node.alive);
        if up && !self.cut.contains(&(me, to)) {
            // What is sent is what is understood.
            let message = PeerMessage::decode(&mut message.encode().as_slice()).unwrap();
            self.answer(to, Event::Peer { from: me, message });
        }
    }

    fn probe(&mut self, me: HostId, peer: HostId, probe: u64) {
        let Some(node) = self.nodes.get(&peer) else {
            return;
        };
        let session = self.nodes[&me].session;
        if !node.alive || self.cut.contains(&(me, peer)) {
            return;
        }
        let reply = HeartbeatReply {
            probe,
            received_at: Time(self.now),
            vmm: VmmSign::Progress(node.progress),
            daemon: None,
        };
        if let Some(session) = session {
            self.answer(me, Event::Heartbeat { session, reply });
        }
    }

    /// The claims of a host that were on their way arrive, also where it has died since.
    pub fn land(&mut self, name: &str) {
        self.claims_held.remove(&host(name));
        let (mine, others) = std::mem::take(&mut self.held)
            .into_iter()
            .partition::<Vec<_>, _>(|(me, ..)| *me == host(name));
        assert!(!mine.is_empty(), "{name} claims nothing");
        self.held = others;
        for (me, call, request) in mine {
            self.arbiter(me, call, request);
        }
    }

    fn arbiter(&mut self, me: HostId, call: CallId, request: ArbiterRequest) {
        if self.claims_held.contains(&me) && matches!(request, ArbiterRequest::TryWin { .. }) {
            return self.held.push((me, call, request));
        }
        let reply = if self.arbiter_cut.contains(&me) {
            ArbiterReply::Unreachable("cut".to_owned())
        } else {
            self.ask_directory(me, call, request)
        };
        self.answer(me, Event::Arbiter { call, reply });
    }

    fn ask_directory(&mut self, me: HostId, id: CallId, request: ArbiterRequest) -> ArbiterReply {
        let mut call = DirectoryCall::new(me, id, request);
        let mut result = None;
        loop {
            match call.step(result.take()) {
                DirectoryStep::Do(op) => result = Some(self.file(op)),
                DirectoryStep::Answer { reply, .. } => return reply,
            }
        }
    }

    fn file(&mut self, op: FileOp) -> FileResult {
        match op {
            FileOp::List if self.records_unseen => FileResult::Names(vec![MARKER.to_owned()]),
            FileOp::List => FileResult::Names(self.files.keys().cloned().collect()),
            FileOp::Read(name) => match self.files.get(&name) {
                Some(bytes) => FileResult::Content(bytes.clone()),
                None => FileResult::NotFound,
            },
            FileOp::Create(name, bytes) => {
                self.files.insert(name, bytes);
                FileResult::Done
            }
            FileOp::Link(_, to) if self.files.contains_key(&to) => FileResult::Exists,
            FileOp::Link(from, to) => {
                let bytes = self.files[&from].clone();
                self.files.insert(to, bytes);
                FileResult::Done
            }
            FileOp::SyncFile(_) | FileOp::SyncDirectory => FileResult::Done,
        }
    }

    /// Whether a host's driver was asked for an action that begins so.
    pub fn did(&self, name: &str, action: &str) -> bool {
        let acts = &self.nodes[&host(name)].acts;
        acts.iter().any(|act| act.starts_with(action))
    }

    pub fn named_backup(&self) -> Option<HostId> {
        match self.newest().tenure {
            Tenure::Pair { backup, .. } => Some(backup),
            _ => None,
        }
    }
}
