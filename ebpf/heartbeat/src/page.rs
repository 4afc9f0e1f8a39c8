//! Pages shared with the kernel and between processes, mapped from a file descriptor.
//!
//! A page holds one of the layouts of `ebpf_events::maps`: atomic words, for which every bit pattern
//! is valid, so that whatever another process writes there can mislead but never break a reader.
#![allow(unsafe_code)] // maps memory and gives out references into it

use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ebpf_events::ReplyFlags;
use ebpf_events::maps::{DaemonPage, SeenPage, SeenReply, VmmPage};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

mod sealed {
    pub trait Layout {}
}

/// The layouts that a [`Page`] can hold.
pub trait Layout: sealed::Layout + Default + Sync {}

impl sealed::Layout for VmmPage {}
impl sealed::Layout for DaemonPage {}
impl sealed::Layout for SeenPage {}
impl Layout for VmmPage {}
impl Layout for DaemonPage {}
impl Layout for SeenPage {}

/// A mapped page; clones share the mapping, which ends with the last of them.
#[derive(Debug)]
pub struct Page<T: Layout> {
    mapping: Arc<Mapping<T>>,
}

impl<T: Layout> Clone for Page<T> {
    fn clone(&self) -> Self {
        Self {
            mapping: Arc::clone(&self.mapping),
        }
    }
}

#[derive(Debug)]
struct Mapping<T> {
    at: NonNull<T>,
}

// SAFETY: the mapping is owned and unmapped once; T is only reached by shared reference and is Sync.
unsafe impl<T: Layout> Send for Mapping<T> {}
// SAFETY: as above.
unsafe impl<T: Layout> Sync for Mapping<T> {}

impl<T: Layout> Page<T> {
    /// Maps the page behind a descriptor: an mmapable eBPF array of one `T`, or a memfd of that size.
    ///
    /// # Errors
    /// Whatever mmap says: no such descriptor, not mappable, too small.
    pub fn map(fd: impl AsFd) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing.
        let at = unsafe {
            mmap(
                std::ptr::null_mut(),
                size_of::<T>(),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd,
                0,
            )?
        };
        Ok(Self::own(at))
    }

    /// A page of this process alone.
    ///
    /// # Errors
    /// Out of memory.
    pub fn private() -> io::Result<Self> {
        // SAFETY: as in `map`.
        let at = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                size_of::<T>(),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
            )?
        };
        Ok(Self::own(at))
    }

    /// A page that can be handed to other processes by its descriptor.
    ///
    /// # Errors
    /// Out of memory or descriptors.
    pub fn shared(name: &str) -> io::Result<(OwnedFd, Self)> {
        let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&fd, size_of::<T>() as u64)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let page = Self::map(&fd)?;
        Ok((fd, page))
    }

    fn own(at: *mut core::ffi::c_void) -> Self {
        let at = NonNull::new(at.cast()).expect("mmap never returns null without MAP_FIXED");
        Self {
            mapping: Arc::new(Mapping { at }),
        }
    }
}

impl<T: Layout> Deref for Page<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: mapped for as long as `mapping` lives, size_of::<T>() bytes, page-aligned; T is made
        // of atomic words and padding, valid whatever they hold and whoever writes them.
        unsafe { self.mapping.at.as_ref() }
    }
}

impl<T> Drop for Mapping<T> {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made in `map` or `private`; no reference into it is left.
        let result = unsafe { munmap(self.at.as_ptr().cast(), size_of::<T>()) };
        debug_assert!(result.is_ok(), "munmap of our own mapping");
    }
}

/// Reads what the kernel has seen of the peer.
#[derive(Debug, Clone)]
pub struct SeenReader(Page<SeenPage>);

impl SeenReader {
    /// Reads from this page.
    pub const fn new(page: Page<SeenPage>) -> Self {
        Self(page)
    }

    /// The newest reply; `None` before the first, or if it changed faster than it could be read.
    pub fn reply(&self) -> Option<SeenReply> {
        self.0.reply().filter(|reply| reply.count > 0)
    }

    /// When the peer's last good request arrived, ns; `None` before the first.
    pub fn heard_ns(&self) -> Option<u64> {
        Some(self.0.heard_ns.load(Ordering::Acquire)).filter(|ns| *ns > 0)
    }

    /// What this host's replies say about its own processes.
    pub fn local(&self) -> ReplyFlags {
        ReplyFlags(self.0.local.load(Ordering::Acquire) as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mappings_of_one_descriptor_are_one_page() {
        let (fd, a) = Page::<DaemonPage>::shared("test").unwrap();
        let b = Page::<DaemonPage>::map(&fd).unwrap();
        a.progress.store(42, Ordering::Release);
        assert_eq!(b.progress.load(Ordering::Acquire), 42);
        let c = b.clone();
        drop((a, b, fd));
        assert_eq!(c.progress.load(Ordering::Acquire), 42);
    }

    #[test]
    fn the_holder_of_a_shared_page_cannot_shrink_it_under_the_others() {
        let (fd, _page) = Page::<VmmPage>::shared("test").unwrap();
        assert_eq!(ftruncate(&fd, 0), Err(rustix::io::Errno::PERM));
    }

    #[test]
    fn nothing_seen_is_none() {
        let seen = SeenReader::new(Page::private().unwrap());
        assert_eq!(seen.reply(), None);
        assert_eq!(seen.heard_ns(), None);
    }
}
