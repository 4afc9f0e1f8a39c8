//! Split virtqueues for both sides, and the arena that they live in.
//!
//! A VMM (driver) and the logging channel's daemon (device) share one sealed memfd, the **arena**
//! ([`Arena`]). In it live the control page ([`ControlPage`]), the vrings ([`VringLayout`]), the log
//! data that the driver publishes ([`LogSpace`] hands it out) and the delivery ring that the device
//! fills ([`DoubleMapping`]). [`ArenaLayout`] says where.
//!
//! The halves of a vring are [`Driver`] with its [`Reaper`], and [`Device`]. They are written over
//! the trait [`RingMemory`], so that the same code runs on shared memory and under loom
//! (`RUSTFLAGS="--cfg loom" cargo test -p ring --release`). The tests that touch no memfd are free of
//! system calls and can run under Miri.
//!
//! What always holds: a half believes nothing that the other side can write. Indices and
//! descriptors are copied once and validated before use; what is out of range is
//! [`Error::Broken`], never undefined behaviour. There is no lock between the thread that adds and
//! the threads that reap.

mod arena;
mod control;
mod device;
mod driver;
mod layout;
mod mapping;
mod memory;
mod space;
mod sync;

#[cfg(all(test, loom))]
mod loom_tests;

pub use arena::{Arena, ArenaConfig, ArenaLayout, Limits};
pub use control::{
    COMMIT_NEVER, CONTROL_MAGIC, CONTROL_VERSION, CommitPoint, Commits, ControlPage, Doorbell,
    Owner,
};
pub use device::Device;
pub use driver::{Driver, Reaper};
pub use layout::{MAX_RING_SIZE, VringLayout};
pub use mapping::{DoubleMapping, Mapping};
pub use memory::{Desc, MappedVring, RingMemory};
pub use space::{LogSpace, Mark};

use thiserror::Error;

/// What goes wrong with shared memory.
#[derive(Debug, Error)]
pub enum Error {
    /// No free descriptor, or no free bytes: wait until the other side has used some.
    #[error("the ring is full")]
    Full,
    /// The other side broke the rules of the ring; it cannot be used any further.
    #[error("the other side broke the ring: {0}")]
    Broken(&'static str),
    /// A size or an offset that the layout does not allow.
    #[error("bad layout: {0}")]
    Layout(&'static str),
    /// The memfd is not what it must be.
    #[error("the arena is not acceptable: {0}")]
    Unsealed(&'static str),
    /// The kernel refused.
    #[error("{what}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
}

/// Whether an event index asks for a notification when an index moves from `old` to `new`
/// (virtio 1.2, 2.7.7.2: `vring_need_event`).
#[must_use]
pub const fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn an_event_index_asks_only_when_it_is_passed() {
        assert!(need_event(5, 6, 5));
        assert!(!need_event(5, 5, 4));
        assert!(need_event(5, 9, 2));
        assert!(!need_event(5, 9, 6));
        assert!(need_event(u16::MAX, 0, u16::MAX));
        assert!(!need_event(u16::MAX, 2, 0));
    }
}
