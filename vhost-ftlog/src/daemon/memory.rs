//! The arena as the daemon sees it: one region of shared memory from a VMM that may be hostile.
//!
//! The file's seals and size are checked before it is mapped. Addresses in it are checked at each use.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use ring::{Arena, CONTROL_MAGIC, CONTROL_VERSION, ControlPage, DoubleMapping, Error, Mapping};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Where a region is, in the three address spaces that vhost-user knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Its guest physical address: descriptors use these.
    pub guest: u64,
    /// Its length in bytes.
    pub len: u64,
    /// Its address in the VMM: the rings' addresses use these.
    pub user: u64,
    /// Its offset in the file.
    pub offset: u64,
}

/// A mapped region.
#[derive(Debug)]
pub struct DeviceMemory {
    region: Region,
    arena: Arena,
    mapping: Arc<Mapping>,
}

/// The largest region that is accepted, in bytes.
const MAX_REGION: u64 = 4 << 30;

impl DeviceMemory {
    /// Maps `region` of `file`. Its first page must be a control page of this version.
    ///
    /// # Errors
    /// What is wrong with the region, the file or the control page.
    pub fn new(region: Region, file: File) -> Result<Self, Error> {
        if region.len < 4096 || region.len > MAX_REGION {
            return Err(Error::Layout("length of the memory region"));
        }
        let fits = |start: u64| start.checked_add(region.len).is_some();
        if !fits(region.guest) || !fits(region.user) || !fits(region.offset) {
            return Err(Error::Layout("memory region beyond the address space"));
        }
        let arena = Arena::accept(OwnedFd::from(file), region.offset + region.len)?;
        let mapping = Mapping::of_file(&arena, region.offset, region.len as usize)?;
        let this = Self {
            region,
            arena,
            mapping: Arc::new(mapping),
        };
        let identity = &this.control().identity;
        if identity.magic.load(Ordering::Acquire) != CONTROL_MAGIC
            || identity.version.load(Ordering::Acquire) != CONTROL_VERSION
        {
            return Err(Error::Layout("no control page of this version"));
        }
        Ok(this)
    }

    /// The mapping.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// The control page.
    pub fn control(&self) -> &ControlPage {
        self.mapping
            .control_at(0)
            .expect("the region has at least a page, and a mapping starts on one")
    }

    /// The offset in the region of an address in the VMM.
    pub fn of_user(&self, address: u64) -> Option<u64> {
        let offset = address.checked_sub(self.region.user)?;
        (offset < self.region.len).then_some(offset)
    }

    /// The offset in the region of `len` bytes at a guest physical address.
    #[inline]
    pub fn of_guest(&self, address: u64, len: u32) -> Option<u64> {
        let offset = address.checked_sub(self.region.guest)?;
        let end = offset.checked_add(len.into())?;
        (end <= self.region.len).then_some(offset)
    }

    /// Maps `len` bytes at a guest physical address twice in a row.
    ///
    /// # Errors
    /// [`Error::Layout`] where they are not whole pages inside the region.
    pub fn map_twice(&self, address: u64, len: u32) -> Result<DoubleMapping, Error> {
        let offset = self
            .of_guest(address, len)
            .ok_or(Error::Layout("delivery ring outside of the memory"))?;
        DoubleMapping::of_file(
            self.arena.as_fd(),
            self.region.offset + offset,
            len as usize,
        )
    }
}
