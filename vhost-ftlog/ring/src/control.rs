//! The control page: the words of the arena that are neither ring nor data.
//!
//! | offset | written by | what |
//! |---|---|---|
//! | 0 | VMM, once | magic, version |
//! | 128 | VMM, kernel | owner: a robust futex that says whether the VMM lives |
//! | 256 | VMM, adding thread | flush requests, progress |
//! | 384 | VMM, consuming thread | consumed, replayed, when to be called |
//! | 512 | daemon | whether it sleeps, space, progress |
//! | 640 | daemon | commit point of the delivery ring, when to be kicked |
//! | 768 | VMM, thread that waits for acknowledgements | what it has seen, and when |
//!
//! Each writer has lines of its own. All words are little-endian and naturally aligned. Neither side
//! believes the other's words beyond what validation allows.

use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};

/// First word of a control page.
pub const CONTROL_MAGIC: u64 = u64::from_le_bytes(*b"PLXCTRL\0");
/// Version of the page's layout and meaning.
pub const CONTROL_VERSION: u32 = 2;
/// A cursor that is never reached: do not call, do not kick.
pub const COMMIT_NEVER: u64 = u64::MAX;

/// The page as both sides map it.
#[derive(Debug)]
#[repr(C)]
pub struct ControlPage {
    /// What the page is.
    pub identity: Line<Identity>,
    /// Whether the VMM lives.
    pub owner: Line<Owner>,
    /// Words of the VMM's adding thread.
    pub producer: Line<Producer>,
    /// Words of the VMM's consuming thread.
    pub consumer: Line<Consumer>,
    /// Words of the daemon about the log queue.
    pub sender: Line<Sender>,
    /// Words of the daemon about delivery.
    pub delivery: Line<Delivery>,
    /// Words of the VMM's thread that waits for acknowledgements.
    pub sight: Line<Sight>,
}

/// Two cache lines of one writer (the second keeps the adjacent-line prefetcher off the next).
#[derive(Debug, Default)]
#[repr(C, align(128))]
pub struct Line<T>(pub T);

impl<T> std::ops::Deref for Line<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// What the page is: set before the arena is handed over.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Identity {
    /// [`CONTROL_MAGIC`].
    pub magic: AtomicU64,
    /// [`CONTROL_VERSION`].
    pub version: AtomicU32,
}

/// The thread id of a VMM thread that lives as long as the VMM, as a robust futex: the kernel sets
/// [`Owner::DIED`] and wakes waiters when that thread is gone. Zero: closed in order.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Owner {
    /// The futex.
    pub word: AtomicU32,
}

impl Owner {
    /// `FUTEX_OWNER_DIED`.
    pub const DIED: u32 = 0x4000_0000;
    /// `FUTEX_WAITERS`.
    pub const WAITERS: u32 = 0x8000_0000;
    /// `FUTEX_TID_MASK`.
    pub const TID: u32 = 0x3fff_ffff;

    /// Whether the VMM is known to be dead.
    #[inline]
    pub fn is_dead(&self) -> bool {
        self.word.load(Ordering::Acquire) & Self::DIED != 0
    }
}

/// Words of the VMM's adding thread.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Producer {
    /// Every append below this is to be sent without waiting for a batch.
    pub flush: AtomicU64,
    /// Monotonic clock in ns when `flush` was last raised.
    pub flush_ns: AtomicU64,
    /// Sequence number of the first append that is not yet used, when the rings are handed over.
    pub base_seq: AtomicU64,
    /// Grows while the VMM's event loop runs.
    pub progress: AtomicU64,
    /// The daemon wakes the futex [`Sender::space`] once every append below this sequence number is used.
    pub space_wanted: AtomicU64,
}

/// Words of the VMM's consuming thread.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Consumer {
    /// Cursor before which the delivery ring is free again.
    pub consumed: AtomicU64,
    /// Every append below this has been replayed.
    pub replayed: AtomicU64,
    /// Call the delivery queue once the commit cursor reaches this.
    pub call_at: AtomicU64,
}

/// Words of the daemon about the log queue.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Sender {
    /// Whether the daemon sleeps: it must then be kicked for a flush.
    pub sleeping: AtomicU32,
    /// Futex: counts the times that wanted space became free.
    pub space: AtomicU32,
    /// Grows while the daemon's data thread runs.
    pub progress: AtomicU64,
    /// What the peer's replica has replayed: every append below this.
    pub replayed: AtomicU64,
    /// What the peer's replica has received: every append below this.
    pub received: AtomicU64,
}

/// Words of the daemon about delivery.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Delivery {
    /// What is committed.
    pub commits: Commits,
    /// Kick the delivery queue once [`Consumer::consumed`] reaches this.
    pub kick_at: AtomicU64,
    /// Kick the delivery queue once [`Consumer::replayed`] reaches this.
    pub replay_kick_at: AtomicU64,
}

/// What the VMM has seen: for measurements alone.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Sight {
    /// Every append below this was seen as used.
    pub seen: AtomicU64,
    /// Monotonic clock in ns of that; stored before it.
    pub seen_ns: AtomicU64,
}

/// How far delivery has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CommitPoint {
    /// Bytes of frames before this position of the delivery ring are whole and checked.
    pub cursor: u64,
    /// The sequence number that the next append must have.
    pub seq: u64,
}

/// The commit point, changed as one: a writer killed at any instant leaves the old or the new.
///
/// The slot that the generation does not name is written first, then the generation: that store is
/// the commit.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Commits {
    generation: AtomicU64,
    slots: [[AtomicU64; 2]; 2],
}

impl Commits {
    /// Replaces the commit point. For one writer.
    #[inline]
    pub fn commit(&self, point: CommitPoint) {
        let generation = self.generation.load(Ordering::Relaxed).wrapping_add(1);
        // A reader that sees these values of the slot must also see that the generation has moved
        // on from the one that named the slot.
        fence(Ordering::Release);
        let slot = &self.slots[(generation & 1) as usize];
        slot[0].store(point.cursor, Ordering::Relaxed);
        slot[1].store(point.seq, Ordering::Relaxed);
        self.generation.store(generation, Ordering::Release);
    }

    /// The commit point; all that was written before it was committed is visible.
    #[inline]
    pub fn read(&self) -> CommitPoint {
        loop {
            let generation = self.generation.load(Ordering::Acquire);
            let slot = &self.slots[(generation & 1) as usize];
            let point = CommitPoint {
                cursor: slot[0].load(Ordering::Relaxed),
                seq: slot[1].load(Ordering::Relaxed),
            };
            fence(Ordering::Acquire);
            if self.generation.load(Ordering::Relaxed) == generation {
                return point;
            }
            #[cfg(loom)]
            loom::thread::yield_now();
        }
    }
}

/// Flush requests against a sleeping daemon: neither side misses the other.
#[derive(Debug, Clone, Copy)]
pub struct Doorbell<'a> {
    /// Raised by the VMM.
    pub flush: &'a AtomicU64,
    /// Set by the daemon.
    pub sleeping: &'a AtomicU32,
}

impl Doorbell<'_> {
    /// Raises the flush request to `seq`; true where the daemon must be kicked.
    #[inline]
    pub fn request(&self, seq: u64) -> bool {
        self.flush.store(seq, Ordering::Release);
        fence(Ordering::SeqCst);
        self.sleeping.load(Ordering::Relaxed) != 0
    }

    /// Announces sleep; the flush request that stands then is returned and must be served first if
    /// it is new.
    #[inline]
    pub fn fall_asleep(&self) -> u64 {
        self.sleeping.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.flush.load(Ordering::Acquire)
    }

    /// Announces that the daemon looks by itself again.
    #[inline]
    pub fn wake(&self) {
        self.sleeping.store(0, Ordering::Relaxed);
    }
}

impl ControlPage {
    /// The flush request and the daemon's sleep.
    pub fn doorbell(&self) -> Doorbell<'_> {
        Doorbell {
            flush: &self.producer.flush,
            sleeping: &self.sender.sleeping,
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::mem::offset_of;

    use super::*;

    /// The offsets of version 2, which other frontends rely on.
    #[test]
    fn the_offsets_are_those_of_the_specification() {
        assert_eq!(offset_of!(ControlPage, identity), 0);
        assert_eq!(offset_of!(ControlPage, owner), 128);
        assert_eq!(offset_of!(ControlPage, producer), 256);
        assert_eq!(offset_of!(ControlPage, consumer), 384);
        assert_eq!(offset_of!(ControlPage, sender), 512);
        assert_eq!(offset_of!(ControlPage, delivery), 640);
        assert_eq!(offset_of!(ControlPage, sight), 768);
        assert_eq!(offset_of!(Producer, space_wanted), 32);
        assert_eq!(offset_of!(Sender, progress), 8);
        assert_eq!(offset_of!(Sender, received), 24);
        assert_eq!(offset_of!(Delivery, kick_at), 40);
        assert_eq!(offset_of!(Sight, seen_ns), 8);
        assert!(size_of::<ControlPage>() <= 4096);
    }

    #[test]
    fn a_commit_replaces_both_numbers() {
        let commits = Commits::default();
        assert_eq!(commits.read(), CommitPoint::default());
        for i in 1..5 {
            let point = CommitPoint {
                cursor: 100 * i,
                seq: i,
            };
            commits.commit(point);
            assert_eq!(commits.read(), point);
        }
    }
}
