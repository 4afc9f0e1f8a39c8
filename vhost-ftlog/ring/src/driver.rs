//! The driver's half of a split virtqueue with in-order use and event indices.
//!
//! A buffer's **position** counts the buffers before it and never wraps; its descriptor is the
//! position modulo the ring's size, so there is no free list. [`Driver`] adds on one thread.
//! [`Reaper`]s, on any thread, see how far the device has come: no lock, no shared write.

use std::sync::Arc;

use crate::memory::{Desc, RingMemory};
use crate::sync::{AtomicU64, Ordering};
use crate::{Error, need_event};

#[derive(Debug)]
struct Shared<M> {
    memory: M,
    /// Positions published so far. Written by the driver alone, before the ring's own index.
    published: AtomicU64,
}

/// Adds buffers to a ring.
#[derive(Debug)]
pub struct Driver<M> {
    shared: Arc<Shared<M>>,
    size: u64,
    base: u64,
    next: u64,
    /// A position up to which the device is known to have used all.
    used: u64,
    /// Positions below this have been considered for a kick.
    considered: u64,
}

impl<M: RingMemory> Driver<M> {
    /// A driver of the ring in `memory`, whose indices both stand at `base`.
    pub fn new(memory: M, base: u64) -> Self {
        memory.store_avail_idx(base as u16);
        memory.store_used_idx(base as u16);
        // Nobody waits: an event just behind is passed only after a whole turn of the index.
        memory.write_used_event((base as u16).wrapping_sub(1));
        memory.write_avail_event(base as u16);
        let size = u64::from(memory.size());
        let shared = Shared {
            memory,
            published: AtomicU64::new(base),
        };
        Self {
            shared: Arc::new(shared),
            size,
            base,
            next: base,
            used: base,
            considered: base,
        }
    }

    /// A view of what the device has used.
    pub fn reaper(&self) -> Reaper<M> {
        Reaper {
            shared: Arc::clone(&self.shared),
        }
    }

    /// The position that the next buffer gets.
    pub fn position(&self) -> u64 {
        self.next
    }

    /// The position before which the device has used all, as of the last look.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// Looks again at how far the device has come.
    ///
    /// # Errors
    /// [`Error::Broken`] where it claims more than it was given.
    pub fn refresh(&mut self) -> Result<u64, Error> {
        let used = self.reaper_view()?;
        self.used = self.used.max(used);
        Ok(self.used)
    }

    fn reaper_view(&self) -> Result<u64, Error> {
        used_of(&self.shared, self.size)
    }

    /// Whether a descriptor is free, as of the last look.
    #[inline]
    pub fn has_room(&self) -> bool {
        self.next - self.used < self.size
    }

    /// Publishes one buffer at once and returns its position.
    ///
    /// # Errors
    /// [`Error::Full`] where the device holds all descriptors, [`Error::Broken`] where it lies.
    #[inline]
    pub fn add(&mut self, desc: Desc) -> Result<u64, Error> {
        if !self.has_room() {
            self.refresh()?;
            if !self.has_room() {
                return Err(Error::Full);
            }
        }
        let memory = &self.shared.memory;
        let position = self.next;
        let index = (position % self.size) as u16;
        memory.write_desc(index, desc);
        if position - self.base < self.size {
            // Later turns find the slot as it must be.
            memory.write_avail_slot(index, index);
        }
        self.next += 1;
        self.shared.published.store(self.next, Ordering::Relaxed);
        memory.store_avail_idx(self.next as u16);
        Ok(position)
    }

    /// Whether the device asked to be woken for what was added since the last call.
    #[inline]
    pub fn needs_kick(&mut self) -> bool {
        let memory = &self.shared.memory;
        memory.full_fence();
        let event = memory.read_avail_event();
        let wanted = need_event(event, self.next as u16, self.considered as u16);
        self.considered = self.next;
        wanted
    }
}

/// Sees how far the device has used a ring's buffers.
#[derive(Debug)]
pub struct Reaper<M> {
    shared: Arc<Shared<M>>,
}

impl<M> Clone for Reaper<M> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<M: RingMemory> Reaper<M> {
    /// The position before which the device has used all. No system call.
    ///
    /// # Errors
    /// [`Error::Broken`] where the device claims more than it was given.
    #[inline]
    pub fn used(&self) -> Result<u64, Error> {
        used_of(&self.shared, u64::from(self.shared.memory.size()))
    }

    /// The position before which all is published.
    pub fn published(&self) -> u64 {
        self.shared.published.load(Ordering::Acquire)
    }

    /// Asks to be called when the buffer at `position` is used; true where it already is (no call
    /// need come then). One request stands at a time: the last one.
    ///
    /// # Errors
    /// As [`Reaper::used`].
    pub fn arm(&self, position: u64) -> Result<bool, Error> {
        self.shared.memory.write_used_event(position as u16);
        self.shared.memory.full_fence();
        Ok(self.used()? > position)
    }

    /// Asks for no calls.
    ///
    /// # Errors
    /// As [`Reaper::used`].
    pub fn disarm(&self) -> Result<(), Error> {
        let used = self.used()? as u16;
        self.shared.memory.write_used_event(used.wrapping_sub(1));
        Ok(())
    }
}

/// Extends the ring's 16-bit used index to a position.
///
/// `published` is read on both sides of the index: the index then lies within one ring of what was
/// published, however long this thread slept in between.
#[inline]
fn used_of<M: RingMemory>(shared: &Shared<M>, size: u64) -> Result<u64, Error> {
    loop {
        let before = shared.published.load(Ordering::Acquire);
        let index = shared.memory.load_used_idx();
        let after = shared.published.load(Ordering::Acquire);
        let moved = after - before;
        if moved >= 1 << 15 {
            continue;
        }
        let behind = u64::from((after as u16).wrapping_sub(index));
        if behind > size + moved {
            return Err(Error::Broken("used index outside of what was published"));
        }
        return Ok(after - behind);
    }
}
