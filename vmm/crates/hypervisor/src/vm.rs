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

    /// Makes KVM forget everything that it has derived from guest memory (shadow page tables),
    /// by deleting and adding the memory slots.
    ///
    /// To be called after guest RAM was written behind the back of a vCPU that has run, and
    /// before it runs again. What the dirty log held is kept for the next [`Vm::dirty_log`].
    ///
    /// # Errors
    /// If KVM refuses; the machine then may have no memory and must not run again.
    fn flush_shadow(&mut self) -> Result<(), Error>;
}
