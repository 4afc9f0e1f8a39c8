//! The device's half of a split virtqueue with event indices.
//!
//! The device looks at buffers in the order of their positions, as often as it likes, and uses them
//! in the same order, many with one update. What the driver writes is copied once and validated.
//! Chains and indirect tables are refused: the channel has none.

use crate::Error;
use crate::memory::{Desc, RingMemory};
use crate::need_event;

/// The device's half of one ring.
#[derive(Debug)]
pub struct Device<M> {
    memory: M,
    size: u64,
    in_order: bool,
    used: u64,
    available: u64,
}

/// What a driver may not ask of this device.
const UNSUPPORTED: u16 = Desc::NEXT | Desc::INDIRECT;

impl<M: RingMemory> Device<M> {
    /// The device's half of the ring in `memory`, of which all before `base` is used.
    /// `in_order` says whether `VIRTIO_F_IN_ORDER` was negotiated: one update then covers a batch.
    pub fn new(memory: M, base: u64, in_order: bool) -> Self {
        Self {
            size: u64::from(memory.size()),
            memory,
            in_order,
            used: base,
            available: base,
        }
    }

    /// Descriptors of the ring.
    pub fn size(&self) -> u16 {
        self.memory.size()
    }

    /// The position before which all is used.
    #[inline]
    pub fn used(&self) -> u64 {
        self.used
    }

    /// The position before which all was available at the last look.
    #[inline]
    pub fn seen(&self) -> u64 {
        self.available
    }

    /// Looks how far the driver has come: all before the returned position may be looked at.
    ///
    /// # Errors
    /// [`Error::Broken`] where the driver made more available than the ring has, or took some back.
    #[inline]
    pub fn available(&mut self) -> Result<u64, Error> {
        let index = self.memory.load_avail_idx();
        let ahead = u64::from(index.wrapping_sub(self.used as u16));
        if ahead > self.size || self.used + ahead < self.available {
            return Err(Error::Broken("available index outside of the ring"));
        }
        self.available = self.used + ahead;
        Ok(self.available)
    }

    /// The buffer at `position`.
    ///
    /// # Errors
    /// [`Error::Broken`] for a descriptor outside of the table, a chain or an indirect table.
    ///
    /// # Panics
    /// Where `position` was not seen available: our own mistake.
    #[inline]
    pub fn desc(&self, position: u64) -> Result<Desc, Error> {
        assert!(
            (self.used..self.available).contains(&position),
            "only what is available is looked at"
        );
        let index = self.memory.read_avail_slot((position % self.size) as u16);
        if u64::from(index) >= self.size {
            return Err(Error::Broken("descriptor outside of the table"));
        }
        let desc = self.memory.read_desc(index);
        if desc.flags & UNSUPPORTED != 0 {
            return Err(Error::Broken("chained or indirect descriptor"));
        }
        Ok(desc)
    }

    /// Returns all buffers before `upto` to the driver, `len` bytes written into each. True where
    /// the driver asked to be called.
    ///
    /// # Panics
    /// Where they were not all available: our own mistake.
    #[inline]
    pub fn use_up_to(&mut self, upto: u64, len: u32) -> bool {
        assert!(
            (self.used..=self.available).contains(&upto),
            "only what is available is used"
        );
        if upto == self.used {
            return false;
        }
        let first = if self.in_order { upto - 1 } else { self.used };
        for (slot, position) in (self.used..).zip(first..upto) {
            let id = self.memory.read_avail_slot((position % self.size) as u16);
            self.memory
                .write_used_slot((slot % self.size) as u16, u32::from(id), len);
        }
        let old = self.used as u16;
        self.used = upto;
        self.memory.store_used_idx(upto as u16);
        self.memory.full_fence();
        need_event(self.memory.read_used_event(), upto as u16, old)
    }

    /// Asks the driver for a kick once the buffer at `position` is available; true where it already
    /// is (no kick need come then).
    ///
    /// # Errors
    /// As [`Device::available`].
    pub fn ask_kick(&mut self, position: u64) -> Result<bool, Error> {
        self.memory.write_avail_event(position as u16);
        self.memory.full_fence();
        Ok(self.available()? > position)
    }

    /// Asks the driver for no kicks: an event just behind is passed only after a whole turn.
    pub fn ask_no_kick(&self) {
        self.memory
            .write_avail_event((self.available as u16).wrapping_sub(1));
    }
}
