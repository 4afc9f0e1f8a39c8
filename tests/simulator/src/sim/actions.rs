//! Does what the protocol asks of the VMM.

use format::{Seq, SessionId};
use ft::{Action, Event, GateMode, GoLive, Leave, Notice, Origin, SectorRange};

use crate::plan::{MS, US};

use super::backup::Follow;
use super::channel::{Role, Shm};
use super::host::host_index;
use super::{Ev, Sim};

impl Sim {
    pub(super) fn act(&mut self, host: usize, action: Action) {
        if self.trace.on && !matches!(action, Action::Probe { .. }) {
            self.log(host, format_args!("-> {}", super::words::action(&action)));
        }
        let Some(inc) = self.hosts[host].vmm.as_ref().map(|vmm| vmm.inc) else {
            return;
        };
        match action {
            Action::Arbiter { call, request } => self.ask_arbiter(host, call, request),
            Action::Send { to, message } => self.send(host, host_index(to), &message),
            Action::Watch { peer, session } => {
                self.hosts[host].beats = Some(session);
                if let Some(vmm) = self.hosts[host].vmm.as_mut() {
                    vmm.watched = Some((host_index(peer), session));
                }
            }
            Action::Probe { probe, .. } => {
                let watched = self.hosts[host].vmm.as_ref().and_then(|vmm| vmm.watched);
                if let Some((peer, session)) = watched {
                    self.send_beat(host, peer, session, probe);
                }
            }
            Action::Unwatch => {
                self.hosts[host].beats = None;
                if let Some(vmm) = self.hosts[host].vmm.as_mut() {
                    vmm.watched = None;
                }
            }
            Action::Gate(mode) => self.set_gate(host, mode),
            Action::End(_) => {
                self.seen.power_offs += 1;
                self.kill_vmm(host);
            }
            Action::Notice(notice) => self.notice(host, &notice),
            other => self.act_in_session(host, inc, other),
        }
    }

    /// What concerns a session and the guest.
    fn act_in_session(&mut self, host: usize, inc: u32, action: Action) {
        match action {
            Action::StartTransfer { to, session, epoch } => {
                if let Some(live) = self.live(host) {
                    live.begin = Some((host_index(to), session, epoch));
                }
            }
            Action::SetEpoch(epoch) => {
                if let Some(shm) = self.hosts[host].shm.as_mut()
                    && matches!(shm.role, Role::Sender)
                {
                    shm.epoch = epoch;
                }
            }
            Action::EndSession(session) => self.end_session(host, session),
            Action::Inject(op, data) => {
                if let Some(live) = self.live(host) {
                    live.inject.push_back((op, data));
                }
            }
            Action::Quiesce(why) => {
                if let Some(live) = self.live(host) {
                    live.quiesce = Some(why);
                    live.at_rest = false;
                }
                self.run_vcpu(host, 0);
            }
            Action::Resume => {
                if let Some(live) = self.live(host) {
                    (live.quiesce, live.at_rest) = (None, false);
                }
                self.run_vcpu(host, 0);
            }
            Action::LoadState {
                from: _,
                session,
                epoch,
            } => {
                self.open_channel(host, Shm::new(session, epoch, Role::Receiver));
                self.check.follows(self.now, inc, session);
                if let Some(vmm) = self.hosts[host].vmm.as_mut() {
                    vmm.follow = Some(Box::new(Follow::new(session)));
                }
                self.milestone(host, "load state");
            }
            Action::CloseSession(session) => self.close_session(host, inc, session),
            Action::Drain { end, .. } => {
                if let Some(follow) = self.follow(host) {
                    follow.drain = Some(end.0);
                }
                self.run_replay(host, 0);
            }
            other => self.act_on_world(host, inc, other),
        }
    }

    /// What concerns the world outside, and the role in it.
    fn act_on_world(&mut self, host: usize, inc: u32, action: Action) {
        match action {
            Action::Fold(map) => {
                if let Some(live) = self.live(host) {
                    assert_eq!(live.map, map, "the quarantine in force is the record's");
                    live.folding = true;
                }
                self.milestone(host, "fold");
                self.after(100 * US, Ev::Fold { host, inc });
            }
            Action::Unquarantine => self.unquarantine(host),
            Action::ProbeWorld => {
                let ns = self.work(host, 300);
                self.after(ns, Ev::ProbeWorld { host, inc });
            }
            Action::Fence(target) => {
                let target = host_index(target);
                let ns = self.work(host, 1_000);
                self.after(ns, Ev::Fence { host, inc, target });
            }
            Action::GoLive(go) => {
                self.begin_go_live(host, inc, &go);
                let go = Box::new(go);
                self.milestone(host, "go live");
                self.after(50 * US, Ev::GoLive { host, inc, go });
            }
            Action::Discard(leave) => {
                self.begin_discard(host, inc, &leave);
                self.after(50 * US, Ev::Discard { host, inc });
            }
            _ => {}
        }
    }

    fn set_gate(&mut self, host: usize, mode: GateMode) {
        let clock = self.clock(host);
        let Some(vmm) = self.hosts[host].vmm.as_mut() else {
            return;
        };
        let renewed = matches!(mode, GateMode::Holding(_)) && vmm.gate.mode() == GateMode::Shut;
        vmm.gate.set_mode(clock, mode);
        if let GateMode::Holding(session) = mode {
            let next = vmm
                .log
                .as_ref()
                .filter(|log| log.session == session)
                .map(|log| log.next);
            if let Some(next) = next {
                let at = Seq(next);
                self.check.holds(session, next);
                self.tell(host, Event::GateHolds { session, at });
                self.milestone(host, "gate holds");
            }
            self.seen.renewals += u64::from(renewed);
        }
        self.run_gate(host, 0);
    }

    fn end_session(&mut self, host: usize, session: SessionId) {
        let Some(vmm) = self.hosts[host].vmm.as_mut() else {
            return;
        };
        if vmm.log.as_ref().is_some_and(|log| log.session == session) {
            vmm.log = None;
        }
        if let Some(live) = vmm.live.as_mut() {
            live.begin = live.begin.filter(|(_, begun, _)| *begun != session);
        }
        if self.hosts[host]
            .shm
            .as_ref()
            .is_some_and(|shm| shm.session == session)
        {
            self.hosts[host].shm = None;
            self.drop_conn(host);
        }
    }

    /// Replaces what the shared memory holds.
    pub(super) fn open_channel(&mut self, host: usize, shm: Shm) {
        self.drop_conn(host);
        let place = &mut self.hosts[host];
        place.shm = Some(Box::new(shm));
        if let Some(daemon) = place.daemon.as_mut() {
            daemon.reset();
            let inc = daemon.inc;
            self.after(200 * US, Ev::Connect(host, inc));
        }
    }

    /// No acknowledgement leaves from here on; then the end of the log is fixed (R13).
    fn close_session(&mut self, host: usize, inc: u32, session: SessionId) {
        let Some(shm) = self.hosts[host]
            .shm
            .as_mut()
            .filter(|shm| shm.session == session)
        else {
            return;
        };
        shm.closed = true;
        let end = Seq(shm.committed);
        self.check.closed(inc, session);
        if !ft::canary::on(ft::canary::Canary::AckAfterClose) {
            self.drop_conn(host);
        }
        self.milestone(host, "session closed");
        self.tell(host, Event::SessionClosed { session, end });
    }

    fn begin_go_live(&mut self, host: usize, inc: u32, go: &GoLive) {
        self.seen.quarantined += u64::from(!go.record.quarantine.is_empty());
        if let Origin::Cold = go.origin {
            self.seen.cold_starts += 1;
            self.check_cold_start(host, inc, go);
        } else {
            self.seen.failovers += 1;
        }
    }

    pub(super) fn probe_world(&mut self, host: usize) {
        let usable = self.reaches_storage(host) && self.hosts[host].world_gone <= self.now;
        self.tell(host, Event::WorldProbed { usable });
    }

    pub(super) fn fence(&mut self, host: usize, target: usize) {
        let inc = self.hosts[host].vmm.as_ref().map_or(0, |vmm| vmm.inc);
        if !self.reaches_storage(host) {
            self.after(5 * MS, Ev::Fence { host, inc, target });
            return;
        }
        self.store.fence(target);
        self.log(host, format_args!("the storage has cut host{target} off"));
        let target = self.hosts[target].id;
        self.tell(host, Event::Fenced(target));
    }

    fn begin_discard(&mut self, host: usize, inc: u32, leave: &Leave) {
        self.check_discard(host, inc, leave);
        let Some(vmm) = self.hosts[host].vmm.as_mut() else {
            return;
        };
        vmm.gate.discard();
        let clock = self.hosts[host].clock(self.now);
        if let Some(vmm) = self.hosts[host].vmm.as_mut() {
            vmm.gate.set_mode(clock, GateMode::Shut);
            (vmm.live, vmm.log, vmm.follow, vmm.between) = (None, None, None, None);
        }
        self.hosts[host].shm = None;
        self.drop_conn(host);
    }

    /// Waits until the I/O of the role is over.
    pub(super) fn discard(&mut self, host: usize) {
        let Some(inc) = self.hosts[host].vmm.as_ref().map(|vmm| vmm.inc) else {
            return;
        };
        if self.hosts[host].ios > 0 {
            self.after(3 * MS, Ev::Discard { host, inc });
            return;
        }
        self.tell(host, Event::Discarded);
    }

    fn notice(&mut self, host: usize, notice: &Notice) {
        match notice {
            Notice::Won { .. } => {
                self.milestone(host, "won");
            }
            Notice::Alone(_) => self.seen.alone += 1,
            Notice::Protected { .. } => self.milestone(host, "protected"),
            Notice::QuarantineOver(_) => self.seen.folded += 1,
            Notice::Diverged(report) => {
                self.seen.divergences += 1;
                let kind = format_args!("{} at exit {}", report.text, report.exit.0);
                if !self.check.corrupted {
                    self.violated("divergence", kind);
                }
            }
            Notice::StartBlocked {
                record,
                waiting_for,
            } if waiting_for.is_empty() => {
                self.heal.blocked = Some((host, record.epoch));
            }
            Notice::PeerLost { .. } => self.milestone(host, "peer lost"),
            _ => {}
        }
    }

    /// Sectors of the writes that are outstanding.
    pub(super) fn outstanding_writes(guest: &crate::guest::Guest) -> Vec<SectorRange> {
        let writes = guest.io.iter().filter(|io| io.write.is_some());
        writes
            .map(|io| SectorRange {
                first: u64::from(io.key),
                count: 1,
            })
            .collect()
    }
}
