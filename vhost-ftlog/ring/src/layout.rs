//! Where the parts of a split virtqueue lie in memory (virtio 1.2, 2.7).

use crate::Error;

/// The most descriptors that a ring can have (virtio 1.2, 2.7: a power of two, at most 2^15).
pub const MAX_RING_SIZE: u16 = 1 << 15;

/// Byte offsets of a ring's parts in its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringLayout {
    /// Number of descriptors.
    pub size: u16,
    /// Offset of the descriptor table, a multiple of 16.
    pub desc: u64,
    /// Offset of the available ring, a multiple of 2.
    pub avail: u64,
    /// Offset of the used ring, a multiple of 4.
    pub used: u64,
}

impl VringLayout {
    /// Lays a ring of `size` descriptors out at `start`, its parts on cache lines of their own.
    ///
    /// # Errors
    /// [`Error::Layout`] unless `size` is a power of two up to [`MAX_RING_SIZE`] and `start` a
    /// multiple of 128.
    pub const fn at(start: u64, size: u16) -> Result<Self, Error> {
        if !size.is_power_of_two() || size > MAX_RING_SIZE {
            return Err(Error::Layout("ring size is not a power of two up to 32768"));
        }
        if !start.is_multiple_of(128) {
            return Err(Error::Layout("ring does not start on a cache line"));
        }
        let desc = start;
        let avail = (desc + Self::desc_len(size)).next_multiple_of(128);
        let used = (avail + Self::avail_len(size)).next_multiple_of(128);
        Ok(Self {
            size,
            desc,
            avail,
            used,
        })
    }

    /// Offset of the first byte after the ring.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.used + Self::used_len(self.size)
    }

    /// Bytes of a descriptor table.
    #[must_use]
    pub const fn desc_len(size: u16) -> u64 {
        16 * size as u64
    }

    /// Bytes of an available ring: flags, index, slots, used_event.
    #[must_use]
    pub const fn avail_len(size: u16) -> u64 {
        6 + 2 * size as u64
    }

    /// Bytes of a used ring: flags, index, elements, avail_event.
    #[must_use]
    pub const fn used_len(size: u16) -> u64 {
        6 + 8 * size as u64
    }

    /// Checks a layout that came from elsewhere against the memory that it must lie in.
    ///
    /// # Errors
    /// [`Error::Layout`] saying which rule is broken.
    pub fn validate(&self, memory_len: u64) -> Result<(), Error> {
        if !self.size.is_power_of_two() || self.size > MAX_RING_SIZE {
            return Err(Error::Layout("ring size is not a power of two up to 32768"));
        }
        let parts = [
            (self.desc, 16, Self::desc_len(self.size)),
            (self.avail, 2, Self::avail_len(self.size)),
            (self.used, 4, Self::used_len(self.size)),
        ];
        for (offset, align, len) in parts {
            if offset % align != 0 {
                return Err(Error::Layout("a part of the ring is not aligned"));
            }
            if offset.checked_add(len).is_none_or(|end| end > memory_len) {
                return Err(Error::Layout("a part of the ring is outside the memory"));
            }
        }
        Ok(())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_layout_is_valid_exactly_when_it_fits() {
        let ring = VringLayout::at(4096, 256).unwrap();
        ring.validate(ring.end()).unwrap();
        assert!(ring.validate(ring.end() - 1).is_err());
        assert!(VringLayout::at(4096, 100).is_err());
        assert!(VringLayout::at(64, 128).is_err());
    }

    #[test]
    fn offsets_near_the_end_of_the_address_space_are_refused() {
        let ring = VringLayout {
            size: 8,
            desc: u64::MAX - 15,
            avail: 0,
            used: 0,
        };
        assert!(ring.validate(u64::MAX).is_err());
    }
}
