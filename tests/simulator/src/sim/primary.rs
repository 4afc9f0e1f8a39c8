//! The primary's threads: the vCPU that runs the guest and records it, and the I/O thread with the gate.

use std::collections::VecDeque;
use std::time::Duration;

use format::{
    AckRecord, ControlOp, DiskStatus, Epoch, Event as LogEvent, ExitNumber, Seq, SessionId,
};
use ft::{AckTracker, Event, GateMode, LagControl, Mark, Pace, Quarantine, Quiesce};

use crate::guest::{Effect, Guest, Io, PAGES, Packet, Sector, WORDS};
use crate::plan::{MS, US};

use super::channel::{Role, Shm};
use super::host::Waiting;
use super::{Chunk, Ev, Sim};

/// Appends that wait for acknowledgement at the most: then the vCPU waits.
const MAX_LOG: usize = 400;
/// Packets that wait for the guest at the most.
pub(super) const MAX_RX: usize = 16;
/// Exits without an entry after which the log says `Reached`.
const REACHED_EVERY: u64 = 4;

/// A VM that runs.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) guest: Guest,
    /// Where sectors are.
    pub(super) map: Quarantine,
    pub(super) folding: bool,
    /// Own writes to the image that fold, not yet done.
    pub(super) fold_left: usize,
    /// Guest writes to quarantined sectors, which wait while these are folded.
    pub(super) waiting: Vec<Io>,
    /// Requests at the storage.
    pub(super) open: Vec<Io>,
    pub(super) rx: VecDeque<[u8; 15]>,
    pub(super) done: VecDeque<(u64, Option<Sector>)>,
    pub(super) inject: VecDeque<(ControlOp, Vec<u8>)>,
    pub(super) quiesce: Option<Quiesce>,
    pub(super) at_rest: bool,
    told_off: bool,
    /// A transfer is to begin at the next numbered exit.
    pub(super) begin: Option<(usize, SessionId, Epoch)>,
    /// How long the vCPU has run, in ns.
    pub(super) ran: u64,
    /// Run time not yet held against the lag control.
    unpaced: u64,
    clock: VirtualClock,
    live_from: u64,
}

/// Virtual time while the VM is live: goes with the host's clock, or up to a tenth faster while it is
/// behind (R6).
#[derive(Debug, Clone, Copy)]
struct VirtualClock {
    ns: u64,
    local: u64,
    behind: u64,
}

impl VirtualClock {
    fn now(&mut self, local: u64) -> u64 {
        let span = local.saturating_sub(self.local);
        let extra = (span / 10).min(self.behind);
        self.local = local;
        self.behind -= extra;
        self.ns += span + extra;
        self.ns
    }
}

/// The log of a session, on the primary.
#[derive(Debug)]
pub(super) struct Log {
    pub(super) session: SessionId,
    /// Appends made.
    pub(super) next: u64,
    pub(super) told: (u64, AckRecord, u64),
    pub(super) tracker: AckTracker,
    pub(super) pace: LagControl,
    quiet: u64,
    /// What the replica's pages hold at the present point.
    pub(super) pages: [[u64; WORDS]; PAGES],
}

impl Live {
    pub(super) fn new(guest: Guest, map: Quarantine, local: u64, behind: u64, now: u64) -> Self {
        let clock = VirtualClock {
            ns: guest.vtime,
            local,
            behind,
        };
        Self {
            guest,
            map,
            folding: false,
            fold_left: 0,
            waiting: Vec::new(),
            open: Vec::new(),
            rx: VecDeque::new(),
            done: VecDeque::new(),
            inject: VecDeque::new(),
            quiesce: None,
            at_rest: false,
            told_off: false,
            begin: None,
            ran: 0,
            unpaced: 0,
            clock,
            live_from: now,
        }
    }
}

impl Sim {
    pub(super) fn live(&mut self, host: usize) -> Option<&mut Live> {
        self.hosts[host].vmm.as_mut()?.live.as_deref_mut()
    }

    /// The vCPU's thread is to run in `ns`.
    pub(super) fn run_vcpu(&mut self, host: usize, ns: u64) {
        let at = self.now + ns;
        if let Some(vmm) = self.hosts[host].vmm.as_mut()
            && vmm.live.is_some()
            && vmm.vcpu_at > at
        {
            vmm.vcpu_at = at;
            let inc = vmm.inc;
            self.at(at, Ev::Vcpu(host, inc));
        }
    }

    /// One step of the vCPU: to the next exit, or to a point without a number.
    pub(super) fn vcpu(&mut self, host: usize) {
        let now = self.now;
        let Some(vmm) = self.hosts[host].vmm.as_mut() else {
            return;
        };
        if vmm.vcpu_at > now {
            return;
        }
        vmm.vcpu_at = u64::MAX;
        if vmm.live.as_ref().is_none_or(|live| live.at_rest) {
            return;
        }
        if self.must_wait(host) {
            return self.run_vcpu(host, MS);
        }
        let options = &self.plan.options;
        let (low, high) = options.exit_us;
        let ran = self.rng.range(low, high) * US;
        let Some(live) = self.live(host) else { return };
        let stands = live.guest.off || (live.quiesce.is_some() && live.guest.micro == 0);
        if !stands {
            live.ran += ran;
            live.unpaced += ran;
            self.step(host);
        }
        self.take_inputs(host);
        self.begin_transfer(host);
        self.come_to_rest(host);
        let slow = self.hosts[host].slowness(now);
        self.run_vcpu(host, if stands { MS } else { ran * slow });
        self.run_gate(host, 0);
    }

    /// Whether the gate is full, the log is full, or the backup too far behind.
    fn must_wait(&mut self, host: usize) -> bool {
        let clock = self.clock(host);
        let place = &mut self.hosts[host];
        let Some(vmm) = place.vmm.as_mut() else {
            return true;
        };
        if vmm.gate.is_full() {
            return true;
        }
        let (Some(log), Some(live), Some(shm)) = (&mut vmm.log, &mut vmm.live, &place.shm) else {
            return false;
        };
        if shm.appends.len() >= MAX_LOG {
            return true;
        }
        let record = AckRecord {
            received: Seq(shm.base),
            replayed: Seq(shm.peer_replayed),
        };
        log.tracker.acked(clock, record);
        log.tracker.appended(Mark {
            next: Seq(log.next),
            exit: ExitNumber(live.guest.exit),
            ran: Duration::from_nanos(live.ran),
            at: clock,
        });
        // Until outputs wait for the backup it is behind by as much as it likes.
        if !matches!(vmm.gate.mode(), GateMode::Holding(_)) {
            return false;
        }
        log.pace.measured(log.tracker.lag().run);
        let ran = Duration::from_nanos(std::mem::take(&mut live.unpaced));
        let waits = log.pace.at_exit(ran) != Pace::Run;
        if !waits && vmm.replica.status().protected {
            let limits = self.plan.options.lag();
            let exit = self.plan.options.exit_us.1 * US;
            let bound = (limits.target + limits.span).as_nanos() as u64 + 8 * exit + 10 * MS;
            let small = limits.target.as_nanos() as u64;
            self.check
                .lag(self.now, log.session, live.ran, small, bound);
        }
        waits
    }

    fn step(&mut self, host: usize) {
        let kick = self.plan.options.kick;
        let kicks = self.rng.chance(kick);
        let part = self.rng.range(1, 3) as u32;
        let Some(live) = self.live(host) else { return };
        if kicks {
            live.guest.run_part(part);
            if live.guest.micro > 0 {
                self.record_delta(host);
            }
            return;
        }
        let mut out = Vec::new();
        live.guest.run_to_exit(&mut out);
        let misread = live.guest.misread;
        let owner = self.newest_record().map(|record| record.owner);
        // One that has lost its epoch may read what its successor wrote: nothing of that leaves.
        if let Some(misread) = misread
            && owner == Some(self.host_name(host))
        {
            let what = format_args!(
                "key {} held {:?}, was read as {:?}",
                misread.0, misread.1, misread.2
            );
            return self.violated("disk", what);
        }
        self.record_exit(host, &out);
        let clock = self.clock(host);
        let Some(vmm) = self.hosts[host].vmm.as_mut() else {
            return;
        };
        let needs = vmm.log.as_ref().map_or(0, |log| log.next);
        let waiting = Waiting {
            effect: Effect::Net(Packet::default()),
            needs,
            session: vmm.log.as_ref().map(|log| log.session),
            free: vmm.gate.mode() == GateMode::Open,
        };
        for effect in out {
            vmm.gate
                .push(clock, Seq(needs), 64, Waiting { effect, ..waiting });
        }
    }

    /// The exit's `Output`, or `Reached` where it has been quiet.
    fn record_exit(&mut self, host: usize, out: &[Effect]) {
        let Some(vmm) = self.hosts[host].vmm.as_mut() else {
            return;
        };
        let (Some(log), Some(live)) = (vmm.log.as_mut(), vmm.live.as_ref()) else {
            return;
        };
        log.pages = *live.guest.pages();
        let digest = live.guest.digest;
        log.quiet += 1;
        if out.is_empty() && log.quiet < REACHED_EVERY {
            return;
        }
        log.quiet = 0;
        if out.is_empty() {
            return self.append(host, LogEvent::Reached { digest });
        }
        let mut bytes = std::mem::take(&mut self.scratch);
        bytes.clear();
        crate::guest::encode_effects(out, &mut bytes);
        let (len, crc) = (bytes.len() as u32, format::crc32c(&bytes));
        self.scratch = bytes;
        self.append(
            host,
            LogEvent::Output {
                bytes: len,
                crc,
                digest,
            },
        );
    }

    /// What has come from outside takes effect at the present point, and goes into the log.
    fn take_inputs(&mut self, host: usize) {
        if self.rng.chance(500_000) {
            self.take_time(host);
        }
        while let Some((op, data)) = self.live(host).and_then(|live| live.inject.pop_front()) {
            self.input(host, LogEvent::Control(op, &data));
        }
        while let Some((request, data)) = self.live(host).and_then(|live| live.done.pop_front()) {
            let bytes = data.map(Sector::encode);
            let data = bytes.as_ref().map_or(&[][..], |bytes| &bytes[..]);
            let status = DiskStatus::Ok;
            self.input(
                host,
                LogEvent::DiskDone {
                    request,
                    status,
                    data,
                },
            );
        }
        let quiescing = self.live(host).is_none_or(|live| live.quiesce.is_some());
        if quiescing {
            return;
        }
        while let Some(bytes) = self.live(host).and_then(|live| live.rx.pop_front()) {
            self.input(host, LogEvent::NetRx(&bytes));
        }
        if self.live(host).is_some_and(|live| live.guest.wants_entropy) {
            let random = self.rng.draw().to_le_bytes();
            let data = &random[..];
            self.input(host, LogEvent::Entropy { request: 1, data });
        }
        if self.rng.chance(20_000) {
            let typed = self.rng.draw().to_le_bytes();
            self.input(host, LogEvent::ConsoleRx(&typed[..3]));
        }
    }

    fn take_time(&mut self, host: usize) {
        let (now, local) = (self.now, self.clock(host).0);
        let born = self.born(host);
        let Some(live) = self.live(host) else { return };
        let before = live.guest.vtime;
        let mut ns = live.clock.now(local);
        if ft::canary::on(ft::canary::Canary::TimeJumps) {
            ns = ns.max(now - born);
        }
        let (life, from) = (live.guest.life, live.live_from);
        self.check.time(
            now,
            host,
            life,
            from,
            before,
            ns,
            self.plan.options.drift_ppm,
        );
        if self.check.violation.is_none() {
            self.input(host, LogEvent::Time { ns });
        }
    }

    /// When the life that runs on this host began.
    pub(super) fn born(&mut self, host: usize) -> u64 {
        let life = self.live(host).map(|live| live.guest.life);
        let birth = self.births.iter().find(|(other, _)| Some(*other) == life);
        birth.map_or(self.now, |(_, at)| *at)
    }

    fn input(&mut self, host: usize, event: LogEvent<'_>) {
        let Some(live) = self.live(host) else { return };
        if !live.guest.apply(&event) {
            let kind = event.kind().name();
            return self.violated("guest", format_args!("the live guest refuses {kind}"));
        }
        self.append(host, event);
    }

    /// Saves the state at this exit, and begins the log of the session.
    fn begin_transfer(&mut self, host: usize) {
        let clock = self.clock(host);
        let chunks = self.plan.options.transfer_chunks;
        let lag = self.plan.options.lag();
        let Some(vmm) = self.hosts[host].vmm.as_mut() else {
            return;
        };
        let Some(live) = vmm.live.as_mut().filter(|live| live.guest.micro == 0) else {
            return;
        };
        let Some((to, session, epoch)) = live.begin.take() else {
            return;
        };
        let start = Mark {
            next: Seq(0),
            exit: ExitNumber(live.guest.exit),
            ran: Duration::from_nanos(live.ran),
            at: clock,
        };
        vmm.released = 0;
        vmm.log = Some(Box::new(Log {
            session,
            next: 0,
            told: (0, AckRecord::default(), 0),
            tracker: AckTracker::new(start),
            pace: LagControl::new(lag),
            quiet: 0,
            pages: *live.guest.pages(),
        }));
        let state = live.guest.clone();
        let (inc, ran) = (vmm.inc, live.ran);
        self.check.session(session, inc, state.hash(), ran);
        self.open_channel(host, Shm::new(session, epoch, Role::Sender));
        if let Some(shm) = self.hosts[host].shm.as_mut() {
            shm.peer = to;
        }
        self.tell(host, Event::TransferStarted { session, start });
        let chunk = Chunk {
            from: host,
            to,
            inc,
            session,
            left: chunks,
            state,
        };
        self.after(500 * US, Ev::Chunk(Box::new(chunk)));
        self.milestone(host, "transfer begins");
    }

    /// Where the guest was asked to come to rest, or is off: tells when it has.
    fn come_to_rest(&mut self, host: usize) {
        let Some(vmm) = self.hosts[host].vmm.as_mut() else {
            return;
        };
        let Some(live) = vmm.live.as_mut() else {
            return;
        };
        if live.guest.off && !live.told_off {
            live.told_off = true;
            return self.tell(host, Event::GuestOff);
        }
        let Some(why) = live.quiesce else { return };
        // A numbered exit, or where the guest stands still for good.
        let stands = live.guest.micro == 0 || live.guest.off;
        if !stands || !live.guest.io.is_empty() || live.begin.is_some() {
            return;
        }
        live.at_rest = true;
        if why == Quiesce::SwitchOver {
            self.seen.switch_overs += 1;
            self.input(host, LogEvent::Control(ControlOp::SwitchOver, &[]));
        }
        let next = self.hosts[host]
            .vmm
            .as_ref()
            .and_then(|vmm| vmm.log.as_ref());
        let end = Seq(next.map_or(0, |log| log.next));
        self.tell(host, Event::Quiesced { why, end });
        self.milestone(host, "quiesced");
    }

    // The gate.

    pub(super) fn run_gate(&mut self, host: usize, ns: u64) {
        let at = self.now + ns;
        if let Some(vmm) = self.hosts[host].vmm.as_mut()
            && vmm.gate_at > at
        {
            vmm.gate_at = at;
            let inc = vmm.inc;
            self.at(at, Ev::Gate(host, inc));
        }
    }

    /// The I/O thread: lets out what may go.
    pub(super) fn gate_thread(&mut self, host: usize) {
        let (now, clock) = (self.now, self.clock(host));
        if self.hosts[host]
            .vmm
            .as_ref()
            .is_none_or(|vmm| vmm.gate_at > now)
        {
            return;
        }
        if let Some(vmm) = self.hosts[host].vmm.as_mut() {
            vmm.gate_at = u64::MAX;
        }
        loop {
            let place = &mut self.hosts[host];
            let Some(vmm) = place.vmm.as_mut() else {
                return;
            };
            if let Some((until, waiting)) = vmm.between {
                if until > now {
                    return self.run_gate(host, until - now);
                }
                vmm.between = None;
                self.let_out(host, waiting);
                continue;
            }
            if let (GateMode::Holding(session), Some(shm)) = (vmm.gate.mode(), &place.shm)
                && shm.session == session
            {
                vmm.gate.acknowledge(session, Seq(shm.base));
            }
            match vmm.gate.pop(clock) {
                Ok(Some(waiting)) => {
                    let stall = if self.healed {
                        0
                    } else {
                        self.plan.options.stall
                    };
                    let mode = vmm.gate.mode();
                    if let Effect::Net(packet) = &waiting.effect {
                        self.check.decides(now, host, packet);
                    }
                    let own = |session| waiting.session == Some(session) && !waiting.free;
                    match mode {
                        // From before this session: the standby has had it since before it was named.
                        GateMode::Holding(session) if !own(session) => {}
                        _ => self.check_release(host, mode, waiting.needs),
                    }
                    let until = if self.rng.chance(stall) {
                        now + self.rng.range(1, self.plan.options.stall_us) * US
                    } else {
                        now
                    };
                    if let Some(vmm) = self.hosts[host].vmm.as_mut() {
                        vmm.between = Some((until, waiting));
                    }
                }
                Ok(None) => break,
                Err(gap) => {
                    self.log(host, format_args!("the gate did not run for {:?}", gap.gap));
                    self.tell(host, Event::GateGap(gap));
                    break;
                }
            }
            if self.check.violation.is_some() {
                return;
            }
        }
        let holds = |vmm: &super::host::Vmm| matches!(vmm.gate.mode(), GateMode::Holding(_));
        if self.hosts[host].vmm.as_deref().is_some_and(holds) {
            self.run_gate(host, 20 * MS);
        }
    }

    fn let_out(&mut self, host: usize, waiting: Waiting) {
        let Some(vmm) = self.hosts[host].vmm.as_mut() else {
            return;
        };
        let (inc, needs) = (vmm.inc, waiting.needs);
        // What one exit makes leaves together or is told as not yet out.
        let rest = vmm.gate.waits_for() == Some(Seq(needs));
        let upto = if rest { needs.saturating_sub(1) } else { needs };
        let session = vmm.log.as_ref().map(|log| log.session);
        if session.is_some() && session == waiting.session {
            vmm.released = vmm.released.max(upto);
        }
        match waiting.effect {
            Effect::Net(packet) => {
                self.check.packet(self.now, host, inc, &packet);
                self.send_to_client(host, packet);
            }
            Effect::Disk(io) => self.start_io(host, io),
        }
    }
}
