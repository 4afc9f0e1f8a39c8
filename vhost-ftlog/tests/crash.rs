//! Killing daemons, VMM-side processes and the link at random points.
//!
//! No acknowledged append is ever lost, none is delivered twice, order is kept. A kill counts where it hit
//! while the channel worked and appends were in flight. `FTLOG_CRASHES` says how many such kills each
//! test, and each victim of the first one, needs (default few); `FTLOG_SEED` repeats a run.
#![allow(clippy::unwrap_used)]

mod proxy;
mod rig;
mod vmm;

use std::time::{Duration, Instant};

use format::Seq;
use proxy::Proxy;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rig::{Host, Rig};
use vhost_ftlog::config_space::{Reach, Role};
use vhost_ftlog::frontend::Channel;
use vmm::{Checker, Vmm, append_of};

const LIMIT: Duration = Duration::from_secs(30);

fn crashes(default: u64) -> u64 {
    std::env::var("FTLOG_CRASHES").map_or(default, |text| text.parse().unwrap())
}

/// A random generator whose seed is named when the test fails.
fn seeded(test: &str) -> (ChaCha8Rng, SeedNote) {
    let seed = std::env::var("FTLOG_SEED").map_or_else(
        |_| u64::from(std::process::id()) ^ 0x5eed_0000,
        |text| text.parse().unwrap(),
    );
    let note = SeedNote(format!(
        "rerun: FTLOG_SEED={seed} cargo test -p vhost-ftlog --test crash {test}"
    ));
    (ChaCha8Rng::seed_from_u64(seed), note)
}

struct SeedNote(String);

impl Drop for SeedNote {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.0);
        }
    }
}

/// True where there was such a process.
fn kill(pid: u32) -> bool {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).is_ok()
}

/// Kills until enough of them hit with something in flight; `round` says whether it did.
fn campaign(test: &str, mut round: impl FnMut(&mut ChaCha8Rng) -> bool) {
    let (mut random, _note) = seeded(test);
    let wanted = crashes(4);
    let (mut tried, mut hit) = (0, 0);
    while hit < wanted {
        assert!(tried < 20 * wanted, "of {tried} kills {hit} hit");
        tried += 1;
        hit += u64::from(round(&mut random));
    }
    eprintln!("{test}: of {tried} kills {hit} hit with appends in flight");
}

/// A pair whose connection goes through a proxy that can be cut.
fn cut_pair(rig: &Rig) -> (Host, Host, Proxy) {
    let mut config = rig.config("backup", true);
    let port = proxy::free_port();
    rig::listen_on(&mut config, port);
    let (channel, events) = Channel::start(config).unwrap();
    let params = rig.params(Role::Receiver, Reach::Listen);
    let mut backup = Host::open(channel, events, params, Seq(0));
    let proxy = Proxy::start(([127, 0, 0, 1], port).into());
    let mut primary = rig.primary(proxy.address());
    primary.wait_connected();
    backup.wait_connected();
    (primary, backup, proxy)
}

/// What dies while both VMMs live on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    PrimaryDaemon,
    BackupDaemon,
    BothDaemons,
    Link,
}

const VICTIMS: [Victim; 4] = [
    Victim::PrimaryDaemon,
    Victim::BackupDaemon,
    Victim::BothDaemons,
    Victim::Link,
];

/// A pair under fire, and what has been appended to it.
struct Pair {
    primary: Host,
    backup: Host,
    proxy: Proxy,
    checker: Checker,
    next: u64,
    /// What was acknowledged at the last blow.
    acked_at_blow: Seq,
}

impl Pair {
    fn new(rig: &Rig) -> Self {
        let (primary, backup, proxy) = cut_pair(rig);
        Self {
            primary,
            backup,
            proxy,
            checker: Checker::default(),
            next: 0,
            acked_at_blow: Seq(0),
        }
    }

    /// Appends, or makes room where there is none.
    fn append(&mut self, flush: bool) {
        let append = append_of(self.next);
        match self.primary.session.producer.append(&append).unwrap() {
            Some(seq) => {
                assert_eq!(seq, Seq(self.next));
                self.next += 1;
            }
            None => self.checker.read(&mut self.backup.session.consumer),
        }
        if flush {
            self.primary.session.producer.flush(Seq(self.next));
        }
    }

    /// What is acknowledged, which is committed, whoever is dead at the moment.
    fn acked(&self) -> Seq {
        let acked = self.primary.session.acks.acked().unwrap();
        assert!(self.backup.session.consumer.committed().1 >= acked);
        acked
    }

    /// Appends until the channel has come back from the last blow.
    fn come_back(&mut self) {
        let until = Instant::now() + LIMIT;
        let wanted = Seq(self.acked_at_blow.0 + 1);
        while self.acked() < wanted {
            assert!(Instant::now() < until, "the channel does not come back");
            self.append(true);
            self.checker.read(&mut self.backup.session.consumer);
            let limit = Some(Duration::from_millis(20));
            let acks = &self.primary.session.acks;
            acks.wait(wanted, Duration::ZERO, limit).unwrap();
        }
    }

    /// True where it hit with appends in flight on a channel that worked.
    fn strike(&mut self, victim: Victim) -> bool {
        let acked = self.acked();
        let in_flight = acked > self.acked_at_blow && acked < Seq(self.next);
        let is_hit = match victim {
            Victim::PrimaryDaemon => self.primary.channel.daemon_pid().is_some_and(kill),
            Victim::BackupDaemon => self.backup.channel.daemon_pid().is_some_and(kill),
            Victim::BothDaemons => {
                let primary = self.primary.channel.daemon_pid().is_some_and(kill);
                self.backup.channel.daemon_pid().is_some_and(kill) && primary
            }
            Victim::Link => self.proxy.cut(),
        };
        self.acked_at_blow = self.acked();
        in_flight && is_hit
    }

    /// All that was appended arrives, once, and is acknowledged.
    fn finish(mut self) {
        self.primary.session.producer.flush(Seq(self.next));
        let until = Instant::now() + LIMIT;
        while self.checker.next < self.next {
            let (next, came) = (self.next, self.checker.next);
            assert!(Instant::now() < until, "{came} of {next} arrived");
            let consumer = &mut self.backup.session.consumer;
            self.checker.read(consumer);
            let limit = Some(Duration::from_millis(50));
            consumer.wait(Duration::ZERO, limit).unwrap();
        }
        let (acks, all) = (&self.primary.session.acks, Seq(self.next));
        assert!(acks.wait(all, Duration::ZERO, Some(LIMIT)).unwrap());
        let committed = self.backup.session.consumer.committed().1;
        assert_eq!(committed, all, "nothing twice");
    }
}

/// The VMMs live on; their daemons and the link come and go.
#[test]
fn daemons_and_link_die_at_random_and_every_append_arrives_once() {
    let (mut random, _note) = seeded("daemons_and_link");
    let rig = Rig::new("crash");
    let mut pair = Pair::new(&rig);
    let wanted = crashes(4);
    let (mut tried, mut hits) = ([0; VICTIMS.len()], [0; VICTIMS.len()]);
    while hits.iter().any(|hit| *hit < wanted) {
        assert!(
            tried.iter().sum::<u64>() < 100 * wanted,
            "{tried:?} {hits:?}"
        );
        // Else it may hit what still comes back from the last blow.
        if random.random_ratio(2, 3) {
            pair.come_back();
        }
        let until = Instant::now() + Duration::from_micros(random.random_range(0..6000));
        while Instant::now() < until {
            pair.append(random.random_ratio(1, 4));
            pair.acked();
        }
        let victim = random.random_range(0..VICTIMS.len());
        tried[victim] += 1;
        hits[victim] += u64::from(pair.strike(VICTIMS[victim]));
        if random.random_ratio(1, 2) {
            pair.checker.read(&mut pair.backup.session.consumer);
        }
    }
    pair.finish();
    eprintln!("{VICTIMS:?}: of {tried:?} kills {hits:?} hit with appends in flight");
}

/// The primary's VMM dies: the backup gets all that was published before, then `END`.
#[test]
fn a_producer_dies_and_its_whole_log_and_the_end_are_delivered() {
    campaign("a_producer_dies", |random| {
        let rig = Rig::new("producer");
        let mut backup = Vmm::consumer(&rig);
        let mut primary = Vmm::producer(&rig, backup.listen());
        backup.wait_progress(random.random_range(1..400));
        let hit = primary.kill_in_flight();
        let published = primary.published();
        let end = backup.wait_end();
        assert_eq!(end, published, "all that was published, and not more");
        assert!(primary.acked() <= end);
        hit
    });
}

/// Kills both, in either order: whether something was in flight.
fn die_together(random: &mut ChaCha8Rng, primary: &mut Vmm, daemon: u32) -> bool {
    let daemon_first = random.random_ratio(1, 2);
    let mut hit = true;
    if daemon_first {
        hit &= kill(daemon);
    }
    hit &= primary.kill_in_flight();
    if !daemon_first {
        hit &= kill(daemon);
    }
    hit
}

/// The worst pair: who could resend and who could acknowledge are gone at once.
#[test]
fn backup_daemon_and_producer_die_together_and_the_consumer_has_all_that_was_acknowledged() {
    campaign("backup_daemon_and_producer", |random| {
        let rig = Rig::new("both");
        let mut backup = Vmm::consumer(&rig);
        let mut primary = Vmm::producer(&rig, backup.listen());
        backup.wait_progress(random.random_range(1..400));
        let daemon = backup.daemon_pid();
        let hit = die_together(random, &mut primary, daemon);
        let acked = primary.acked();
        backup.wait_progress(acked);
        hit
    });
}

/// Both processes of the primary's side die: what was acknowledged is with the backup.
#[test]
fn a_whole_side_dies_and_nothing_acknowledged_is_lost() {
    campaign("a_whole_side", |random| {
        let rig = Rig::new("side");
        let mut backup = Vmm::consumer(&rig);
        let mut primary = Vmm::producer(&rig, backup.listen());
        backup.wait_progress(random.random_range(1..400));
        let daemon = primary.daemon_pid();
        let hit = die_together(random, &mut primary, daemon);
        let acked = primary.acked();
        backup.wait_progress(acked);
        hit
    });
}

/// The backup's VMM dies: its daemon stops acknowledging, and nothing was acknowledged that it did not
/// have.
#[test]
fn a_consumer_dies_and_nothing_is_acknowledged_that_it_had_not() {
    campaign("a_consumer_dies", |random| {
        let rig = Rig::new("consumer");
        let mut backup = Vmm::consumer(&rig);
        let mut primary = Vmm::producer(&rig, backup.listen());
        backup.wait_progress(random.random_range(1..400));
        backup.shoot();
        let hit = primary.is_in_flight();
        backup.kill();
        primary.wait_peer_dead();
        assert!(primary.acked() <= backup.committed());
        hit
    });
}

/// Both processes of the backup's side die, in either order: the primary counts nothing as acknowledged
/// that the dead consumer could not have read.
#[test]
fn the_whole_backup_dies_and_nothing_is_acknowledged_that_it_had_not() {
    campaign("the_whole_backup", |random| {
        let rig = Rig::new("backup");
        let mut backup = Vmm::consumer(&rig);
        let mut primary = Vmm::producer(&rig, backup.listen());
        backup.wait_progress(random.random_range(1..400));
        let daemon = backup.daemon_pid();
        let hit = if random.random_ratio(1, 2) {
            kill(daemon);
            backup.shoot();
            primary.is_in_flight()
        } else {
            backup.shoot();
            kill(daemon);
            primary.is_in_flight()
        };
        backup.kill();
        primary.kill();
        assert!(primary.acked() <= backup.committed());
        hit
    });
}

/// Not a test: the body of a VMM-side process, run by the tests above.
#[test]
#[ignore = "run as a process of its own by the other tests"]
fn vmm_process() {
    vmm::process();
}
