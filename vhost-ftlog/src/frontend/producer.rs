//! Publishing the log: one copy into the arena, one descriptor, at once.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use format::{MAX_APPEND_LEN, Seq};
use ring::{COMMIT_NEVER, Desc, Driver, LogSpace, MappedVring, Mark};
use rustix::thread::futex;

use super::Error;
use super::session::SessionMemory;
use crate::daemon::life::monotonic_ns;

/// Bytes of the log data area that are kept hot while acknowledgements keep up: half of a usual L2.
const HOT_BYTES: u32 = 512 << 10;

/// What the producer has done. Plain counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProducerStats {
    /// Appends published.
    pub appends: u64,
    /// System calls to wake the daemon.
    pub kicks: u64,
    /// Appends and flushes that needed none.
    pub kicks_suppressed: u64,
    /// Times that the arena or the ring was full.
    pub full: u64,
}

/// Publishes appends. One thread at a time.
#[derive(Debug)]
pub struct LogProducer {
    memory: Arc<SessionMemory>,
    ring: Driver<MappedVring>,
    space: LogSpace,
    /// What each outstanding append releases, by position modulo the ring's size.
    marks: Vec<Mark>,
    released: u64,
    /// The daemon was told of everything below this sequence number.
    told: u64,
    stats: ProducerStats,
}

impl LogProducer {
    pub(super) fn new(memory: Arc<SessionMemory>, ring: Driver<MappedVring>) -> Self {
        let len = u32::try_from(memory.layout.log_len).expect("limited by the layout");
        let marks = vec![Mark::default(); usize::from(memory.layout.log_ring.size)];
        Self {
            space: LogSpace::new(len, HOT_BYTES),
            marks,
            released: ring.position(),
            told: memory.first.0 + ring.position(),
            ring,
            memory,
            stats: ProducerStats::default(),
        }
    }

    /// The sequence number that the next append gets.
    #[must_use]
    pub fn next_seq(&self) -> Seq {
        Seq(self.memory.first.0 + self.ring.position())
    }

    /// Copies `bytes`, one or more whole entries, into the arena and publishes them as one append.
    /// `None` where arena or ring is full: see [`LogProducer::wait_space`]. The daemon sends it when
    /// its batch is full or its time has come, or at once after [`LogProducer::flush`].
    ///
    /// # Errors
    /// [`Error::AppendLen`], or [`Error::Ring`] where the daemon broke the ring.
    #[inline]
    pub fn append(&mut self, bytes: &[u8]) -> Result<Option<Seq>, Error> {
        self.append_with(bytes.len(), |to| to.copy_from_slice(bytes))
    }

    /// As [`LogProducer::append`], of `len` bytes that `fill` writes in place.
    ///
    /// # Errors
    /// As [`LogProducer::append`].
    #[inline]
    pub fn append_with(
        &mut self,
        len: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<Option<Seq>, Error> {
        let appended = self.place_and_add(len, fill)?;
        if let Some(seq) = appended {
            if self.ring.needs_kick() {
                self.kick();
                self.has_told(seq.next());
            } else {
                self.stats.kicks_suppressed += 1;
            }
        }
        Ok(appended)
    }

    #[inline]
    fn place_and_add(
        &mut self,
        len: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<Option<Seq>, Error> {
        if len == 0 || len > MAX_APPEND_LEN {
            return Err(Error::AppendLen(len));
        }
        let Some((at, mark)) = self.place(len as u32)? else {
            self.stats.full += 1;
            return Ok(None);
        };
        let addr = self.memory.layout.log + u64::from(at);
        fill(self.stretch(addr, len));
        let seq = self.next_seq();
        let slot = self.ring.position() as usize & (self.marks.len() - 1);
        self.marks[slot] = mark;
        self.ring.add(Desc {
            addr,
            len: len as u32,
            flags: 0,
            next: 0,
        })?;
        self.stats.appends += 1;
        usdt::appended(self.memory.number, seq.0, seq.0 + 1);
        Ok(Some(seq))
    }

    #[inline]
    #[allow(unsafe_code)] // A slice of the arena.
    fn stretch(&mut self, addr: u64, len: usize) -> &mut [u8] {
        let at = self
            .memory
            .mapping
            .bytes_at(addr, len)
            .expect("placed inside the log data area");
        // SAFETY: inside the mapping; the stretch was placed and not published, so a correct daemon
        // does not look at it, and no other reference of this process to it exists.
        unsafe { std::slice::from_raw_parts_mut(at.as_ptr(), len) }
    }

    /// A free stretch and a free descriptor, looking for used ones if the window or the ring is full.
    #[inline]
    fn place(&mut self, len: u32) -> Result<Option<(u32, Mark)>, Error> {
        if self.ring.has_room()
            && let Some(placed) = self.space.place_in_window(len)
        {
            return Ok(Some(placed));
        }
        self.reap()?;
        if !self.ring.has_room() {
            return Ok(None);
        }
        Ok(self.space.place(len))
    }

    /// Takes back the space of what is acknowledged.
    ///
    /// # Errors
    /// [`Error::Ring`] where the daemon broke the ring.
    pub fn reap(&mut self) -> Result<(), Error> {
        let used = self.ring.refresh()?;
        if used > self.released {
            let slot = (used - 1) as usize & (self.marks.len() - 1);
            self.space.release(self.marks[slot]);
            self.released = used;
        }
        Ok(())
    }

    /// Has everything before `upto` sent at once: for an `Output` (R8). Wakes the daemon only where
    /// it sleeps.
    #[inline]
    pub fn flush(&mut self, upto: Seq) {
        if self.request(upto) {
            self.kick();
        } else {
            self.stats.kicks_suppressed += 1;
        }
        self.has_told(upto);
    }

    /// The trace point of what the daemon was told of for the first time.
    #[inline]
    fn has_told(&mut self, upto: Seq) {
        if upto.0 > self.told {
            usdt::kicked(self.memory.number, self.told, upto.0);
            self.told = upto.0;
        }
    }

    /// Raises the flush request; true where the daemon must be kicked for it.
    #[inline]
    fn request(&self, upto: Seq) -> bool {
        let control = self.memory.control();
        control
            .producer
            .flush_ns
            .store(monotonic_ns(), Ordering::Relaxed);
        control.doorbell().request(upto.0)
    }

    /// Publishes an append and has everything up to it sent at once, with one kick at most.
    ///
    /// # Errors
    /// As [`LogProducer::append`].
    #[inline]
    pub fn append_urgent(&mut self, bytes: &[u8]) -> Result<Option<Seq>, Error> {
        let appended = self.place_and_add(bytes.len(), |to| to.copy_from_slice(bytes))?;
        if let Some(seq) = appended {
            let sleeps = self.request(seq.next());
            if self.ring.needs_kick() || sleeps {
                self.kick();
            } else {
                self.stats.kicks_suppressed += 1;
            }
            self.has_told(seq.next());
        }
        Ok(appended)
    }

    fn kick(&mut self) {
        self.stats.kicks += 1;
        self.memory.log_events.kick.signal();
    }

    /// Waits until an append of `len` bytes has room; false after `limit`.
    ///
    /// # Errors
    /// [`Error::Ring`] where the daemon broke the ring.
    pub fn wait_space(&mut self, len: usize, limit: Duration) -> Result<bool, Error> {
        let until = monotonic_ns().saturating_add(limit.as_nanos() as u64);
        // What waits for a batch would otherwise wait for nothing.
        self.flush(self.next_seq());
        loop {
            self.reap()?;
            if self.has_space(len) {
                return Ok(true);
            }
            let now = monotonic_ns();
            if now >= until {
                return Ok(false);
            }
            self.sleep_for_space(until - now)?;
        }
    }

    fn has_space(&mut self, len: usize) -> bool {
        self.ring.has_room() && self.space.has_room(len as u32)
    }

    fn sleep_for_space(&self, ns: u64) -> Result<(), Error> {
        let control = self.memory.control();
        let word = &control.sender.space;
        let seen = word.load(Ordering::Acquire);
        let wanted = &control.producer.space_wanted;
        let next_release = self.memory.first.0 + self.released + 1;
        wanted.store(next_release, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if self.memory.log.used()? <= self.released {
            let limit = rustix::time::Timespec {
                tv_sec: (ns / 1_000_000_000) as i64,
                tv_nsec: (ns % 1_000_000_000) as i64,
            };
            // A changed word, a signal and a timeout all mean: look again.
            let _ = futex::wait(word, futex::Flags::empty(), seen, Some(&limit));
        }
        wanted.store(COMMIT_NEVER, Ordering::Relaxed);
        Ok(())
    }

    /// Ticks the VMM's progress word, which heartbeats carry.
    pub fn tick_progress(&self) {
        self.memory
            .control()
            .producer
            .progress
            .fetch_add(1, Ordering::Relaxed);
    }

    /// What was done so far.
    #[must_use]
    pub fn stats(&self) -> ProducerStats {
        self.stats
    }
}
