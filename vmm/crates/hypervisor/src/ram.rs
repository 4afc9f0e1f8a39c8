//! The guest's RAM.
//!
//! Private anonymous memory, not reserved, with transparent huge pages asked for and aligned so
//! that they can be mapped into the guest as such. After fork() the child has a copy-on-write
//! image of it. Up to [`MMIO_HOLE_START`] it begins at address 0; the rest follows from
//! [`HIGH_RAM_START`] on.
//!
//! Writes through [`GuestRam::memory`] (those of devices) are noted in a bitmap, because KVM's
//! dirty log does not see them. Who writes while the vCPU runs is not decided here.
#![allow(unsafe_code)] // madvise, and writing as the guest does, past the bitmap.

use std::io::{self, Read, Seek, SeekFrom};
use std::ptr;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use crate::digest;
use crate::dirty::{DirtyBitmap, Gfn, PAGE_SIZE};

/// First address behind low RAM; device memory lies between here and [`HIGH_RAM_START`].
pub const MMIO_HOLE_START: u64 = 0xc000_0000;
/// Address at which RAM goes on when it does not fit below [`MMIO_HOLE_START`].
pub const HIGH_RAM_START: u64 = 1 << 32;
/// Smallest RAM: a megabyte, as the boot protocol needs it.
pub const MIN_RAM_BYTES: u64 = 1 << 20;
/// Largest RAM.
pub const MAX_RAM_BYTES: u64 = 1 << 40;

/// Bytes of a huge page.
const HUGE_PAGE_SIZE: usize = 2 << 20;
/// Attempts to get an aligned mapping before an unaligned one is taken.
const ALIGN_ATTEMPTS: usize = 8;

/// The memory as rust-vmm's crates take it.
pub type RamMemory = GuestMemoryMmap<AtomicBitmap>;
/// The bytes of one guest page.
pub type Page = [u8; PAGE_SIZE];

/// Guest memory cannot be made, read or written.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// Not a size that a machine can have.
    #[error(
        "{bytes} bytes of guest RAM: must be a multiple of 4096 between {MIN_RAM_BYTES} and \
         {MAX_RAM_BYTES}"
    )]
    Size {
        /// The size asked for.
        bytes: u64,
    },
    /// The kernel gives no memory.
    #[error("cannot map {bytes} bytes of guest RAM")]
    Map {
        /// Bytes of the region.
        bytes: usize,
        /// What mmap says.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// An address outside RAM.
    #[error("no RAM at guest address {addr:#x}")]
    NoRam {
        /// Guest physical address.
        addr: u64,
    },
    /// The kernel refuses something about the mapping.
    #[error("{call} on guest RAM")]
    Os {
        /// Name of the call.
        call: &'static str,
        /// What it says.
        #[source]
        source: io::Error,
    },
}

/// The guest's RAM. Clones are the same memory.
#[derive(Clone, Debug)]
pub struct GuestRam {
    memory: RamMemory,
    size_bytes: u64,
}

/// One contiguous region of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// Guest physical address.
    pub start: u64,
    /// Bytes.
    pub len: usize,
    /// Where it is mapped in this process.
    pub host: *mut u8,
}

impl GuestRam {
    /// Maps `size_bytes` of RAM, all zeros.
    ///
    /// # Errors
    /// [`RamError::Size`], [`RamError::Map`].
    pub fn new(size_bytes: u64) -> Result<Self, RamError> {
        if !(MIN_RAM_BYTES..=MAX_RAM_BYTES).contains(&size_bytes)
            || !size_bytes.is_multiple_of(PAGE_SIZE as u64)
        {
            return Err(RamError::Size { bytes: size_bytes });
        }
        let low = size_bytes.min(MMIO_HOLE_START);
        let parts = [(0, low), (HIGH_RAM_START, size_bytes - low)];
        let regions = parts
            .into_iter()
            .filter(|(_, len)| *len != 0)
            .map(|(start, len)| {
                let len = usize::try_from(len).map_err(|_| RamError::Size { bytes: len })?;
                let region = map_aligned(len, HUGE_PAGE_SIZE)?;
                advise_huge(&region);
                Ok(GuestRegionMmap::new(region, GuestAddress(start))
                    .expect("both parts end far below 2^64"))
            })
            .collect::<Result<Vec<_>, RamError>>()?;
        let memory = RamMemory::from_regions(regions).expect("two sorted, separate regions");
        Ok(Self { memory, size_bytes })
    }

    /// The memory as rust-vmm's crates take it.
    #[must_use]
    pub fn memory(&self) -> &RamMemory {
        &self.memory
    }

    /// Bytes of RAM.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Pages of RAM.
    #[must_use]
    pub fn page_count(&self) -> u64 {
        self.size_bytes / PAGE_SIZE as u64
    }

    /// The regions, ascending by address.
    pub fn regions(&self) -> impl Iterator<Item = RamRegion> + '_ {
        self.memory.iter().map(|region| RamRegion {
            start: region.start_addr().0,
            len: region.size(),
            host: region.as_ptr(),
        })
    }

    /// All pages, ascending.
    pub fn pages(&self) -> impl Iterator<Item = Gfn> + '_ {
        self.regions().flat_map(|region| {
            let first = Gfn::of(region.start).0;
            (first..first + (region.len / PAGE_SIZE) as u64).map(Gfn)
        })
    }

    /// Copies a page out.
    ///
    /// # Errors
    /// [`RamError::NoRam`].
    pub fn read_page(&self, gfn: Gfn, page: &mut Page) -> Result<(), RamError> {
        self.read(page_addr(gfn)?, page)
    }

    /// Replaces a page, and notes it as written by the VMM.
    ///
    /// # Errors
    /// [`RamError::NoRam`].
    pub fn write_page(&self, gfn: Gfn, page: &Page) -> Result<(), RamError> {
        self.write(page_addr(gfn)?, page)
    }

    /// Copies bytes out.
    ///
    /// # Errors
    /// [`RamError::NoRam`] if any of them is outside RAM.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> Result<(), RamError> {
        self.memory
            .read_slice(data, GuestAddress(addr))
            .map_err(|_| RamError::NoRam { addr })
    }

    /// Writes bytes, and notes their pages as written by the VMM.
    ///
    /// # Errors
    /// [`RamError::NoRam`] if any of them is outside RAM; some may have been written.
    pub fn write(&self, addr: u64, data: &[u8]) -> Result<(), RamError> {
        self.memory
            .write_slice(data, GuestAddress(addr))
            .map_err(|_| RamError::NoRam { addr })
    }

    /// Writes bytes as the guest would: they are not noted as written by the VMM.
    pub(crate) fn write_as_guest(&self, addr: u64, data: &[u8]) -> Result<(), RamError> {
        let slice = self
            .memory
            .get_slices(GuestAddress(addr), data.len())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| RamError::NoRam { addr })?;
        let mut rest = data;
        for part in slice {
            let (now, later) = rest.split_at(part.len());
            // SAFETY: the guard keeps the part's mapping valid for its length, which is that of
            // `now`; guest memory is plain bytes, and what the VMM borrows never lies in it.
            unsafe {
                ptr::copy_nonoverlapping(now.as_ptr(), part.ptr_guard_mut().as_ptr(), now.len())
            };
            rest = later;
        }
        Ok(())
    }

    /// Whether a page is all zeros.
    ///
    /// # Errors
    /// [`RamError::NoRam`].
    pub fn is_zero_page(&self, gfn: Gfn) -> Result<bool, RamError> {
        let mut page = [0; PAGE_SIZE];
        self.read_page(gfn, &mut page)?;
        Ok(is_zero(&page))
    }

    /// Fetches and clears the set of pages that were written through this process's own accessors
    /// (and not by the guest).
    #[must_use]
    pub fn take_vmm_dirty(&self) -> DirtyBitmap {
        let mut dirty = DirtyBitmap::default();
        for region in self.memory.iter() {
            let words = MmapRegion::bitmap(region).get_and_reset();
            dirty.push_span(Gfn::of(region.start_addr().0), words);
        }
        dirty
    }

    /// An empty set of pages over this memory.
    #[must_use]
    pub fn no_pages(&self) -> DirtyBitmap {
        let mut pages = DirtyBitmap::default();
        for region in self.regions() {
            let words = (region.len / PAGE_SIZE).div_ceil(64);
            pages.push_span(Gfn::of(region.start), vec![0; words]);
        }
        pages
    }

    /// The pages that have ever been touched, by the guest or the VMM: every other page is all
    /// zeros and need not be read (which would make the kernel map it).
    ///
    /// # Errors
    /// [`RamError::Os`] if the kernel does not tell.
    pub fn touched_pages(&self) -> Result<DirtyBitmap, RamError> {
        let os = |source| RamError::Os {
            call: "reading /proc/self/pagemap",
            source,
        };
        let mut pagemap = std::fs::File::open("/proc/self/pagemap").map_err(os)?;
        let mut touched = DirtyBitmap::default();
        for region in self.regions() {
            let first = region.host as u64 / PAGE_SIZE as u64;
            pagemap.seek(SeekFrom::Start(first * 8)).map_err(os)?;
            let words = read_touched(&mut pagemap, region.len / PAGE_SIZE).map_err(os)?;
            touched.push_span(Gfn::of(region.start), words);
        }
        Ok(touched)
    }

    /// Digest of the whole RAM. Equal RAM has equal digests, whichever pages were touched.
    ///
    /// # Errors
    /// [`RamError::Os`] if the kernel does not tell which pages to read.
    pub fn digest(&self) -> Result<u64, RamError> {
        let mut page = [0; PAGE_SIZE];
        let mut running = self.size_bytes;
        for gfn in self.touched_pages()?.iter() {
            self.read_page(gfn, &mut page)?;
            if !is_zero(&page) {
                running = digest::fold(digest::fold(running, gfn.0), digest::bytes(&page));
            }
        }
        Ok(running)
    }

    /// Makes KVM drop every mapping of guest memory, as memory pressure on the host would; the
    /// content stays. A guest must not notice: to show that it does not.
    ///
    /// # Errors
    /// [`RamError::Os`] if the kernel refuses.
    pub fn drop_mappings(&self) -> Result<(), RamError> {
        for region in self.regions() {
            for access in [libc::PROT_READ, libc::PROT_READ | libc::PROT_WRITE] {
                // SAFETY: the range is exactly one private anonymous mapping that `self` keeps
                // alive, and it is writable again before anybody writes to it: the caller holds the
                // vCPU's thread.
                let result = unsafe { libc::mprotect(region.host.cast(), region.len, access) };
                if result != 0 {
                    let source = io::Error::last_os_error();
                    return Err(RamError::Os {
                        call: "mprotect",
                        source,
                    });
                }
            }
        }
        Ok(())
    }

    /// Makes all RAM zero again and gives the memory back to the kernel. To be called only before
    /// a vCPU runs.
    ///
    /// # Errors
    /// [`RamError::Os`] if the kernel refuses.
    pub fn clear(&self) -> Result<(), RamError> {
        for region in self.regions() {
            // SAFETY: the range is exactly one private anonymous mapping that `self` keeps alive;
            // afterwards it reads as zeros, which is valid for the plain bytes that it holds.
            let result =
                unsafe { libc::madvise(region.host.cast(), region.len, libc::MADV_DONTNEED) };
            if result != 0 {
                let source = io::Error::last_os_error();
                return Err(RamError::Os {
                    call: "madvise(MADV_DONTNEED)",
                    source,
                });
            }
        }
        Ok(())
    }
}

/// Whether all bytes are zero.
fn is_zero(page: &Page) -> bool {
    page.chunks_exact(64)
        .all(|chunk| chunk.iter().fold(0, |acc, byte| acc | byte) == 0)
}

/// Address of a page's first byte.
pub(crate) fn page_addr(gfn: Gfn) -> Result<u64, RamError> {
    gfn.addr().ok_or(RamError::NoRam { addr: u64::MAX })
}

/// Reads `pages` entries of a pagemap and says in a bitmap which are present or swapped.
fn read_touched(pagemap: &mut impl Read, pages: usize) -> io::Result<Vec<u64>> {
    /// Bits 63 (present) and 62 (swapped): Documentation/admin-guide/mm/pagemap.rst.
    const TOUCHED: u64 = 0b11 << 62;
    const CHUNK_PAGES: usize = 8192;
    let mut words = vec![0; pages.div_ceil(64)];
    let mut buffer = vec![0; CHUNK_PAGES.min(pages) * 8];
    let mut page = 0;
    while page < pages {
        let chunk = (pages - page).min(CHUNK_PAGES);
        let entries = &mut buffer[..chunk * 8];
        pagemap.read_exact(entries)?;
        for entry in entries.chunks_exact(8) {
            let entry = u64::from_le_bytes(entry.try_into().expect("chunks of eight bytes"));
            words[page / 64] |= u64::from(entry & TOUCHED != 0) << (page % 64);
            page += 1;
        }
    }
    Ok(words)
}

/// Maps anonymous memory at a multiple of `align`, or, if the kernel's choice of addresses cannot
/// be steered there, anywhere: alignment decides about speed only.
///
/// Kernels from 6.7 on align large mappings to huge pages by themselves. Older ones put each
/// mapping right below the one before, so a filler of the right length moves the next one.
fn map_aligned(len: usize, align: usize) -> Result<MmapRegion<AtomicBitmap>, RamError> {
    let map = |bytes| MmapRegion::new(bytes).map_err(|source| RamError::Map { bytes, source });
    let misfit = |region: &MmapRegion<AtomicBitmap>| region.as_ptr() as usize % align;
    let mut region = map(len)?;
    let mut fillers = Vec::new();
    for _ in 0..ALIGN_ATTEMPTS {
        if misfit(&region) == 0 || len < align {
            break;
        }
        let filler_bytes = (region.as_ptr() as usize).wrapping_sub(len) % align;
        if filler_bytes != 0 {
            fillers.push(
                MmapRegion::<()>::new(filler_bytes).map_err(|source| RamError::Map {
                    bytes: filler_bytes,
                    source,
                })?,
            );
        }
        let next = map(len)?;
        region = next;
    }
    Ok(region)
}

/// Asks for transparent huge pages; without them the guest is only slower.
fn advise_huge(region: &MmapRegion<AtomicBitmap>) {
    // SAFETY: the range is exactly the mapping, and the advice does not change its content.
    unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_HUGEPAGE) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_beyond_the_hole_goes_on_at_four_gigabytes() {
        let ram = GuestRam::new(MMIO_HOLE_START + (64 << 20)).unwrap();
        let regions: Vec<_> = ram
            .regions()
            .map(|region| (region.start, region.len))
            .collect();
        assert_eq!(regions, [(0, 0xc000_0000), (HIGH_RAM_START, 64 << 20)]);
        assert_eq!(ram.pages().count() as u64, ram.page_count());
        assert_eq!(
            ram.pages().last(),
            Some(Gfn::of(HIGH_RAM_START + (64 << 20) - 1))
        );
        assert!(ram.write(MMIO_HOLE_START, &[1]).is_err());
        assert!(ram.write(MMIO_HOLE_START - 1, &[1, 2]).is_err());
        assert!(ram.write(HIGH_RAM_START, &[1]).is_ok());
    }

    #[test]
    fn sizes_that_no_machine_has_are_refused() {
        for bytes in [
            0,
            4096,
            (1 << 20) - 4096,
            (1 << 20) + 1,
            MAX_RAM_BYTES + 4096,
        ] {
            assert!(
                matches!(GuestRam::new(bytes), Err(RamError::Size { .. })),
                "{bytes}"
            );
        }
    }

    #[test]
    fn regions_are_aligned_to_huge_pages() {
        let ram = GuestRam::new(64 << 20).unwrap();
        for region in ram.regions() {
            assert_eq!(region.host as usize % HUGE_PAGE_SIZE, 0);
        }
    }

    #[test]
    fn mapping_is_steered_to_an_alignment_that_the_kernel_does_not_give() {
        const ALIGN: usize = 1 << 28;
        let region = map_aligned(ALIGN, ALIGN).unwrap();
        assert_eq!(region.as_ptr() as usize % ALIGN, 0);
    }

    #[test]
    fn own_writes_are_noted_once() {
        let ram = GuestRam::new(1 << 20).unwrap();
        let _ = ram.take_vmm_dirty();
        ram.write(0x1fff, &[1, 2]).unwrap();
        ram.write_page(Gfn(9), &[7; PAGE_SIZE]).unwrap();
        let dirty = ram.take_vmm_dirty();
        assert_eq!(dirty.iter().collect::<Vec<_>>(), [Gfn(1), Gfn(2), Gfn(9)]);
        assert!(ram.take_vmm_dirty().is_empty());
    }

    #[test]
    fn digest_depends_on_content_and_place_but_not_on_touching() {
        let ram = GuestRam::new(1 << 20).unwrap();
        let zero = ram.digest().unwrap();
        ram.write(0x5000, &[0; 64]).unwrap();
        assert!(ram.touched_pages().unwrap().contains(Gfn(5)));
        assert_eq!(ram.digest().unwrap(), zero);
        ram.write(0x5000, &[1]).unwrap();
        let one = ram.digest().unwrap();
        ram.write(0x5000, &[0]).unwrap();
        ram.write(0x6000, &[1]).unwrap();
        assert_ne!(ram.digest().unwrap(), one);
        ram.clear().unwrap();
        assert_eq!(ram.digest().unwrap(), zero);
    }

    #[test]
    fn forked_child_reads_the_image_of_the_moment_of_the_fork() {
        let ram = GuestRam::new(1 << 20).unwrap();
        ram.write(0x3000, b"before").unwrap();
        let mut fds = [0; 2];
        // SAFETY: the array has room for the two descriptors.
        assert_eq!(unsafe { libc::pipe(fds.as_mut_ptr()) }, 0);
        // SAFETY: the child makes only async-signal-safe calls and plain memory accesses.
        let child = unsafe { libc::fork() };
        assert!(child >= 0);
        if child == 0 {
            let mut byte = [0u8; 1];
            // SAFETY: one byte of room; the parent writes when it has changed its memory.
            unsafe { libc::read(fds[0], byte.as_mut_ptr().cast(), 1) };
            let mut seen = [0; 6];
            let same = ram.read(0x3000, &mut seen).is_ok() && &seen == b"before";
            // SAFETY: ends the child without running the parent's destructors.
            unsafe { libc::_exit(i32::from(!same)) };
        }
        ram.write(0x3000, b"after!").unwrap();
        let mut status = 0;
        // SAFETY: plain system calls on descriptors and a child of this test.
        unsafe {
            libc::write(fds[1], b"x".as_ptr().cast(), 1);
            libc::waitpid(child, &raw mut status, 0);
            libc::close(fds[0]);
            libc::close(fds[1]);
        }
        assert_eq!(status, 0);
    }
}
