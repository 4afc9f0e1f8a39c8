//! The memory of one split virtqueue, as both halves see it.
//!
//! [`RingMemory`] is what the halves need; [`MappedVring`] is that over mapped memory. Every access
//! to memory that the other side can write is an atomic one: a hostile other side can make the values
//! wrong, never the access undefined.
#![allow(unsafe_code)] // Atomics at raw addresses of shared memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use crate::Error;
use crate::layout::VringLayout;
use crate::mapping::Mapping;

/// A buffer in the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Desc {
    /// Guest physical address: here an offset in the arena.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// `VIRTQ_DESC_F_*`.
    pub flags: u16,
    /// The next descriptor of a chain; the channel uses no chains.
    pub next: u16,
}

impl Desc {
    /// The buffer goes on in another descriptor.
    pub const NEXT: u16 = 1;
    /// The device writes it, the driver does not.
    pub const WRITE: u16 = 2;
    /// The buffer is a table of descriptors.
    pub const INDIRECT: u16 = 4;

    pub(crate) fn pack(self) -> (u64, u64) {
        let rest = u64::from(self.len) | u64::from(self.flags) << 32 | u64::from(self.next) << 48;
        (self.addr, rest)
    }

    pub(crate) fn unpack(addr: u64, rest: u64) -> Self {
        Self {
            addr,
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        }
    }
}

/// The accesses to a split virtqueue. An index given here is below the ring's size.
///
/// `store_*_idx` publishes all that was written before; `load_*_idx` sees all that was written
/// before the value that it reads was published. The rest is unordered.
#[allow(missing_docs)] // The names are those of the specification.
pub trait RingMemory {
    fn size(&self) -> u16;
    fn read_desc(&self, index: u16) -> Desc;
    fn write_desc(&self, index: u16, desc: Desc);
    fn read_avail_slot(&self, slot: u16) -> u16;
    fn write_avail_slot(&self, slot: u16, index: u16);
    fn load_avail_idx(&self) -> u16;
    fn store_avail_idx(&self, value: u16);
    fn read_used_slot(&self, slot: u16) -> (u32, u32);
    fn write_used_slot(&self, slot: u16, id: u32, len: u32);
    fn load_used_idx(&self) -> u16;
    fn store_used_idx(&self, value: u16);
    fn read_used_event(&self) -> u16;
    fn write_used_event(&self, value: u16);
    fn read_avail_event(&self) -> u16;
    fn write_avail_event(&self, value: u16);
    fn read_avail_flags(&self) -> u16;
    fn read_used_flags(&self) -> u16;
    /// Orders all before it before all after it.
    fn full_fence(&self);
}

/// A split virtqueue in mapped memory.
#[derive(Debug, Clone)]
pub struct MappedVring {
    mapping: Arc<Mapping>,
    layout: VringLayout,
}

impl MappedVring {
    /// The ring of `layout` in `mapping`.
    ///
    /// # Errors
    /// [`Error::Layout`] where it does not fit or is not aligned.
    pub fn new(mapping: Arc<Mapping>, layout: VringLayout) -> Result<Self, Error> {
        layout.validate(mapping.len() as u64)?;
        if !(mapping.as_ptr() as usize).is_multiple_of(16) {
            return Err(Error::Layout("memory is not aligned"));
        }
        Ok(Self { mapping, layout })
    }

    /// Where its parts are.
    #[must_use]
    pub fn layout(&self) -> VringLayout {
        self.layout
    }

    #[inline]
    fn at(&self, offset: u64) -> *mut u8 {
        debug_assert!(offset < self.mapping.len() as u64);
        // SAFETY: every offset used below is inside a part of the ring, and `new` checked that the
        // parts are inside the mapping.
        unsafe { self.mapping.as_ptr().add(offset as usize) }
    }

    #[inline]
    fn word16(&self, offset: u64) -> &AtomicU16 {
        // SAFETY: inside the mapping, which lives as long as self; `new` checked the alignment of
        // the parts; all access by this process is through atomics.
        unsafe { AtomicU16::from_ptr(self.at(offset).cast()) }
    }

    #[inline]
    fn word32(&self, offset: u64) -> &AtomicU32 {
        // SAFETY: as for `word16`.
        unsafe { AtomicU32::from_ptr(self.at(offset).cast()) }
    }

    #[inline]
    fn word64(&self, offset: u64) -> &AtomicU64 {
        // SAFETY: as for `word16`.
        unsafe { AtomicU64::from_ptr(self.at(offset).cast()) }
    }

    #[inline]
    fn index(&self, index: u16) -> u64 {
        assert!(index < self.layout.size, "index below the ring's size");
        u64::from(index)
    }
}

impl RingMemory for MappedVring {
    #[inline]
    fn size(&self) -> u16 {
        self.layout.size
    }

    #[inline]
    fn read_desc(&self, index: u16) -> Desc {
        let at = self.layout.desc + 16 * self.index(index);
        Desc::unpack(
            self.word64(at).load(Ordering::Relaxed),
            self.word64(at + 8).load(Ordering::Relaxed),
        )
    }

    #[inline]
    fn write_desc(&self, index: u16, desc: Desc) {
        let at = self.layout.desc + 16 * self.index(index);
        let (addr, rest) = desc.pack();
        self.word64(at).store(addr, Ordering::Relaxed);
        self.word64(at + 8).store(rest, Ordering::Relaxed);
    }

    #[inline]
    fn read_avail_slot(&self, slot: u16) -> u16 {
        self.word16(self.layout.avail + 4 + 2 * self.index(slot))
            .load(Ordering::Relaxed)
    }

    #[inline]
    fn write_avail_slot(&self, slot: u16, index: u16) {
        self.word16(self.layout.avail + 4 + 2 * self.index(slot))
            .store(index, Ordering::Relaxed);
    }

    #[inline]
    fn load_avail_idx(&self) -> u16 {
        self.word16(self.layout.avail + 2).load(Ordering::Acquire)
    }

    #[inline]
    fn store_avail_idx(&self, value: u16) {
        self.word16(self.layout.avail + 2)
            .store(value, Ordering::Release);
    }

    #[inline]
    fn read_used_slot(&self, slot: u16) -> (u32, u32) {
        let at = self.layout.used + 4 + 8 * self.index(slot);
        (
            self.word32(at).load(Ordering::Relaxed),
            self.word32(at + 4).load(Ordering::Relaxed),
        )
    }

    #[inline]
    fn write_used_slot(&self, slot: u16, id: u32, len: u32) {
        let at = self.layout.used + 4 + 8 * self.index(slot);
        self.word32(at).store(id, Ordering::Relaxed);
        self.word32(at + 4).store(len, Ordering::Relaxed);
    }

    #[inline]
    fn load_used_idx(&self) -> u16 {
        self.word16(self.layout.used + 2).load(Ordering::Acquire)
    }

    #[inline]
    fn store_used_idx(&self, value: u16) {
        self.word16(self.layout.used + 2)
            .store(value, Ordering::Release);
    }

    #[inline]
    fn read_used_event(&self) -> u16 {
        self.word16(self.layout.avail + 4 + 2 * u64::from(self.layout.size))
            .load(Ordering::Relaxed)
    }

    #[inline]
    fn write_used_event(&self, value: u16) {
        self.word16(self.layout.avail + 4 + 2 * u64::from(self.layout.size))
            .store(value, Ordering::Relaxed);
    }

    #[inline]
    fn read_avail_event(&self) -> u16 {
        self.word16(self.layout.used + 4 + 8 * u64::from(self.layout.size))
            .load(Ordering::Relaxed)
    }

    #[inline]
    fn write_avail_event(&self, value: u16) {
        self.word16(self.layout.used + 4 + 8 * u64::from(self.layout.size))
            .store(value, Ordering::Relaxed);
    }

    #[inline]
    fn read_avail_flags(&self) -> u16 {
        self.word16(self.layout.avail).load(Ordering::Relaxed)
    }

    #[inline]
    fn read_used_flags(&self) -> u16 {
        self.word16(self.layout.used).load(Ordering::Relaxed)
    }

    #[inline]
    fn full_fence(&self) {
        fence(Ordering::SeqCst);
    }
}
