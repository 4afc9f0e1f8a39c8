//! Killing daemons, VMM-side processes and the link at random points.
//!
//! No acknowledged append is ever lost, none is delivered twice, order is kept. `FTLOG_CRASHES` says
//! how many kills (default few), `FTLOG_SEED` repeats a run.
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

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    // A process that is gone already is as good as killed.
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
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

/// The VMMs live on; their daemons and the link come and go.
#[test]
fn daemons_and_link_die_at_random_and_every_append_arrives_once() {
    let (mut random, _note) = seeded("daemons_and_link");
    let rig = Rig::new("crash");
    let (mut primary, mut backup, proxy) = cut_pair(&rig);
    let mut checker = Checker::default();
    let mut next = 0u64;
    for round in 0..crashes(20) {
        let victim = random.random_range(0..4);
        let until = Instant::now() + Duration::from_micros(random.random_range(0..6000));
        while Instant::now() < until {
            let append = append_of(next);
            match primary.session.producer.append(&append).unwrap() {
                Some(seq) => {
                    assert_eq!(seq, Seq(next));
                    next += 1;
                }
                None => {
                    checker.read(&mut backup.session.consumer);
                }
            }
            if random.random_ratio(1, 4) {
                primary.session.producer.flush(Seq(next));
            }
            // Acknowledged means committed, whoever is dead at the moment.
            let acked = primary.session.acks.acked().unwrap();
            assert!(
                backup.session.consumer.committed().1 >= acked,
                "round {round}"
            );
        }
        if matches!(victim, 0 | 2) {
            primary.channel.daemon_pid().into_iter().for_each(kill);
        }
        if matches!(victim, 1 | 2) {
            backup.channel.daemon_pid().into_iter().for_each(kill);
        }
        if victim == 3 {
            proxy.cut();
        }
        if random.random_ratio(1, 2) {
            checker.read(&mut backup.session.consumer);
        }
    }
    primary.session.producer.flush(Seq(next));
    let until = Instant::now() + LIMIT;
    while checker.next < next {
        assert!(Instant::now() < until, "{} of {next} arrived", checker.next);
        checker.read(&mut backup.session.consumer);
        backup
            .session
            .consumer
            .wait(Duration::ZERO, Some(Duration::from_millis(50)))
            .unwrap();
    }
    let acks = &primary.session.acks;
    assert!(acks.wait(Seq(next), Duration::ZERO, Some(LIMIT)).unwrap());
    assert_eq!(
        backup.session.consumer.committed().1,
        Seq(next),
        "nothing twice"
    );
}

/// The primary's VMM dies: the backup gets all that was published before, then `END`.
#[test]
fn a_producer_dies_and_its_whole_log_and_the_end_are_delivered() {
    let (mut random, _note) = seeded("a_producer_dies");
    for _ in 0..crashes(4) {
        let rig = Rig::new("producer");
        let mut backup = Vmm::consumer(&rig);
        let mut primary = Vmm::producer(&rig, backup.listen());
        backup.wait_progress(random.random_range(1..400));
        primary.kill();
        let published = primary.published();
        let end = backup.wait_end();
        assert_eq!(end, published, "all that was published, and not more");
        assert!(primary.acked() <= end);
    }
}

/// The worst pair: who could resend and who could acknowledge are gone at once.
#[test]
fn backup_daemon_and_producer_die_together_and_the_consumer_has_all_that_was_acknowledged() {
    let (mut random, _note) = seeded("backup_daemon_and_producer");
    for _ in 0..crashes(4) {
        let rig = Rig::new("both");
        let mut backup = Vmm::consumer(&rig);
        let mut primary = Vmm::producer(&rig, backup.listen());
        backup.wait_progress(random.random_range(1..400));
        let daemon = backup.daemon_pid();
        if random.random_ratio(1, 2) {
            kill(daemon);
            primary.kill();
        } else {
            primary.kill();
            kill(daemon);
        }
        let acked = primary.acked();
        backup.wait_progress(acked);
    }
}

/// Both processes of the primary's side die: what was acknowledged is with the backup.
#[test]
fn a_whole_side_dies_and_nothing_acknowledged_is_lost() {
    let (mut random, _note) = seeded("a_whole_side");
    for _ in 0..crashes(4) {
        let rig = Rig::new("side");
        let mut backup = Vmm::consumer(&rig);
        let mut primary = Vmm::producer(&rig, backup.listen());
        backup.wait_progress(random.random_range(1..400));
        let daemon = primary.daemon_pid();
        primary.kill();
        kill(daemon);
        let acked = primary.acked();
        backup.wait_progress(acked);
    }
}

/// The backup's VMM dies: its daemon stops acknowledging, and nothing was acknowledged that it did not
/// have.
#[test]
fn a_consumer_dies_and_nothing_is_acknowledged_that_it_had_not() {
    let (mut random, _note) = seeded("a_consumer_dies");
    for _ in 0..crashes(4) {
        let rig = Rig::new("consumer");
        let mut backup = Vmm::consumer(&rig);
        let mut primary = Vmm::producer(&rig, backup.listen());
        backup.wait_progress(random.random_range(1..400));
        backup.kill();
        primary.wait_peer_dead();
        assert!(primary.acked() <= backup.committed());
    }
}

/// Both processes of the backup's side die, in either order: the primary counts nothing as acknowledged
/// that the dead consumer could not have read.
#[test]
fn the_whole_backup_dies_and_nothing_is_acknowledged_that_it_had_not() {
    let (mut random, _note) = seeded("the_whole_backup");
    for _ in 0..crashes(4) {
        let rig = Rig::new("backup");
        let mut backup = Vmm::consumer(&rig);
        let mut primary = Vmm::producer(&rig, backup.listen());
        backup.wait_progress(random.random_range(1..400));
        let daemon = backup.daemon_pid();
        if random.random_ratio(1, 2) {
            kill(daemon);
            backup.kill();
        } else {
            backup.kill();
            kill(daemon);
        }
        primary.kill();
        assert!(primary.acked() <= backup.committed());
    }
}

/// Not a test: the body of a VMM-side process, run by the tests above.
#[test]
#[ignore = "run as a process of its own by the other tests"]
fn vmm_process() {
    vmm::process();
}
