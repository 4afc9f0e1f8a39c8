//! Processes: they start, run their event loop, and die.
//!
//! The VMM's loop takes one event, lets the protocol handle it, and does what it asks for in order before
//! it takes the next. Between any two actions it may stand still for a while, or for ever.

use format::{AckRecord, ExitNumber, Seq};
use ft::{Config, Event, Incarnation, Replica, Time};

use crate::plan::{MS, US};
use crate::rng::mix2;

use super::channel::Daemon;
use super::host::{StartAs, Vmm, host_id};
use super::{Ev, Sim};

impl Sim {
    /// A VMM is to start on this host after a while; what was decided before is void.
    pub(super) fn start_later(&mut self, host: usize, how: StartAs, ns: u64) {
        self.hosts[host].start_as = how;
        self.hosts[host].ticket += 1;
        self.hosts[host].starting = true;
        let ticket = self.hosts[host].ticket;
        self.after(ns, Ev::StartVmm(host, ticket));
    }

    pub(super) fn start_vmm_if(&mut self, host: usize, ticket: u32) {
        let place = &self.hosts[host];
        if !place.up || place.vmm.is_some() || place.ticket != ticket {
            return;
        }
        // The driver makes sure that the I/O of earlier processes on this host is over.
        if place.ios > 0 {
            self.after(5 * MS, Ev::StartVmm(host, ticket));
            return;
        }
        let boots = self.hosts[host].start_as == StartAs::Boot;
        self.start_vmm(host, boots);
    }

    pub(super) fn start_vmm(&mut self, host: usize, boots: bool) {
        self.incarnations += 1;
        let inc = self.incarnations;
        let options = &self.plan.options;
        let standbys: Vec<_> = (0..options.hosts).map(host_id).collect();
        let config = Config {
            fencing: options.fencing,
            detector: options.detector(),
            timings: options.timings(),
            ..Config::new(self.hosts[host].id, standbys)
        };
        let random = u128::from(mix2(self.plan.seed, u64::from(inc)));
        let incarnation = Incarnation(random << 64 | u128::from(mix2(random as u64, 7)));
        let replica = if boots {
            Replica::boot(config, incarnation)
        } else {
            Replica::standby(config, incarnation)
        };
        let gate_count = options.gate_count;
        let place = &mut self.hosts[host];
        place.vmm = Some(Box::new(Vmm::new(inc, replica, gate_count)));
        place.beats = None;
        place.shm = None;
        place.vmm_paused = 0;
        place.starting = false;
        // Its storage client is a new one: what earlier runs of this kernel had on the way is void there.
        self.store.mounted(host, self.hosts[host].boot);
        self.log(
            host,
            format_args!(
                "VMM {inc} starts{}",
                if boots { " to start the VM" } else { "" }
            ),
        );
        self.drop_conn(host);
        if self.hosts[host].daemon.is_none() {
            self.start_daemon(host);
        }
        self.tell(host, Event::Tick);
    }

    pub(super) fn start_daemon(&mut self, host: usize) {
        self.incarnations += 1;
        let inc = self.incarnations;
        self.hosts[host].daemon = Some(Daemon::new(inc));
        self.hosts[host].daemon_paused = 0;
        self.log(host, format_args!("daemon {inc} starts"));
        self.after(MS, Ev::Connect(host, inc));
        if self.hosts[host].vmm.is_none() {
            self.after(MS, Ev::Dead(host, inc));
        }
    }

    pub(super) fn start_daemon_if(&mut self, host: usize, boot: u32) {
        let place = &self.hosts[host];
        if place.up && place.boot == boot && place.daemon.is_none() && place.vmm.is_some() {
            self.start_daemon(host);
        }
    }

    pub(super) fn kill_vmm(&mut self, host: usize) {
        let Some(vmm) = self.hosts[host].vmm.take() else {
            return;
        };
        self.log(host, format_args!("VMM {} dies", vmm.inc));
        self.hosts[host].vmm_paused = 0;
        match &self.hosts[host].daemon {
            // Owner death of a robust futex: at once, if the daemon runs.
            Some(daemon) => {
                let inc = daemon.inc;
                self.after(200 * US, Ev::Dead(host, inc));
            }
            None => self.hosts[host].shm = None,
        }
    }

    pub(super) fn kill_daemon(&mut self, host: usize) {
        let Some(daemon) = self.hosts[host].daemon.take() else {
            return;
        };
        self.log(host, format_args!("daemon {} dies", daemon.inc));
        if let Some(conn) = daemon.conn {
            self.break_conn(conn.id);
        }
        self.hosts[host].daemon_paused = 0;
        if self.hosts[host].vmm.is_some() {
            let boot = self.hosts[host].boot;
            self.after(15 * MS, Ev::StartDaemon(host, boot));
        } else {
            self.hosts[host].shm = None;
        }
    }

    pub(super) fn crash_host(&mut self, host: usize, down: u64) {
        if !self.hosts[host].up {
            return;
        }
        self.log(host, format_args!("loses power"));
        self.kill_vmm(host);
        self.kill_daemon(host);
        let place = &mut self.hosts[host];
        place.up = false;
        place.boot += 1;
        place.shm = None;
        place.beats = None;
        place.ios = 0;
        place.ticket += 1;
        self.store.cache_lost(host);
        let boot = self.hosts[host].boot;
        self.after(down, Ev::StartHost(host, boot));
    }

    pub(super) fn start_host(&mut self, host: usize, boot: u32) {
        let place = &mut self.hosts[host];
        if place.up || place.boot != boot {
            return;
        }
        place.up = true;
        let how = place.start_as;
        self.log(host, format_args!("is up again"));
        self.start_daemon(host);
        self.start_later(host, how, 2 * MS);
    }

    /// Brings an event, now or as soon as the loop gets to it.
    pub(super) fn tell(&mut self, host: usize, event: Event) {
        if let Some(vmm) = self.hosts[host].vmm.as_mut() {
            vmm.inbox.push_back(event);
            self.wake_soon(host);
        }
    }

    pub(super) fn wake_soon(&mut self, host: usize) {
        let slow = self.hosts[host].slowness(self.now);
        let delay = self.rng.range(5, 60) * US * slow;
        self.wake_at(host, self.now + delay);
    }

    fn wake_at(&mut self, host: usize, at: u64) {
        let Some(vmm) = self.hosts[host].vmm.as_mut() else {
            return;
        };
        if at < vmm.wake_at {
            vmm.wake_at = at;
            let inc = vmm.inc;
            self.at(at, Ev::Loop(host, inc));
        }
    }

    /// One turn of the event loop.
    pub(super) fn turn(&mut self, host: usize) {
        let now = self.now;
        let Some(vmm) = self.hosts[host].vmm.as_mut() else {
            return;
        };
        if vmm.wake_at > now {
            return;
        }
        vmm.wake_at = u64::MAX;
        self.hosts[host].progress += 1;
        if !self.do_actions(host) {
            return;
        }
        while let Some(event) = self.hosts[host]
            .vmm
            .as_mut()
            .and_then(|vmm| vmm.inbox.pop_front())
        {
            self.handle(host, event);
            if !self.do_actions(host) {
                return;
            }
        }
        for event in self.positions(host) {
            self.handle(host, event);
            if !self.do_actions(host) {
                return;
            }
        }
        let Some(vmm) = self.hosts[host].vmm.as_ref() else {
            return;
        };
        let due = |place: &super::Host, vmm: &Vmm| {
            let deadline = vmm.replica.next_deadline()?;
            Some(place.when(deadline).max(now + 100 * US))
        };
        let clock = self.hosts[host].clock(now);
        if vmm.replica.next_deadline().is_some_and(|at| at <= clock) {
            self.handle(host, Event::Tick);
            if !self.do_actions(host) {
                return;
            }
        }
        let Some(vmm) = self.hosts[host].vmm.as_ref() else {
            return;
        };
        if let Some(at) = due(&self.hosts[host], vmm) {
            self.wake_at(host, at);
        }
    }

    /// The protocol takes one event.
    fn handle(&mut self, host: usize, event: Event) {
        if self.trace.on && super::words::is_news(&event) {
            self.log(host, format_args!("<- {}", super::words::event(&event)));
        }
        let clock = self.hosts[host].clock(self.now);
        let Some(vmm) = self.hosts[host].vmm.as_mut() else {
            return;
        };
        let before = vmm.replica.status();
        vmm.replica.handle(clock, event, &mut vmm.actions);
        let after = vmm.replica.status();
        if before != after {
            let (inc, now) = (vmm.inc, self.now);
            self.check.moved(now, host, inc, &before, &after);
            if after.protected && !before.protected {
                self.seen.protected += 1;
            }
        }
    }

    /// Does what the protocol asked for; false where the loop does not go on now.
    fn do_actions(&mut self, host: usize) -> bool {
        loop {
            let Some(vmm) = self.hosts[host].vmm.as_mut() else {
                return false;
            };
            let Some(action) = vmm.actions.pop() else {
                return true;
            };
            self.act(host, action);
            if self.check.violation.is_some() {
                return false;
            }
            let more = self.hosts[host]
                .vmm
                .as_ref()
                .is_some_and(|vmm| !vmm.actions.is_empty());
            if self.interrupted {
                self.wake_at(host, self.now);
                return false;
            }
            if more && !self.healed && self.rng.chance(self.plan.options.stall) {
                let ns = self.rng.range(1, self.plan.options.stall_us) * US;
                self.log(
                    host,
                    format_args!("stands still between two actions for {} us", ns / US),
                );
                self.wake_at(host, self.now + ns);
                return false;
            }
        }
    }

    /// What a loop tells at every turn: where log and gate are.
    fn positions(&mut self, host: usize) -> Vec<Event> {
        let clock = self.hosts[host].clock(self.now);
        let mut out = Vec::new();
        let place = &mut self.hosts[host];
        let Some(vmm) = place.vmm.as_mut() else {
            return out;
        };
        if let (Some(log), Some(live)) = (vmm.log.as_mut(), vmm.live.as_ref()) {
            let session = log.session;
            let Some(shm) = place.shm.as_ref().filter(|shm| shm.session == session) else {
                return out;
            };
            let mark = ft::Mark {
                next: Seq(log.next),
                exit: ExitNumber(live.guest.exit),
                ran: std::time::Duration::from_nanos(live.ran),
                at: clock,
            };
            let record = AckRecord {
                received: Seq(shm.base),
                replayed: Seq(shm.peer_replayed),
            };
            if log.told.0 != log.next {
                log.told.0 = log.next;
                out.push(Event::Appended { session, mark });
            }
            if log.told.1 != record {
                log.told.1 = record;
                out.push(Event::Acked { session, record });
            }
            if log.told.2 != vmm.released {
                log.told.2 = vmm.released;
                let upto = Seq(vmm.released);
                out.push(Event::Released { session, upto });
            }
        }
        if let Some(follow) = vmm.follow.as_mut()
            && follow.guest.is_some()
            && follow.told != Some(follow.replayed)
        {
            follow.told = Some(follow.replayed);
            let (session, upto) = (follow.session, Seq(follow.replayed));
            out.push(Event::Replayed { session, upto });
        }
        out
    }

    /// The clock of a host.
    pub(super) fn clock(&self, host: usize) -> Time {
        self.hosts[host].clock(self.now)
    }
}
