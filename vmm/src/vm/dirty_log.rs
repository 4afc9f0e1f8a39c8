//! Switching a running VM's dirty log: beside its vCPU, which would stand while KVM waits for its readers.

use std::error::Error;

use hypervisor::Vm;
use hypervisor::kvm::{KvmVm, WeakKvmVm};

/// Switches the dirty log of a VM, from any thread but the vCPU's.
#[derive(Clone, Debug)]
pub struct DirtyLogSwitch(WeakKvmVm);

/// Somebody who needs the dirty log on: it is until all of them are dropped, and goes off in a thread of its own.
#[derive(Debug)]
pub struct DirtyLogUser(WeakKvmVm);

impl DirtyLogSwitch {
    pub(super) fn new(vm: &KvmVm) -> Self {
        Self(vm.downgrade())
    }

    /// Switches it on, unless it is.
    ///
    /// # Errors
    /// The VM has ended, or KVM refuses.
    pub fn on(&self) -> Result<DirtyLogUser, String> {
        let vm = self.0.upgrade().ok_or("the VM has ended")?;
        let told = |error: hypervisor::Error| {
            let cause = error.source().map(|cause| format!(": {cause}"));
            let cause = cause.unwrap_or_default();
            format!("switching the dirty log on: {error}{cause}")
        };
        vm.set_dirty_log(true).map_err(told)?;
        Ok(DirtyLogUser(self.0.clone()))
    }
}

impl Drop for DirtyLogUser {
    fn drop(&mut self) {
        let vm = self.0.clone();
        let off = move || {
            if let Some(vm) = vm.upgrade()
                && let Err(error) = vm.set_dirty_log(false)
            {
                tracing::warn!(%error, "the dirty log stays on");
            }
        };
        let thread = std::thread::Builder::new().name("dirty-log".to_owned());
        if let Err(error) = thread.spawn(off) {
            tracing::warn!(%error, "no thread: the dirty log stays on");
        }
    }
}
