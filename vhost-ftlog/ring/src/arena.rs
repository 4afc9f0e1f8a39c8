//! The arena: a sealed memfd with all that the VMM and the daemon share, and its layout.
//!
//! The VMM makes it. It is sealed against shrinking and growing before it is handed over, so that a
//! mapping can never fault; the daemon refuses a file without the seal.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};

use crate::layout::{MAX_RING_SIZE, VringLayout};
use crate::mapping::os;
use crate::{ControlPage, Error};

/// Limits of an arena.
#[derive(Debug, Clone, Copy)]
pub struct Limits;

impl Limits {
    /// The smallest log data area, in bytes.
    pub const MIN_LOG_BYTES: u64 = 128 << 10;
    /// The smallest delivery ring, in bytes: two of the largest frames (1 MiB and a bit).
    pub const MIN_DELIVERY_BYTES: u64 = 2 << 20;
    /// The largest area of either kind, in bytes.
    pub const MAX_BYTES: u64 = 1 << 30;
    /// Descriptors of the event queue.
    pub const EVENT_RING: u16 = 64;
    /// Bytes of an event buffer.
    pub const EVENT_LEN: u32 = 64;
    /// Descriptors of the delivery queue: it holds one, which names the delivery ring.
    pub const DELIVERY_RING: u16 = 2;
}

/// How large the parts of an arena are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArenaConfig {
    /// Descriptors of the log queue: appends that can be outstanding. A power of two up to 32768.
    pub log_ring: u16,
    /// Bytes of the log data area.
    pub log_bytes: u64,
    /// Bytes of the delivery ring, rounded up to pages.
    pub delivery_bytes: u64,
}

impl Default for ArenaConfig {
    fn default() -> Self {
        Self {
            log_ring: 8192,
            log_bytes: 16 << 20,
            delivery_bytes: 16 << 20,
        }
    }
}

/// Byte offsets of an arena's parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArenaLayout {
    /// The control page.
    pub control: u64,
    /// The log queue.
    pub log_ring: VringLayout,
    /// The delivery queue.
    pub delivery_ring: VringLayout,
    /// The event queue.
    pub event_ring: VringLayout,
    /// The event queue's buffers.
    pub events: u64,
    /// The log data area.
    pub log: u64,
    /// Its length.
    pub log_len: u64,
    /// The delivery ring.
    pub delivery: u64,
    /// Its length.
    pub delivery_len: u64,
    /// Bytes of the whole.
    pub len: u64,
}

const PAGE: u64 = 4096;

impl ArenaLayout {
    /// Lays out an arena.
    ///
    /// # Errors
    /// [`Error::Layout`] for sizes outside of [`Limits`].
    pub fn new(config: ArenaConfig) -> Result<Self, Error> {
        if config.log_ring > MAX_RING_SIZE || config.log_ring < 2 {
            return Err(Error::Layout("log ring size"));
        }
        if !(Limits::MIN_LOG_BYTES..=Limits::MAX_BYTES).contains(&config.log_bytes) {
            return Err(Error::Layout("log data area's size"));
        }
        if !(Limits::MIN_DELIVERY_BYTES..=Limits::MAX_BYTES).contains(&config.delivery_bytes) {
            return Err(Error::Layout("delivery ring's size"));
        }
        let control = 0;
        let log_ring = VringLayout::at(PAGE, config.log_ring)?;
        let delivery_ring =
            VringLayout::at(log_ring.end().next_multiple_of(128), Limits::DELIVERY_RING)?;
        let event_ring = VringLayout::at(
            delivery_ring.end().next_multiple_of(128),
            Limits::EVENT_RING,
        )?;
        let events = event_ring.end().next_multiple_of(128);
        let events_len = u64::from(Limits::EVENT_RING) * u64::from(Limits::EVENT_LEN);
        let log = (events + events_len).next_multiple_of(PAGE);
        let log_len = config.log_bytes.next_multiple_of(PAGE);
        let delivery = log + log_len;
        let delivery_len = config.delivery_bytes.next_multiple_of(PAGE);
        Ok(Self {
            control,
            log_ring,
            delivery_ring,
            event_ring,
            events,
            log,
            log_len,
            delivery,
            delivery_len,
            len: delivery + delivery_len,
        })
    }
}

const _: () = assert!(size_of::<ControlPage>() <= PAGE as usize || cfg!(loom));

/// A sealed memfd.
#[derive(Debug)]
pub struct Arena {
    file: OwnedFd,
    len: u64,
}

const SEALS: SealFlags = SealFlags::SHRINK
    .union(SealFlags::GROW)
    .union(SealFlags::SEAL);

impl Arena {
    /// Makes an arena of `len` bytes, zeroed.
    ///
    /// # Errors
    /// [`Error::Os`] where the kernel refuses.
    pub fn create(len: u64) -> Result<Self, Error> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("ftlog-arena", flags)
            .map_err(|error| os("create the arena", error))?;
        rustix::fs::ftruncate(&file, len).map_err(|error| os("size the arena", error))?;
        rustix::fs::fcntl_add_seals(&file, SEALS).map_err(|error| os("seal the arena", error))?;
        Ok(Self { file, len })
    }

    /// Accepts a file from elsewhere as an arena of which at least `len` bytes are used.
    ///
    /// # Errors
    /// [`Error::Unsealed`] for a file that could still shrink or is too small, [`Error::Os`] for one
    /// that has no seals at all.
    pub fn accept(file: OwnedFd, len: u64) -> Result<Self, Error> {
        let seals = rustix::fs::fcntl_get_seals(&file)
            .map_err(|error| os("read the arena's seals (is it a memfd?)", error))?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(Error::Unsealed("not sealed against shrinking"));
        }
        let stat = rustix::fs::fstat(&file).map_err(|error| os("size of the arena", error))?;
        if u64::try_from(stat.st_size).is_ok_and(|size| size >= len) {
            Ok(Self { file, len })
        } else {
            Err(Error::Unsealed("smaller than what is to be mapped"))
        }
    }

    /// Bytes of it that are used.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it is empty; it never is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl AsFd for Arena {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_an_arena_do_not_overlap() {
        let layout = ArenaLayout::new(ArenaConfig::default()).unwrap();
        let parts = [
            (layout.control, PAGE),
            (
                layout.log_ring.desc,
                layout.log_ring.end() - layout.log_ring.desc,
            ),
            (
                layout.delivery_ring.desc,
                layout.delivery_ring.end() - layout.delivery_ring.desc,
            ),
            (
                layout.event_ring.desc,
                layout.event_ring.end() - layout.event_ring.desc,
            ),
            (layout.events, 64 * 64),
            (layout.log, layout.log_len),
            (layout.delivery, layout.delivery_len),
        ];
        for pair in parts.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:?}");
        }
        assert_eq!(layout.delivery + layout.delivery_len, layout.len);
    }

    #[test]
    #[cfg_attr(miri, ignore = "makes a memfd")]
    fn an_arena_that_could_shrink_is_refused() {
        let arena = Arena::create(8192).unwrap();
        let file = arena.as_fd().try_clone_to_owned().unwrap();
        assert!(rustix::fs::ftruncate(&file, 4096).is_err());
        assert_eq!(Arena::accept(file, 8192).unwrap().len(), 8192);
        let file = arena.as_fd().try_clone_to_owned().unwrap();
        assert!(matches!(Arena::accept(file, 8193), Err(Error::Unsealed(_))));
        let loose =
            rustix::fs::memfd_create("loose", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
                .unwrap();
        rustix::fs::ftruncate(&loose, 8192).unwrap();
        assert!(matches!(
            Arena::accept(loose, 8192),
            Err(Error::Unsealed(_))
        ));
    }
}
