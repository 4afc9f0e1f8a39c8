//! What goes wrong.

use format::ControlOp;
use ft::{Command, Event};

use crate::plan::{FaultKind, MS, PRIMARY, Wish};
use crate::rng::Rng;

use super::Sim;
use super::host::{StartAs, host_index};

/// A fault for a moment that matters: mostly to the host that is in it.
pub(super) fn at_milestone(rng: &mut Rng, host: usize, hosts: usize) -> FaultKind {
    let host = if rng.chance(800_000) {
        host
    } else {
        rng.below(hosts as u64) as usize
    };
    let ms = rng.skewed(20, 1_000);
    let down_ms = rng.skewed(3, 400);
    match rng.below(9) {
        0 | 1 => FaultKind::CrashHost { host, down_ms },
        2 | 3 => FaultKind::CrashVmm { host, down_ms },
        4 => FaultKind::PauseVmm { host, ms },
        5 => FaultKind::PauseBoth { host, ms },
        6 => FaultKind::Isolate { host, ms },
        7 => FaultKind::CutStorage { host, ms },
        _ => FaultKind::CrashDaemon { host },
    }
}

/// Who has just won, with sectors in quarantine, is lost before it has done anything with it.
pub(super) fn relapse(rng: &mut Rng, host: usize) -> FaultKind {
    let down_ms = rng.skewed(3, 400);
    if rng.chance(500_000) {
        FaultKind::CrashHost { host, down_ms }
    } else {
        FaultKind::CrashVmm { host, down_ms }
    }
}

impl Sim {
    pub(super) fn fault(&mut self, kind: FaultKind) {
        if self.healed {
            return;
        }
        let kind = kind.with_hosts(|host| self.who(host));
        self.trace
            .line(self.now, None, "fault", format_args!("{kind:?}"));
        let now = self.now;
        match kind {
            FaultKind::CrashHost { host, down_ms } => {
                self.hosts[host].start_as = self.next_start();
                self.crash_host(host, down_ms * MS);
            }
            FaultKind::CrashVmm { host, down_ms } => {
                let how = self.next_start();
                self.restart(host, how, down_ms * MS);
            }
            FaultKind::CrashDaemon { host } => self.kill_daemon(host),
            FaultKind::PauseVmm { host, ms } => self.pause_vmm(host, now + ms * MS),
            FaultKind::PauseDaemon { host, ms } => self.hosts[host].daemon_paused = now + ms * MS,
            FaultKind::PauseBoth { host, ms } => {
                self.pause_vmm(host, now + ms * MS);
                self.hosts[host].daemon_paused = now + ms * MS;
            }
            FaultKind::Starve { host, factor, ms } => {
                self.hosts[host].starve(now + ms * MS, factor)
            }
            FaultKind::Cut {
                from,
                to,
                flows,
                both,
                ms,
            } => {
                self.net.cut(from, to, flows, now + ms * MS);
                if both {
                    self.net.cut(to, from, flows, now + ms * MS);
                }
            }
            FaultKind::Isolate { host, ms } => {
                for other in 0..self.hosts.len() {
                    self.net
                        .cut(host, other, crate::plan::Flows::All, now + ms * MS);
                    self.net
                        .cut(other, host, crate::plan::Flows::All, now + ms * MS);
                }
            }
            FaultKind::Reset { a, b } => {
                self.drop_conn(a);
                self.drop_conn(b);
            }
            FaultKind::CutStorage { host, ms } => self.cut_storage(host, ms),
            FaultKind::StorageDown { ms } => {
                for host in 0..self.hosts.len() {
                    self.cut_storage(host, ms);
                }
            }
            FaultKind::WorldGone { host, ms } => self.hosts[host].world_gone = now + ms * MS,
            FaultKind::ColdRestart {
                host,
                other,
                hosts_too,
            } => self.cold_restart(host, other, hosts_too),
            FaultKind::BootHere { host } => self.restart(host, StartAs::Boot, 4 * MS),
            FaultKind::Operator(wish) => self.wish(wish),
            FaultKind::Corrupt { host, bit } => {
                if let Some(guest) = self.follow(host).and_then(|follow| follow.guest.as_mut()) {
                    guest.corrupt(bit);
                    self.check.corrupted = true;
                }
            }
        }
    }

    /// The host that a fault means.
    fn who(&self, host: usize) -> usize {
        if host < self.hosts.len() {
            return host;
        }
        let primary = (0..self.hosts.len())
            .find(|host| self.acts(*host))
            .unwrap_or(0);
        if host == PRIMARY {
            return primary;
        }
        let vmm = self.hosts[primary].vmm.as_ref();
        let peer = vmm.and_then(|vmm| vmm.replica.status().peer);
        peer.map_or((primary + 1) % self.hosts.len(), host_index)
    }

    /// Who looks after the VMM starts it again: as a standby, or to start the VM.
    fn next_start(&mut self) -> StartAs {
        if self.rng.chance(300_000) {
            StartAs::Boot
        } else {
            StartAs::Standby
        }
    }

    /// Kills the VMM and starts another after `ns`.
    pub(super) fn restart(&mut self, host: usize, how: StartAs, ns: u64) {
        self.hosts[host].start_as = how;
        if self.hosts[host].up {
            self.kill_vmm(host);
            self.start_later(host, how, ns);
        }
    }

    fn pause_vmm(&mut self, host: usize, until: u64) {
        if self.hosts[host].vmm.is_some() {
            self.hosts[host].vmm_paused = until;
        }
    }

    /// The storage is out of reach: the VMM notices when its requests do not come back.
    fn cut_storage(&mut self, host: usize, ms: u64) {
        let cut = &mut self.net.storage_cut[host];
        *cut = (self.now + ms * MS).max(*cut);
        if ms >= 150 && self.rng.chance(500_000) {
            self.tell(host, Event::StorageLost);
        }
    }

    fn cold_restart(&mut self, host: usize, other: usize, hosts_too: bool) {
        for index in 0..self.hosts.len() {
            let boots = index == host
                || (index == other && (host + other) % 2 == 1 && self.rng.chance(500_000));
            let how = if boots {
                StartAs::Boot
            } else {
                StartAs::Standby
            };
            let ns = self.rng.range(3, 60) * MS;
            self.hosts[index].start_as = how;
            if hosts_too {
                self.crash_host(index, ns);
            } else {
                self.restart(index, how, ns);
            }
        }
    }

    fn wish(&mut self, wish: Wish) {
        let command = match wish {
            Wish::SwitchOver => Command::SwitchOver,
            Wish::Fail => Command::Fail,
            Wish::Unprotect => Command::Unprotect,
            Wish::PowerOff => Command::Control(ControlOp::PowerOff, Vec::new()),
            Wish::Mark => Command::Control(ControlOp::Mark, vec![1, 2, 3]),
        };
        for host in 0..self.hosts.len() {
            let vmm = self.hosts[host].vmm.as_ref();
            let acts = vmm.is_some_and(|vmm| vmm.replica.record().is_some());
            if acts {
                self.tell(host, Event::Command(command.clone()));
            }
        }
    }
}
