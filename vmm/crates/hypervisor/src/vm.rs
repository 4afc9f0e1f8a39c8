//! The virtual machine as running, recording and replaying need it.

use crate::{DirtyBitmap, Error, GuestRam};

/// A virtual machine: its memory and what KVM knows about it.
pub trait Vm {
    /// The guest's RAM.
    fn memory(&self) -> &GuestRam;

    /// Switches KVM's dirty log on or off. It counts: the log is off after as many calls for off as for on, and
    /// starts empty when it goes on. KVM waits for its readers then, which may take seconds on a busy host: a vCPU
    /// that is to run on does so in another thread meanwhile.
    ///
    /// # Errors
    /// If KVM refuses.
    fn set_dirty_log(&self, on: bool) -> Result<(), Error>;

    /// Fetches and clears KVM's dirty log: the pages that the guest has written since the last
    /// call. A superset is allowed, a missing page is not. Writes that the VMM made itself are
    /// not in it, see [`GuestRam::take_vmm_dirty`]. Only one owner may fetch: what it has fetched no other sees.
    ///
    /// # Errors
    /// If KVM refuses, or the log is off.
    fn dirty_log(&mut self) -> Result<DirtyBitmap, Error>;
}
