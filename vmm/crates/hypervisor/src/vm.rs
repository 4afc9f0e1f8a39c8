//! The virtual machine as running, recording and replaying need it.

use crate::{DirtyBitmap, Error, GuestRam};

/// A virtual machine: its memory and what KVM knows about it.
pub trait Vm {
    /// The guest's RAM.
    fn memory(&self) -> &GuestRam;

    /// Switches KVM's dirty log on or off. Switching on starts with an empty log.
    ///
    /// # Errors
    /// If KVM refuses.
    fn set_dirty_log(&mut self, on: bool) -> Result<(), Error>;

    /// Fetches and clears KVM's dirty log: the pages that the guest has written since the last
    /// call. A superset is allowed, a missing page is not. Writes that the VMM made itself are
    /// not in it, see [`GuestRam::take_vmm_dirty`].
    ///
    /// # Errors
    /// If KVM refuses, or the log is off.
    fn dirty_log(&mut self) -> Result<DirtyBitmap, Error>;
}
