//! What a VM's owner does to the world: disk requests, going live, folding.

use ft::canary::{self, Canary};
use ft::{Event, GateMode, GoLive, Location, Origin, SectorRange};

use crate::guest::{Effect, Guest, Io, KEYS, Sector};
use crate::plan::{MS, US};

use super::host::Waiting;
use super::primary::Live;
use super::storage::IoOp;
use super::{Ev, Sim};

fn range(key: u8) -> SectorRange {
    SectorRange {
        first: u64::from(key),
        count: 1,
    }
}

impl Sim {
    fn place_of(live: &Live, key: u8) -> Location {
        live.map.locate(range(key))[0].1
    }

    /// The guest's request goes to the storage.
    pub(super) fn start_io(&mut self, host: usize, io: Io) {
        let Some(live) = self.live(host) else { return };
        if live.folding && io.write.is_some() && live.map.touches(range(io.key)) {
            live.waiting.push(io);
            return;
        }
        live.open.push(io);
        let at = Self::place_of(live, io.key);
        self.submit(host, Some(io.id), io.key, at, io.write);
    }

    fn submit(
        &mut self,
        host: usize,
        request: Option<u64>,
        key: u8,
        at: Location,
        write: Option<Sector>,
    ) {
        let place = &mut self.hosts[host];
        let boot = place.boot;
        let Some(vmm) = place.vmm.as_ref() else {
            return;
        };
        place.ios += 1;
        let op = IoOp {
            host,
            inc: vmm.inc,
            boot,
            registration: vmm.registration,
            request,
            key,
            at,
            write,
            since: self.now,
        };
        let options = &self.plan.options;
        let (io_us, late_us) = (options.io_us, options.late_us);
        let late = if self.healed || write.is_none() {
            0
        } else {
            options.late_write
        };
        let mut ns = self.work(host, io_us);
        if self.rng.chance(late) {
            self.seen.late_writes += 1;
            ns += self.rng.range(1, late_us) * US;
        }
        self.after(ns, Ev::Io(op));
    }

    /// A request reaches the storage.
    pub(super) fn io(&mut self, op: IoOp) {
        let same = self.hosts[op.host].boot == op.boot;
        if !same && (!self.store.lands(op.host, op.boot) || self.rng.chance(400_000)) {
            return;
        }
        if same && !self.reaches_storage(op.host) {
            return self.after(10 * MS, Ev::Io(op));
        }
        if same {
            self.hosts[op.host].ios -= 1;
        }
        if !self.store.admits(op.host, op.registration) {
            return;
        }
        let data = match op.write {
            Some(sector) => {
                if !same
                    || self.hosts[op.host]
                        .vmm
                        .as_ref()
                        .is_none_or(|vmm| vmm.inc != op.inc)
                {
                    self.log(
                        op.host,
                        format_args!("storage: a write to {} lands late", op.key),
                    );
                }
                self.store.write(op.at, op.key, sector);
                sector
            }
            None => self.store.read_sector(op.at, op.key, op.since),
        };
        let io_us = self.plan.options.io_us;
        let ns = self.work(op.host, io_us / 4 + 1);
        self.after(ns, Ev::IoDone { op, data });
    }

    pub(super) fn io_done(&mut self, op: IoOp, data: Sector) {
        let Some(live) = self.live(op.host) else {
            return;
        };
        let Some(request) = op.request else {
            live.fold_left = live.fold_left.saturating_sub(1);
            return;
        };
        let open = live.open.len();
        live.open.retain(|io| io.id != request);
        if live.open.len() < open {
            live.done
                .push_back((request, op.write.is_none().then_some(data)));
        }
    }

    /// Acts on the world as the owner of a record.
    pub(super) fn go_live(&mut self, host: usize, go: Box<GoLive>) {
        let Some(inc) = self.hosts[host].vmm.as_ref().map(|vmm| vmm.inc) else {
            return;
        };
        if !self.reaches_storage(host) {
            return self.after(5 * MS, Ev::GoLive { host, inc, go });
        }
        let registration = self.store.register();
        let map = &go.record.quarantine;
        for side in map.sides() {
            let sources = map.sources(side);
            self.store.make_side(Location::Side(side), sources);
        }
        let local = self.clock(host).0;
        let now = self.now;
        let map = go.record.quarantine.clone();
        let (guest, recent) = match go.origin {
            Origin::Cold => {
                let life = go.record.epoch.0;
                self.births.push((life, now));
                self.check.cold(now, inc, life);
                for key in 0..KEYS as u8 {
                    let at = map.locate(range(key))[0].1;
                    let there = self.store.read_sector(at, key, now);
                    self.check.finds(now, host, key, &there);
                }
                (Guest::new(life), Vec::new())
            }
            Origin::TakeOver {
                session, released, ..
            } => {
                let follow = self.hosts[host]
                    .vmm
                    .as_mut()
                    .and_then(|vmm| vmm.follow.take());
                let replica = follow.and_then(|follow| {
                    let diverged = follow.diverged;
                    Some((follow.guest?, follow.replayed, follow.recent, diverged))
                });
                let Some((guest, replayed, recent, diverged)) = replica else {
                    return self.violated(
                        "incomplete",
                        format_args!("host{host} goes live without state"),
                    );
                };
                if self.check.corrupted && !diverged {
                    // It differs and the log ended before anybody could tell: bugs are outside the model.
                    self.heal.done = true;
                    return;
                }
                self.check
                    .takes_over(now, host, inc, session, replayed, &guest);
                let recent = recent.into_iter().filter(|(needs, _)| *needs > released.0);
                (guest, recent.collect())
            }
        };
        let born = self.births.iter().find(|(life, _)| *life == guest.life);
        let behind = born.map_or(0, |(_, at)| (now - at).saturating_sub(guest.vtime));
        self.log(
            host,
            format_args!("acts on the world at exit {}", guest.exit),
        );
        self.hosts[host].shm = None;
        self.drop_conn(host);
        let again: Vec<_> = guest.io.clone();
        let clock = self.clock(host);
        if let Some(vmm) = self.hosts[host].vmm.as_mut() {
            vmm.registration = registration;
            vmm.gate.discard();
            vmm.gate.set_mode(clock, GateMode::Shut);
            vmm.live = Some(Box::new(Live::new(guest, map, local, behind, now)));
            for (needs, packet) in recent {
                let waiting = Waiting {
                    effect: Effect::Net(packet),
                    needs,
                    session: None,
                    free: false,
                };
                vmm.gate.push(clock, format::Seq(needs), 64, waiting);
            }
        }
        self.issue_again(host, again);
        self.port = host;
        self.run_vcpu(host, 100 * US);
        self.tell(host, Event::Live);
    }

    /// Issues the requests again that the guest waits for.
    fn issue_again(&mut self, host: usize, requests: Vec<Io>) {
        if canary::on(Canary::ForgetReissue) {
            return;
        }
        for mut io in requests {
            if canary::on(Canary::WriteNotCaptured)
                && let Some(live) = self.live(host)
            {
                io.write = live.guest.reread(&io);
            }
            self.start_io(host, io);
        }
    }

    /// Copies the quarantined sectors into the image.
    pub(super) fn fold(&mut self, host: usize) {
        let Some(inc) = self.hosts[host].vmm.as_ref().map(|vmm| vmm.inc) else {
            return;
        };
        let reaches = self.reaches_storage(host);
        let Some(live) = self.live(host).filter(|live| live.folding) else {
            return;
        };
        let writes = live
            .open
            .iter()
            .any(|io| io.write.is_some() && live.map.touches(range(io.key)));
        if writes || !reaches {
            return self.after(2 * MS, Ev::Fold { host, inc });
        }
        if live.fold_left == 0 {
            live.fold_left = usize::MAX;
            let keys: Vec<u8> = (0..KEYS as u8)
                .filter(|key| live.map.touches(range(*key)))
                .collect();
            let places: Vec<_> = keys
                .iter()
                .map(|key| (*key, Self::place_of(live, *key)))
                .collect();
            live.fold_left = places.len() + 1;
            for (key, at) in places {
                let sector = self.store.read_sector(at, key, self.now);
                self.submit(host, None, key, Location::Image, Some(sector));
            }
            return self.after(MS, Ev::Fold { host, inc });
        }
        if live.fold_left > 1 {
            return self.after(MS, Ev::Fold { host, inc });
        }
        live.fold_left = 0;
        // Guest writes wait until the record says that the sectors are in the image.
        self.tell(host, Event::Folded);
        self.milestone(host, "folded");
    }

    pub(super) fn unquarantine(&mut self, host: usize) {
        let Some(live) = self.live(host) else { return };
        let map = std::mem::take(&mut live.map);
        live.folding = false;
        let waiting = std::mem::take(&mut live.waiting);
        for side in map.sides() {
            self.store.remove_side(Location::Side(side), self.now);
        }
        for io in waiting {
            self.start_io(host, io);
        }
    }
}
