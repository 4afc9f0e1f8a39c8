//! Mapped memory: a stretch of a shared file, the same stretch twice in a row, or heap for tests.
//!
//! A mapping hands out raw pointers and copies; a reference to its bytes exists only where the
//! caller vouches that nobody writes them meanwhile.
#![allow(unsafe_code)] // Maps memory and copies through raw pointers.

use std::os::fd::AsFd;
use std::ptr::{self, NonNull};

use rustix::mm::{MapFlags, ProtFlags};

use crate::{ControlPage, Error};

/// A readable and writable stretch of memory that others may write too.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
    backing: Backing,
}

#[derive(Debug)]
enum Backing {
    Mapped,
    Heap(#[allow(dead_code)] Vec<u128>),
}

// SAFETY: the mapping is only memory; all access is atomic, by copy, or vouched for by the caller.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

/// Memory up to this size is touched when it is mapped, so that nobody waits for a page later. More
/// would keep whoever begins a session waiting for hundreds of ms, and is touched as it is used.
const POPULATE_LIMIT: usize = 64 << 20;

fn shared(len: usize) -> MapFlags {
    if len <= POPULATE_LIMIT {
        MapFlags::SHARED | MapFlags::POPULATE
    } else {
        MapFlags::SHARED
    }
}

impl Mapping {
    /// Maps `len` bytes of `file` from `offset`, shared.
    ///
    /// # Errors
    /// [`Error::Layout`] for an empty or unaligned stretch, [`Error::Os`] where the kernel refuses.
    pub fn of_file(file: impl AsFd, offset: u64, len: usize) -> Result<Self, Error> {
        if len == 0 || !offset.is_multiple_of(4096) {
            return Err(Error::Layout("a mapping is empty or not on a page"));
        }
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let start = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                shared(len),
                file,
                offset,
            )
        }
        .map_err(|error| os("map shared memory", error))?;
        Ok(Self {
            start: NonNull::new(start.cast()).expect("a mapping is never at address zero"),
            len,
            backing: Backing::Mapped,
        })
    }

    /// Zeroed memory of this process alone, for tests without a kernel.
    #[must_use]
    pub fn on_heap(len: usize) -> Self {
        let mut heap = vec![0u128; len.div_ceil(16)];
        Self {
            start: NonNull::new(heap.as_mut_ptr().cast()).expect("a vector is never at zero"),
            len,
            backing: Backing::Heap(heap),
        }
    }

    /// Its first byte.
    #[must_use]
    #[inline]
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Its length in bytes.
    #[must_use]
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it is empty; it never is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Keeps a child made by fork() from inheriting it.
    ///
    /// # Errors
    /// [`Error::Os`] where the kernel refuses.
    pub fn dont_fork(&self) -> Result<(), Error> {
        if matches!(self.backing, Backing::Heap(_)) {
            return Ok(());
        }
        // SAFETY: changes what a child inherits, nothing in this process.
        unsafe {
            rustix::mm::madvise(
                self.as_ptr().cast(),
                self.len,
                rustix::mm::Advice::LinuxDontFork,
            )
        }
        .map_err(|error| os("keep shared memory from children", error))
    }

    /// A pointer to `len` bytes at `offset`; `None` where they are not all inside.
    #[must_use]
    #[inline]
    pub fn bytes_at(&self, offset: u64, len: usize) -> Option<NonNull<u8>> {
        let end = offset.checked_add(len as u64)?;
        if end > self.len as u64 {
            return None;
        }
        // SAFETY: offset is at most the length, so it stays inside the mapping or one past it.
        Some(unsafe { self.start.add(offset as usize) })
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Panics
    /// Where they do not fit: our own mistake.
    #[inline]
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let to = self
            .bytes_at(offset, bytes.len())
            .expect("a write stays inside the mapping");
        // SAFETY: `to` has room for the bytes; a slice of ours cannot overlap memory to which no
        // reference is ever given out.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to.as_ptr(), bytes.len()) }
    }

    /// Copies from `offset` into `bytes`.
    ///
    /// # Panics
    /// Where they are not inside: our own mistake.
    #[inline]
    pub fn read(&self, offset: u64, bytes: &mut [u8]) {
        let from = self
            .bytes_at(offset, bytes.len())
            .expect("a read stays inside the mapping");
        // SAFETY: `from` has that many bytes; see `write` for the overlap.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), bytes.as_mut_ptr(), bytes.len()) }
    }

    /// The control page at `offset`.
    ///
    /// # Errors
    /// [`Error::Layout`] where it does not fit or is not aligned.
    pub fn control_at(&self, offset: u64) -> Result<&ControlPage, Error> {
        let at = self
            .bytes_at(offset, size_of::<ControlPage>())
            .ok_or(Error::Layout("the control page is outside the memory"))?;
        if !(at.as_ptr() as usize).is_multiple_of(align_of::<ControlPage>()) {
            return Err(Error::Layout("the control page is not aligned"));
        }
        // SAFETY: inside the mapping and aligned; the page is made of atomics only, which any bit
        // pattern and any concurrent access is valid for.
        Ok(unsafe { at.cast().as_ref() })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if matches!(self.backing, Backing::Mapped) {
            // SAFETY: the mapping is ours and no reference outlives self. It cannot fail.
            let _ = unsafe { rustix::mm::munmap(self.as_ptr().cast(), self.len) };
        }
    }
}

/// A stretch of a file mapped twice in a row: `len` bytes from any offset below `len` are contiguous.
#[derive(Debug)]
pub struct DoubleMapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: only memory; access is by pointer, and vouched for by the caller.
unsafe impl Send for DoubleMapping {}
// SAFETY: as above.
unsafe impl Sync for DoubleMapping {}

impl DoubleMapping {
    /// Maps `len` bytes of `file` from `offset` at two adjacent places.
    ///
    /// # Errors
    /// [`Error::Layout`] unless both are multiples of the page size, [`Error::Os`] otherwise.
    pub fn of_file(file: impl AsFd, offset: u64, len: usize) -> Result<Self, Error> {
        if len == 0 || !len.is_multiple_of(4096) || !offset.is_multiple_of(4096) {
            return Err(Error::Layout("a byte ring is not made of whole pages"));
        }
        let whole = len
            .checked_mul(2)
            .ok_or(Error::Layout("a byte ring is too large"))?;
        // SAFETY: reserves addresses of the kernel's choice.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                whole,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(|error| os("reserve addresses", error))?;
        let this = Self {
            start: NonNull::new(start.cast()).expect("a mapping is never at address zero"),
            len,
        };
        for half in [0, len] {
            // SAFETY: replaces a part of the addresses reserved above, which nothing uses yet.
            unsafe {
                rustix::mm::mmap(
                    this.as_ptr().add(half).cast(),
                    len,
                    ProtFlags::READ | ProtFlags::WRITE,
                    shared(len) | MapFlags::FIXED,
                    file.as_fd(),
                    offset,
                )
            }
            .map_err(|error| os("map a byte ring", error))?;
        }
        Ok(this)
    }

    /// The first byte of the first half.
    #[must_use]
    #[inline]
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Bytes of the ring (half of what is mapped).
    #[must_use]
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it is empty; it never is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where the byte with the ever-growing position `cursor` is.
    #[must_use]
    #[inline]
    pub fn at(&self, cursor: u64) -> *mut u8 {
        let offset = (cursor % self.len as u64) as usize;
        // SAFETY: the offset is inside the first half.
        unsafe { self.as_ptr().add(offset) }
    }

    /// The `len` bytes from position `cursor` on.
    ///
    /// # Safety
    /// Nobody may write them while the slice lives. The device writes only what is not yet committed
    /// or already released, so a committed and unreleased stretch qualifies as long as the other side
    /// keeps to the protocol; one that does not can only harm itself (its checksums, its frames).
    ///
    /// # Panics
    /// Where `len` is more than the ring: our own mistake.
    #[must_use]
    #[inline]
    pub unsafe fn slice(&self, cursor: u64, len: usize) -> &[u8] {
        assert!(len <= self.len, "a stretch of the ring is at most the ring");
        // SAFETY: both halves are mapped, so len bytes from an offset inside the first half are;
        // the caller vouches for the rest.
        unsafe { std::slice::from_raw_parts(self.at(cursor), len) }
    }

    /// Keeps a child made by fork() from inheriting it.
    ///
    /// # Errors
    /// [`Error::Os`] where the kernel refuses.
    pub fn dont_fork(&self) -> Result<(), Error> {
        // SAFETY: changes what a child inherits, nothing in this process.
        unsafe {
            rustix::mm::madvise(
                self.as_ptr().cast(),
                2 * self.len,
                rustix::mm::Advice::LinuxDontFork,
            )
        }
        .map_err(|error| os("keep the byte ring from children", error))
    }
}

impl Drop for DoubleMapping {
    fn drop(&mut self) {
        // SAFETY: the addresses are ours and no reference outlives self. It cannot fail.
        let _ = unsafe { rustix::mm::munmap(self.as_ptr().cast(), 2 * self.len) };
    }
}

pub(crate) fn os(what: &'static str, error: rustix::io::Errno) -> Error {
    Error::Os {
        what,
        source: error.into(),
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_stretch_outside_is_no_pointer() {
        let heap = Mapping::on_heap(64);
        assert!(heap.bytes_at(0, 64).is_some());
        assert!(heap.bytes_at(1, 64).is_none());
        assert!(heap.bytes_at(u64::MAX, 2).is_none());
    }

    #[test]
    #[cfg_attr(miri, ignore = "maps a memfd")]
    fn bytes_across_the_end_of_a_double_mapping_are_contiguous() {
        let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 8192).unwrap();
        let ring = DoubleMapping::of_file(&file, 4096, 4096).unwrap();
        for (i, byte) in (0u8..8).enumerate() {
            // SAFETY: position 4092 + 8 is inside the two halves.
            unsafe { ring.at(4092).add(i).write(byte) };
        }
        // SAFETY: nobody writes any more.
        let (whole, wrapped) = unsafe { (ring.slice(4092, 8), ring.slice(4096, 4)) };
        assert_eq!(whole, [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(wrapped, [4, 5, 6, 7]);
        let plain = Mapping::of_file(&file, 4096, 4096).unwrap();
        let mut start = [0; 4];
        plain.read(0, &mut start);
        assert_eq!(start, [4, 5, 6, 7]);
    }
}
