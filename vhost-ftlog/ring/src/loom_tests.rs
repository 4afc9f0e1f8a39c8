//! The rings and the control words under every interleaving that loom finds.
//!
//! Run by `RUSTFLAGS="--cfg loom" cargo test -p ring --release --lib loom`.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
use loom::thread;

use crate::control::{CommitPoint, Commits, Doorbell};
use crate::memory::{Desc, RingMemory};
use crate::{Device, Driver, Error};

const SIZE: usize = 2;

/// A ring in loom's memory. Descriptors and payload are plain cells: loom reports any access that is
/// not ordered by the protocol.
#[derive(Debug)]
struct LoomRing {
    desc: [UnsafeCell<Desc>; SIZE],
    payload: [UnsafeCell<u64>; SIZE],
    avail: [UnsafeCell<u16>; SIZE],
    used: [UnsafeCell<(u32, u32)>; SIZE],
    avail_idx: AtomicU16,
    used_idx: AtomicU16,
    avail_event: AtomicU16,
    used_event: AtomicU16,
}

impl LoomRing {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            desc: std::array::from_fn(|_| UnsafeCell::new(Desc::default())),
            payload: std::array::from_fn(|_| UnsafeCell::new(0)),
            avail: std::array::from_fn(|_| UnsafeCell::new(0)),
            used: std::array::from_fn(|_| UnsafeCell::new((0, 0))),
            avail_idx: AtomicU16::new(0),
            used_idx: AtomicU16::new(0),
            avail_event: AtomicU16::new(0),
            used_event: AtomicU16::new(u16::MAX),
        })
    }
}

#[allow(unsafe_code)] // Cells of loom are read and written through raw pointers.
impl RingMemory for Arc<LoomRing> {
    fn size(&self) -> u16 {
        SIZE as u16
    }
    fn read_desc(&self, index: u16) -> Desc {
        // SAFETY: loom checks that no write is concurrent.
        self.desc[usize::from(index)].with(|cell| unsafe { *cell })
    }
    fn write_desc(&self, index: u16, desc: Desc) {
        // SAFETY: loom checks that no access is concurrent.
        self.desc[usize::from(index)].with_mut(|cell| unsafe { *cell = desc });
    }
    fn read_avail_slot(&self, slot: u16) -> u16 {
        // SAFETY: loom checks that no write is concurrent.
        self.avail[usize::from(slot)].with(|cell| unsafe { *cell })
    }
    fn write_avail_slot(&self, slot: u16, index: u16) {
        // SAFETY: loom checks that no access is concurrent.
        self.avail[usize::from(slot)].with_mut(|cell| unsafe { *cell = index });
    }
    fn load_avail_idx(&self) -> u16 {
        self.avail_idx.load(Ordering::Acquire)
    }
    fn store_avail_idx(&self, value: u16) {
        self.avail_idx.store(value, Ordering::Release);
    }
    fn read_used_slot(&self, slot: u16) -> (u32, u32) {
        // SAFETY: loom checks that no write is concurrent.
        self.used[usize::from(slot)].with(|cell| unsafe { *cell })
    }
    fn write_used_slot(&self, slot: u16, id: u32, len: u32) {
        // SAFETY: loom checks that no access is concurrent.
        self.used[usize::from(slot)].with_mut(|cell| unsafe { *cell = (id, len) });
    }
    fn load_used_idx(&self) -> u16 {
        self.used_idx.load(Ordering::Acquire)
    }
    fn store_used_idx(&self, value: u16) {
        self.used_idx.store(value, Ordering::Release);
    }
    fn read_used_event(&self) -> u16 {
        self.used_event.load(Ordering::Relaxed)
    }
    fn write_used_event(&self, value: u16) {
        self.used_event.store(value, Ordering::Relaxed);
    }
    fn read_avail_event(&self) -> u16 {
        self.avail_event.load(Ordering::Relaxed)
    }
    fn write_avail_event(&self, value: u16) {
        self.avail_event.store(value, Ordering::Relaxed);
    }
    fn read_avail_flags(&self) -> u16 {
        0
    }
    fn read_used_flags(&self) -> u16 {
        0
    }
    fn full_fence(&self) {
        fence(Ordering::SeqCst);
    }
}

/// Payloads arrive in order and whole, slots are reused only after use, on a ring that wraps.
#[test]
fn buffers_arrive_in_order_and_are_not_reused_too_early() {
    loom::model(|| {
        let ring = LoomRing::new();
        let mut driver = Driver::new(Arc::clone(&ring), 0);
        let mut device = Device::new(Arc::clone(&ring), 0, true);
        let device_ring = Arc::clone(&ring);
        let device = thread::spawn(move || {
            let mut seen = 0;
            while seen < 3 {
                let available = device.available().unwrap();
                if available == seen {
                    thread::yield_now();
                    continue;
                }
                for position in seen..available {
                    assert_eq!(device.desc(position).unwrap().addr, position);
                    let slot = (position % SIZE as u64) as usize;
                    // SAFETY: loom checks that no write is concurrent.
                    #[allow(unsafe_code)]
                    let payload = device_ring.payload[slot].with(|cell| unsafe { *cell });
                    assert_eq!(payload, 100 + position);
                }
                seen = available;
                device.use_up_to(seen, 0);
            }
        });
        for position in 0..3u64 {
            while !driver.has_room() {
                driver.refresh().unwrap();
                thread::yield_now();
            }
            let slot = (position % SIZE as u64) as usize;
            // SAFETY: loom checks that no access is concurrent.
            #[allow(unsafe_code)]
            ring.payload[slot].with_mut(|cell| unsafe { *cell = 100 + position });
            let desc = Desc {
                addr: position,
                ..Desc::default()
            };
            assert_eq!(driver.add(desc).unwrap(), position);
        }
        device.join().unwrap();
        assert_eq!(driver.refresh().unwrap(), 3);
    });
}

/// A device that goes to sleep is kicked, or saw the buffer itself.
#[test]
fn no_kick_is_lost() {
    loom::model(|| {
        let ring = LoomRing::new();
        let mut driver = Driver::new(Arc::clone(&ring), 0);
        let mut device = Device::new(Arc::clone(&ring), 0, true);
        device.ask_no_kick();
        let device = thread::spawn(move || device.ask_kick(0).unwrap());
        driver.add(Desc::default()).unwrap();
        let kicked = driver.needs_kick();
        let seen = device.join().unwrap();
        assert!(kicked || seen);
    });
}

/// A waiter for an acknowledgement is called, or saw it itself.
#[test]
fn no_call_is_lost() {
    loom::model(|| {
        let ring = LoomRing::new();
        let mut driver = Driver::new(Arc::clone(&ring), 0);
        let mut device = Device::new(Arc::clone(&ring), 0, true);
        driver.add(Desc::default()).unwrap();
        let reaper = driver.reaper();
        let device = thread::spawn(move || {
            assert_eq!(device.available().unwrap(), 1);
            device.use_up_to(1, 0)
        });
        let seen = reaper.arm(0).unwrap();
        let called = device.join().unwrap();
        assert!(called || seen);
        assert_eq!(reaper.used().unwrap(), 1);
    });
}

/// A reaper on another thread never sees more than is used, and never an error.
#[test]
fn a_reaper_beside_the_driver_sees_only_what_is_used() {
    loom::model(|| {
        let ring = LoomRing::new();
        let mut driver = Driver::new(Arc::clone(&ring), 0);
        let mut device = Device::new(Arc::clone(&ring), 0, true);
        let reaper = driver.reaper();
        let reader = thread::spawn(move || {
            let first = reaper.used().unwrap();
            let second = reaper.used().unwrap();
            assert!(first <= second && second <= 2);
        });
        driver.add(Desc::default()).unwrap();
        device.available().unwrap();
        device.use_up_to(1, 0);
        driver.add(Desc::default()).unwrap();
        reader.join().unwrap();
        assert!(matches!(driver.refresh(), Ok(1)));
    });
}

/// A full ring refuses instead of overwriting.
#[test]
fn a_full_ring_refuses() {
    loom::model(|| {
        let mut driver = Driver::new(LoomRing::new(), 0);
        driver.add(Desc::default()).unwrap();
        driver.add(Desc::default()).unwrap();
        assert!(matches!(driver.add(Desc::default()), Err(Error::Full)));
    });
}

/// The commit point is read whole, never half old and half new, and never goes back.
#[test]
fn a_commit_point_is_never_torn() {
    loom::model(|| {
        let commits = Arc::new(Commits::default());
        let writer = Arc::clone(&commits);
        let writer = thread::spawn(move || {
            for i in 1..=2 {
                writer.commit(CommitPoint {
                    cursor: 10 * i,
                    seq: i,
                });
            }
        });
        let first = commits.read();
        let second = commits.read();
        for point in [first, second] {
            assert_eq!(point.cursor, 10 * point.seq);
        }
        assert!(first.seq <= second.seq);
        writer.join().unwrap();
        assert_eq!(commits.read().seq, 2);
    });
}

/// A flush request is seen by a daemon that falls asleep, or the VMM sees that it must kick.
#[test]
fn no_flush_is_lost() {
    loom::model(|| {
        let words = Arc::new((AtomicU64::new(0), AtomicU32::new(0)));
        let other = Arc::clone(&words);
        let daemon = thread::spawn(move || {
            let doorbell = Doorbell {
                flush: &other.0,
                sleeping: &other.1,
            };
            doorbell.fall_asleep()
        });
        let doorbell = Doorbell {
            flush: &words.0,
            sleeping: &words.1,
        };
        let kicked = doorbell.request(7);
        let seen = daemon.join().unwrap();
        assert!(kicked || seen == 7);
    });
}
