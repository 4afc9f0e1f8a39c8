//! A split virtqueue from the device's side: virtio-queue's [`Queue`] with strict errors and without hidden state.
//!
//! Whether the driver wants an interrupt is decided from the ring alone, by the used index before and after, so
//! [`Queue::needs_notification`] and its private counter are not used. Everything that a restored queue needs is in
//! [`QueueState`].

use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError};

use super::chain::Chain;
use super::state::QueueState;
use crate::StateError;

/// The driver has broken the rules; the device stops until it is reset.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QueueError {
    #[error("the ring is malformed: {0}")]
    Ring(#[from] virtio_queue::Error),
    #[error("ring or buffer cannot be accessed: {0}")]
    Memory(#[from] GuestMemoryError),
    #[error("a ring lies outside RAM")]
    RingOutsideRam,
    #[error("a chain has more descriptors than the queue")]
    ChainTooLong,
    #[error("a chain is broken, loops or is empty")]
    BrokenChain,
    #[error("a readable descriptor follows a writable one")]
    ReadableAfterWritable,
    #[error("a buffer at {0:#x} lies outside RAM")]
    OutsideRam(u64),
    #[error("a chain has not the buffers that its request needs")]
    TooShort,
}

/// Guest physical addresses of the three parts, as the driver wrote them.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RingAddresses {
    pub(super) desc: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
}

#[derive(Debug)]
pub(crate) struct Virtqueue {
    max_size: u16,
    size: u16,
    rings: RingAddresses,
    /// Ready from the driver's enabling to the reset.
    queue: Queue,
}

impl Virtqueue {
    pub(super) fn new(max_size: u16) -> Virtqueue {
        Virtqueue {
            max_size,
            size: max_size,
            rings: RingAddresses::default(),
            queue: Queue::new(max_size).expect("queue sizes are powers of two"),
        }
    }

    pub(super) fn reset(&mut self) {
        *self = Virtqueue::new(self.max_size);
    }

    pub(super) fn enabled(&self) -> bool {
        self.queue.ready()
    }

    pub(super) fn max_size(&self) -> u16 {
        self.max_size
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// Chooses the size; what is no power of two or too large is ignored.
    pub(super) fn set_size(&mut self, size: u16) {
        if !self.enabled() && size.is_power_of_two() && size <= self.max_size {
            self.size = size;
        }
    }

    pub(super) fn rings(&self) -> RingAddresses {
        self.rings
    }

    /// Sets the addresses; they count when the queue is enabled and stay until it is reset.
    pub(super) fn set_rings(&mut self, rings: RingAddresses) {
        if !self.enabled() {
            self.rings = rings;
        }
    }

    /// Puts the queue to use.
    pub(super) fn enable<M: GuestMemory>(
        &mut self,
        ram: &M,
        event_idx: bool,
    ) -> Result<(), QueueError> {
        self.configure(event_idx)?;
        if !self.queue.is_valid(ram) {
            self.queue.set_ready(false);
            return Err(QueueError::RingOutsideRam);
        }
        Ok(())
    }

    fn configure(&mut self, event_idx: bool) -> Result<(), QueueError> {
        self.queue.try_set_size(self.size)?;
        self.queue
            .try_set_desc_table_address(GuestAddress(self.rings.desc))?;
        self.queue
            .try_set_avail_ring_address(GuestAddress(self.rings.driver))?;
        self.queue
            .try_set_used_ring_address(GuestAddress(self.rings.device))?;
        self.queue.set_event_idx(event_idx);
        self.queue.set_ready(true);
        Ok(())
    }

    /// Takes the next available chain.
    pub(super) fn pop<M: GuestMemory>(&mut self, ram: &M) -> Result<Option<Chain>, QueueError> {
        let limit = self.max_size;
        match self.queue.iter(ram)?.next() {
            Some(descriptors) => Chain::read(descriptors, limit).map(Some),
            None => Ok(None),
        }
    }

    /// Gives back the `count` chains taken last: they are available again.
    pub(super) fn undo_pops(&mut self, count: u16) {
        self.queue
            .set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// A copy to look ahead with.
    pub(super) fn preview(&self) -> Virtqueue {
        let queue = Queue::try_from(self.queue.state()).expect("the state of a valid queue");
        Virtqueue {
            max_size: self.max_size,
            size: self.size,
            rings: self.rings,
            queue,
        }
    }

    /// Returns a chain to the driver with `written` bytes in it.
    pub(super) fn complete<M: GuestMemory>(
        &mut self,
        ram: &M,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        Ok(self.queue.add_used(ram, head, written)?)
    }

    /// Index that the next completed chain gets.
    pub(super) fn next_used(&self) -> u16 {
        self.queue.next_used()
    }

    /// Whether the driver wants an interrupt for the chains completed since the used index was `since`
    /// (virtio 1.2, 2.7.7).
    pub(super) fn owes_interrupt<M: GuestMemory>(
        &self,
        ram: &M,
        since: u16,
    ) -> Result<bool, QueueError> {
        let completed = self.next_used().wrapping_sub(since);
        if completed == 0 {
            return Ok(false);
        }
        if !self.queue.event_idx_enabled() {
            let flags: u16 = ram.load(self.driver_field(0), Ordering::Relaxed)?;
            return Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0);
        }
        let used_event_offset = 4 + 2 * u64::from(self.size);
        let used_event: u16 = ram.load(self.driver_field(used_event_offset), Ordering::Relaxed)?;
        let event = u16::from_le(used_event);
        Ok(self.next_used().wrapping_sub(event).wrapping_sub(1) < completed)
    }

    /// Asks for a notification when the driver makes more available than there is now.
    pub(super) fn ask_for_kick<M: GuestMemory>(&self, ram: &M) -> Result<(), QueueError> {
        if self.queue.event_idx_enabled() {
            let available = self.queue.avail_idx(ram, Ordering::Acquire)?.0;
            let avail_event_offset = 4 + 8 * u64::from(self.size);
            ram.store(
                u16::to_le(available),
                self.device_field(avail_event_offset),
                Ordering::Relaxed,
            )?;
        } else {
            ram.store(0u16, self.device_field(0), Ordering::Relaxed)?;
        }
        Ok(())
    }

    /// Tells the driver that no notification is needed. With EVENT_IDX that is so until asked for.
    pub(super) fn spare_kicks<M: GuestMemory>(&self, ram: &M) -> Result<(), QueueError> {
        if !self.queue.event_idx_enabled() {
            let flags = (VRING_USED_F_NO_NOTIFY as u16).to_le();
            ram.store(flags, self.device_field(0), Ordering::Relaxed)?;
        }
        Ok(())
    }

    /// Address in the driver's area (available ring).
    fn driver_field(&self, offset: u64) -> GuestAddress {
        GuestAddress(self.rings.driver.saturating_add(offset))
    }

    /// Address in the device's area (used ring).
    fn device_field(&self, offset: u64) -> GuestAddress {
        GuestAddress(self.rings.device.saturating_add(offset))
    }

    pub(super) fn save(&self) -> QueueState {
        QueueState {
            size: self.size,
            enabled: self.enabled(),
            desc: self.rings.desc,
            driver: self.rings.driver,
            device: self.rings.device,
            next_avail: self.queue.next_avail(),
            next_used: self.queue.next_used(),
        }
    }

    pub(super) fn restore(
        state: &QueueState,
        max_size: u16,
        event_idx: bool,
    ) -> Result<Virtqueue, StateError> {
        let invalid = StateError::Invalid {
            device: "virtqueue",
            field: "size or address",
        };
        if !state.size.is_power_of_two() || state.size > max_size {
            return Err(invalid);
        }
        let mut queue = Virtqueue::new(max_size);
        queue.size = state.size;
        queue.rings = RingAddresses {
            desc: state.desc,
            driver: state.driver,
            device: state.device,
        };
        if state.enabled {
            queue.configure(event_idx).map_err(|_| invalid)?;
        }
        queue.queue.set_next_avail(state.next_avail);
        queue.queue.set_next_used(state.next_used);
        Ok(queue)
    }
}

#[cfg(test)]
mod tests;
