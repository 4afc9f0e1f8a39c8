//! The whole channel: two frontends, two daemons, TCP on the loopback interface.
#![allow(clippy::unwrap_used)]

mod rig;

use std::time::Duration;

use format::{FrameFlags, Seq};
use rig::{Host, Rig, bytes_of, drain_until};
use rustix::process::{Pid, Signal, getpgid, getsid, kill_process};
use vhost_ftlog::config_space::{AckMode, Tuning};
use vhost_ftlog::frontend::ChannelEvent;
use vhost_ftlog::notice::Notice;

const LIMIT: Duration = Duration::from_secs(20);

#[test]
fn appends_arrive_in_order_and_are_acknowledged() {
    let rig = Rig::new("order");
    let (mut primary, mut backup) = rig.pair();
    let mut received = Vec::new();
    for i in 0..1000u64 {
        let bytes = bytes_of(i, 1 + (i as usize * 37) % 300);
        let seq = primary.session.producer.append(&bytes).unwrap().unwrap();
        assert_eq!(seq, Seq(i));
    }
    let upto = primary.session.producer.next_seq();
    primary.session.producer.flush(upto);
    assert!(
        primary
            .session
            .acks
            .wait(upto, Duration::ZERO, Some(LIMIT))
            .unwrap()
    );
    drain_until(&mut backup.session.consumer, upto, &mut received);
    let expected: Vec<u8> = (0..1000u64)
        .flat_map(|i| bytes_of(i, 1 + (i as usize * 37) % 300))
        .collect();
    assert_eq!(received, expected);
}

/// Acknowledged means committed: the consumer sees it without waiting.
#[test]
fn what_is_acknowledged_is_visible_to_the_consumer() {
    let rig = Rig::new("visible");
    let (mut primary, backup) = rig.pair();
    for i in 0..2000u64 {
        primary
            .session
            .producer
            .append_urgent(&bytes_of(i, 64))
            .unwrap()
            .unwrap();
        let upto = Seq(i + 1);
        assert!(
            primary
                .session
                .acks
                .wait(upto, Duration::ZERO, Some(LIMIT))
                .unwrap()
        );
        assert!(backup.session.consumer.committed().1 >= upto);
    }
}

/// Without a flush the batch timer sends.
#[test]
fn an_append_that_nobody_flushes_goes_out_after_the_batch_time() {
    let rig = Rig::new("timer");
    let (mut primary, backup) = rig.pair();
    primary.session.producer.append(b"lonely").unwrap().unwrap();
    assert!(
        backup
            .session
            .consumer
            .wait(Duration::ZERO, Some(LIMIT))
            .unwrap()
    );
    assert_eq!(backup.session.consumer.committed().1, Seq(1));
}

/// A full arena makes the producer wait; nothing is dropped.
#[test]
fn a_consumer_that_stands_still_stops_the_producer_and_loses_nothing() {
    let rig = Rig::new("full");
    let (mut primary, mut backup) = rig.pair();
    let entry = |i: u64| bytes_of(i, 60_000);
    let mut sent = 0u64;
    loop {
        match primary.session.producer.append(&entry(sent)).unwrap() {
            Some(_) => sent += 1,
            // Everything is full once even a long wait frees nothing.
            None if !primary
                .session
                .producer
                .wait_space(60_000, Duration::from_millis(300))
                .unwrap() =>
            {
                break;
            }
            None => {}
        }
        assert!(sent < 10_000, "nothing ever fills up");
    }
    let mut received = Vec::new();
    drain_until(&mut backup.session.consumer, Seq(sent), &mut received);
    assert!(primary.session.producer.wait_space(60_000, LIMIT).unwrap());
    assert_eq!(received.len() as u64, sent * 60_000);
    for (i, chunk) in received.chunks(60_000).enumerate() {
        assert_eq!(chunk, entry(i as u64), "append {i}");
    }
}

#[test]
fn replayed_mode_acknowledges_what_the_replica_has_replayed() {
    let rig = Rig::new("replayed");
    let (mut primary, mut backup) = rig.pair();
    let tuning = Tuning {
        ack_mode: AckMode::Replayed,
        ..Tuning::default()
    };
    primary.channel.tune(tuning).unwrap();
    backup.channel.tune(tuning).unwrap();
    primary.session.producer.append_urgent(b"one").unwrap();
    primary.session.producer.append_urgent(b"two").unwrap();
    let mut received = Vec::new();
    drain_until(&mut backup.session.consumer, Seq(2), &mut received);
    assert_eq!(primary.session.acks.acked().unwrap(), Seq(0));
    let mut replayed = backup.session.consumer.replay_progress();
    replayed.report(Seq(1));
    let acks = &primary.session.acks;
    assert!(acks.wait(Seq(1), Duration::ZERO, Some(LIMIT)).unwrap());
    assert_eq!(acks.acked().unwrap(), Seq(1));
    replayed.report(Seq(2));
    assert!(acks.wait(Seq(2), Duration::ZERO, Some(LIMIT)).unwrap());
    assert_eq!(acks.progress(), (Seq(2), Seq(2)));
}

/// R13: after `close` on the backup nothing is acknowledged, whatever still arrives.
#[test]
fn after_close_nothing_is_acknowledged() {
    let rig = Rig::new("close");
    let (mut primary, backup) = rig.pair();
    primary.session.producer.append_urgent(b"before").unwrap();
    let acks = primary.session.acks.clone();
    assert!(acks.wait(Seq(1), Duration::ZERO, Some(LIMIT)).unwrap());
    backup.channel.close().unwrap();
    let fixed = backup.session.consumer.committed().1;
    primary.session.producer.append_urgent(b"after").unwrap();
    primary.wait_lost();
    assert!(
        !acks
            .wait(Seq(2), Duration::ZERO, Some(Duration::from_millis(200)))
            .unwrap()
    );
    assert_eq!(backup.session.consumer.committed().1, fixed);
}

fn daemon(host: &Host) -> Pid {
    let pid = host.channel.daemon_pid().unwrap();
    Pid::from_raw(pid.cast_signed()).unwrap()
}

#[test]
fn a_daemon_that_is_asked_to_end_drains_first() {
    let rig = Rig::new("drain");
    let (mut primary, backup) = rig.pair();
    let pid = daemon(&primary);
    for i in 0..1000 {
        let bytes = bytes_of(i, 100);
        primary.session.producer.append(&bytes).unwrap().unwrap();
    }
    kill_process(pid, Signal::TERM).unwrap();
    primary.wait_for("drained", |event| {
        *event == ChannelEvent::Notice(Notice::Drained)
    });
    assert_eq!(primary.session.acks.acked().unwrap(), Seq(1000));
    assert_eq!(backup.session.consumer.committed().1, Seq(1000));
}

/// Ctrl-C and the end of the VMM's process group reach the VMM alone.
#[test]
fn a_daemon_has_a_session_of_its_own() {
    let rig = Rig::new("group");
    let (primary, backup) = rig.pair();
    for host in [&primary, &backup] {
        let pid = daemon(host);
        assert_eq!(getsid(Some(pid)).unwrap(), pid);
        assert_eq!(getpgid(Some(pid)).unwrap(), pid);
    }
}

#[test]
fn a_bulk_stream_runs_beside_the_log() {
    use std::io::{Read, Write};
    let rig = Rig::new("bulk");
    let (mut primary, mut backup) = rig.pair();
    let id = vhost_ftlog::config_space::BulkId([7; 16]);
    primary.channel.request_bulk(id).unwrap();
    backup.channel.request_bulk(id).unwrap();
    let mut to = primary.take_bulk(id);
    let mut from = backup.take_bulk(id);
    let data = bytes_of(3, 3 << 20);
    let copy = data.clone();
    let writer = std::thread::spawn(move || to.write_all(&copy).unwrap());
    primary
        .session
        .producer
        .append_urgent(b"meanwhile")
        .unwrap();
    assert!(
        primary
            .session
            .acks
            .wait(Seq(1), Duration::ZERO, Some(LIMIT))
            .unwrap()
    );
    let mut got = Vec::new();
    from.read_to_end(&mut got).unwrap();
    writer.join().unwrap();
    assert_eq!(got, data);
}

/// A second session over the same channels begins anew, with its own numbers.
#[test]
fn a_session_can_follow_another() {
    let rig = Rig::new("second");
    let (mut primary, mut backup) = rig.pair();
    primary.session.producer.append_urgent(b"old").unwrap();
    assert!(
        primary
            .session
            .acks
            .wait(Seq(1), Duration::ZERO, Some(LIMIT))
            .unwrap()
    );
    rig.reopen(&mut primary, &mut backup, Seq(500));
    assert_eq!(
        primary.session.producer.append_urgent(b"new").unwrap(),
        Some(Seq(500))
    );
    assert!(
        primary
            .session
            .acks
            .wait(Seq(501), Duration::ZERO, Some(LIMIT))
            .unwrap()
    );
    let frame = backup.session.consumer.next_frame().unwrap().unwrap();
    assert_eq!((frame.header.first, frame.body), (Seq(500), &b"new"[..]));
    assert!(!frame.header.flags.contains(FrameFlags::END));
}
