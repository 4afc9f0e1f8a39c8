//! The second phase: everything is repaired, and the VM must come back, protected, answering, with nothing
//! left in quarantine. An operator does what only one can: starts the VM where nobody holds it any more.

use format::Epoch;
use ft::{Command, Event, GateMode, RoleName};

use crate::plan::MS;

use super::host::StartAs;
use super::{Ev, Sim};

/// How long that may take, in simulated ms.
pub const LIVENESS_MS: u64 = 9_000;
/// Answers after which the VM counts as alive.
const ANSWERS: u64 = 4;

/// What is known about the second phase.
#[derive(Debug, Default)]
pub(super) struct Heal {
    since: u64,
    pub(super) answers: u64,
    pub(super) done: bool,
    /// A cold start that waits for an operator.
    pub(super) blocked: Option<(usize, Epoch)>,
    nobody: u32,
}

impl Sim {
    pub(super) fn begin_heal(&mut self) {
        self.healed = true;
        self.heal.since = self.now;
        self.net.heal();
        self.trace.line(
            self.now,
            None,
            "heal",
            format_args!("everything is repaired"),
        );
        for host in 0..self.hosts.len() {
            let place = &mut self.hosts[host];
            place.starve(0, 1);
            place.world_gone = 0;
            place.vmm_paused = place.vmm_paused.min(self.now);
            place.daemon_paused = place.daemon_paused.min(self.now);
            self.tell(host, Event::StorageBack);
        }
        self.operator();
    }

    pub(super) fn operator(&mut self) {
        if self.is_well() {
            self.check_disk();
            self.heal.done = true;
            return;
        }
        if self.now > self.heal.since + LIVENESS_MS * MS {
            let states: Vec<_> = (0..self.hosts.len())
                .map(|host| (host, self.hosts[host].state()))
                .collect();
            let newest = self
                .store
                .newest()
                .map(|record| super::words::record(&record));
            let answers = self.heal.answers;
            let guests: Vec<_> = (0..self.hosts.len())
                .map(|host| self.guest_words(host))
                .collect();
            let what = format_args!(
                "after {LIVENESS_MS} ms: {states:?}, {answers} answers, newest {newest:?}, guests {guests:?}"
            );
            return self.violated("liveness", what);
        }
        self.help();
        self.after(40 * MS, Ev::Operator);
    }

    fn guest_words(&self, host: usize) -> String {
        let vmm = self.hosts[host].vmm.as_ref();
        let Some((vmm, live)) = vmm.and_then(|vmm| Some((vmm, vmm.live.as_ref()?))) else {
            return "none".to_owned();
        };
        let shm = self.hosts[host].shm.as_ref();
        format!(
            "exit {} off {} rest {} io {} open {} gate {:?} {} log {:?}",
            live.guest.exit,
            live.guest.off,
            live.at_rest,
            live.guest.io.len(),
            live.open.len(),
            vmm.gate.mode(),
            vmm.gate.len(),
            shm.map(|shm| (shm.base, shm.appends.len(), shm.peer_replayed)),
        )
    }

    /// Protected, answering, nothing quarantined.
    fn is_well(&self) -> bool {
        let primary = self.hosts.iter().find_map(|host| {
            let vmm = host.vmm.as_ref()?;
            let status = vmm.replica.status();
            let acts = status.role == RoleName::Primary && status.protected && !status.quarantine;
            let newest = vmm.replica.record() == self.store.newest().as_ref();
            (acts && newest && matches!(vmm.gate.mode(), GateMode::Holding(_))).then_some(())
        });
        primary.is_some() && self.heal.answers >= ANSWERS
    }

    fn role(&self, host: usize) -> Option<RoleName> {
        let vmm = self.hosts[host].vmm.as_ref()?;
        let status = vmm.replica.status();
        let empty = status.role == RoleName::Backup && status.peer.is_none();
        (!empty).then_some(status.role)
    }

    /// What an operator does, knowing all.
    fn help(&mut self) {
        let hosts = self.hosts.len();
        let acts = (0..hosts).any(|host| self.role(host) == Some(RoleName::Primary));
        // One that only wants to start holds nothing, but for one that may have won already.
        let holds = |sim: &Self, except: Option<usize>| {
            (0..hosts).any(|host| {
                let waits =
                    |role| role == RoleName::Booting && sim.hosts[host].state() != "competing";
                let role = sim.role(host).filter(|role| !waits(*role));
                Some(host) != except && role.is_some()
            })
        };
        let boots = (0..hosts).any(|host| self.role(host) == Some(RoleName::Booting));
        if acts {
            for host in 0..hosts {
                if self.role(host) == Some(RoleName::Booting) {
                    self.restart(host, StartAs::Standby, 5 * MS);
                } else if self.role(host) == Some(RoleName::Primary) {
                    self.tell(host, Event::Command(Command::Protect));
                }
            }
        }
        for host in 0..hosts {
            let place = &self.hosts[host];
            if place.up && place.vmm.is_none() && !place.starting {
                self.start_later(host, StartAs::Standby, 5 * MS);
            }
        }
        if let Some((host, epoch)) = self.heal.blocked.take()
            && self.role(host) == Some(RoleName::Booting)
        {
            let all_up = self
                .hosts
                .iter()
                .all(|host| host.vmm.is_some() && host.ios == 0);
            if all_up && !holds(self, Some(host)) {
                self.check.forced.push(epoch);
                self.tell(host, Event::Command(Command::ForceStart(epoch)));
            } else {
                self.heal.blocked = Some((host, epoch));
            }
        }
        let all_up = self.hosts.iter().all(|host| host.vmm.is_some());
        let nobody = all_up && !boots && !holds(self, None);
        self.heal.nobody = if nobody { self.heal.nobody + 1 } else { 0 };
        if self.heal.nobody == 3 {
            let host = self.rng.below(hosts as u64) as usize;
            self.restart(host, StartAs::Boot, 5 * MS);
        }
    }

    /// What the guest believes its disk to hold is what it holds.
    fn check_disk(&mut self) {
        for host in 0..self.hosts.len() {
            let owner = self.store.newest().map(|record| record.owner);
            let id = self.hosts[host].id;
            let Some(live) = self.live(host).filter(|_| owner == Some(id)) else {
                continue;
            };
            let (map, guest) = (live.map.clone(), live.guest.clone());
            for key in 0..crate::guest::KEYS as u8 {
                if guest.io.iter().any(|io| io.key == key) {
                    continue;
                }
                let range = ft::SectorRange {
                    first: u64::from(key),
                    count: 1,
                };
                let at = map.locate(range)[0].1;
                let there = self.store.read_sector(at, key, self.now);
                let believed = guest.disk[usize::from(key)];
                if there != believed && !guest.is_loading() {
                    let what = format_args!(
                        "key {key} is {there:?}, the guest on host{host} believes {believed:?}"
                    );
                    return self.violated("disk", what);
                }
            }
        }
    }
}
