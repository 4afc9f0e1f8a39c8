//! Layouts, which heartbeat.h repeats, and what readers see while pages change.

use core::mem::{offset_of, size_of};

use super::*;

#[test]
fn layouts_are_those_of_the_c_header() {
    assert_eq!(size_of::<WindowSlot>(), 32);
    assert_eq!(offset_of!(VmmPage, window), 64);
    assert_eq!(size_of::<VmmPage>(), 64 + 32 * WINDOW_SLOTS);
    assert_eq!(size_of::<DaemonPage>(), 8);
    assert_eq!(offset_of!(SeenPage, words), 8);
    assert_eq!(offset_of!(SeenPage, local), 96);
    assert_eq!(offset_of!(SeenPage, highest_request), 104);
    assert_eq!(size_of::<SeenPage>(), 128);
    assert_eq!(
        Counter::ALL.map(|c| c as u32),
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    );
}

fn keys(byte: u8) -> SessionKeys {
    SessionKeys {
        ours: Key::new([byte; 16]),
        theirs: Key::new([byte + 1; 16]),
    }
}

#[test]
fn a_third_key_replaces_the_first() {
    let mut entry = SessionEntry {
        slot: 5,
        epoch: 6,
        ..SessionEntry::default()
    };
    entry.install(KeyGeneration(1), keys(10));
    entry.install(KeyGeneration(2), keys(20));
    assert_eq!(entry.keys_of(KeyGeneration(1)), Some(&keys(10)));
    entry.install(KeyGeneration(3), keys(30));
    assert_eq!(entry.keys_of(KeyGeneration(1)), None);
    assert_eq!(entry.keys_of(KeyGeneration(2)), Some(&keys(20)));
    assert_eq!(entry.keys_of(KeyGeneration(3)), Some(&keys(30)));

    let bytes = entry.to_bytes();
    assert_eq!((bytes[0], bytes[8]), (5, 6));
    assert_eq!(bytes[16..18], [1, 2], "slot 0 holds generation 2");
    assert_eq!((bytes[24], bytes[40]), (21, 20), "theirs before ours");
    assert_eq!(bytes[56..58], [1, 3], "slot 1 holds generation 3");
}

#[test]
fn window_forgets_a_request_when_its_slot_is_taken() {
    let window = Window::default();
    window.note(1, 11, 100);
    assert_eq!(window.sent_ns(1, 11), Some(100));
    assert_eq!(window.sent_ns(1, 12), None);
    assert_eq!(window.sent_ns(2, 11), None);
    assert_eq!(window.sent_ns(0, 0), None);
    let later = 1 + WINDOW_SLOTS as u64;
    window.note(later, 13, 200);
    assert_eq!(window.sent_ns(1, 11), None);
    assert_eq!(window.sent_ns(later, 13), Some(200));
}

#[test]
fn a_reader_never_sees_half_a_reply() {
    let page = SeenPage::default();
    let done = core::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 1..=200_000 {
                page.record(&SeenReply {
                    count: n,
                    sequence: n,
                    flags: n,
                    ..SeenReply::default()
                });
            }
            done.store(true, Ordering::Release);
        });
        let mut last = 0;
        while !done.load(Ordering::Acquire) || last == 0 {
            if let Some(reply) = page.reply() {
                assert_eq!((reply.sequence, reply.flags), (reply.count, reply.count));
                assert!(reply.count >= last);
                last = reply.count;
            }
        }
    });
    assert_eq!(page.reply().map(|r| r.count), Some(200_000));
}

#[test]
fn round_trip_begins_at_the_egress_probe_where_there_is_one() {
    let reply = SeenReply {
        arrived_ns: 900,
        sent_ns: 100,
        ..SeenReply::default()
    };
    assert_eq!(reply.round_trip_ns(), 800);
    assert_eq!(
        SeenReply {
            departed_ns: 400,
            ..reply
        }
        .round_trip_ns(),
        500
    );
}
