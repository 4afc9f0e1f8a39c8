//! The stations of log entries, as `ftprobe` hears them from two daemons and their frontends.
#![allow(clippy::unwrap_used)]

mod rig;

use std::time::Duration;

use format::Seq;
use ftprobe::stations::{Clocks, Header, Joined, Recording, Stages, Watch, join, programs};
use harness::privileges;
use heartbeat::clock::monotonic_ns;
use rig::{Host, Rig, bytes_of};
use usdt::{DEFAULT_DISTANCE, Station, sample_one_in};

const LIMIT: Duration = Duration::from_secs(20);
const APPENDS: u64 = 40 * DEFAULT_DISTANCE;

/// Hears everything that happens in these hosts' processes while `job` runs.
fn heard(session: u64, primary: &mut Host, backup: &Host, job: impl FnOnce(&mut Host)) -> Joined {
    let processes = [
        std::process::id(),
        primary.channel.daemon_pid().unwrap(),
        backup.channel.daemon_pid().unwrap(),
    ];
    // However fast it is: this process has most of the stations, and would show fewer appends.
    sample_one_in(DEFAULT_DISTANCE);
    let mut watch = Watch::start(&programs(&processes).unwrap()).unwrap();
    job(primary);
    let mut recording = Recording::new(Header::here(DEFAULT_DISTANCE));
    watch.take(|event| recording.events.push(event));
    assert_eq!(watch.lost(), 0);
    recording.events.retain(|event| event.session == session);
    let recordings = [recording];
    join(&recordings, &Clocks::of(&recordings, false))
}

#[test]
fn every_sampled_append_passes_every_station_within_the_time_that_the_vmm_sees() {
    if !privileges::root("stations") {
        return;
    }
    let rig = Rig::new("stations");
    let (mut primary, backup) = rig.pair();
    let mut windows = Vec::new();
    let joined = heard(rig.session.number(), &mut primary, &backup, |primary| {
        for i in 0..APPENDS {
            let bytes = bytes_of(i, 100);
            let before = monotonic_ns();
            primary
                .session
                .producer
                .append_urgent(&bytes)
                .unwrap()
                .unwrap();
            let acks = &primary.session.acks;
            assert!(acks.wait(Seq(i + 1), Duration::ZERO, Some(LIMIT)).unwrap());
            windows.push((before, monotonic_ns()));
        }
    });
    let expected: Vec<u64> = (0..APPENDS).step_by(DEFAULT_DISTANCE as usize).collect();
    let found: Vec<u64> = joined.chains.iter().map(|chain| chain.position).collect();
    assert_eq!(found, expected);
    let mut whole = 0;
    for chain in &joined.chains {
        assert!(chain.is_complete(), "{chain:?}");
        let (before, after) = windows[chain.position as usize];
        let appended = chain.at(Station::Appended).unwrap();
        let seen = chain.at(Station::Seen).unwrap();
        assert!(
            before <= appended && seen <= after,
            "{before} {chain:?} {after}"
        );
        whole += seen - appended;
    }
    let stages = Stages::of(&joined);
    assert_eq!(stages.joined(), expected.len());
    let mean = whole as f64 / expected.len() as f64;
    let sum = stages.sum_of_means_ns();
    assert!((sum / mean - 1.0).abs() < 1e-6, "{sum} is not {mean}");
}

/// Batches: one event of the daemons covers many appends, and each sampled one has its chain.
#[test]
fn appends_that_travel_together_have_each_its_way() {
    if !privileges::root("stations of a batch") {
        return;
    }
    let rig = Rig::new("stations-batch");
    let (mut primary, backup) = rig.pair();
    let joined = heard(rig.session.number(), &mut primary, &backup, |primary| {
        for i in 0..APPENDS {
            let bytes = bytes_of(i, 40);
            while primary.session.producer.append(&bytes).unwrap().is_none() {
                primary.session.producer.wait_space(40, LIMIT).unwrap();
            }
        }
        primary.session.producer.flush(Seq(APPENDS));
        let acks = &primary.session.acks;
        assert!(
            acks.wait(Seq(APPENDS), Duration::ZERO, Some(LIMIT))
                .unwrap()
        );
    });
    assert_eq!(joined.chains.len() as u64, APPENDS / DEFAULT_DISTANCE);
    for chain in &joined.chains {
        assert!(chain.is_complete(), "{chain:?}");
        assert!(chain.at_ns[..7].is_sorted(), "{chain:?}");
    }
}
