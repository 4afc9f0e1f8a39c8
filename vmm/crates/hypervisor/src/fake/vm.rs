//! A machine that is only memory and a dirty log.

use std::sync::{Arc, Mutex, MutexGuard};

use crate::dirty::{DirtyBitmap, Gfn};
use crate::fake::ToyVcpu;
use crate::{CpuidTable, Error, GuestRam, Vm};

/// What the machine and its vCPU share.
#[derive(Clone, Debug)]
pub(super) struct SharedLog(Arc<Mutex<Log>>);

#[derive(Debug)]
struct Log {
    /// How many want it on.
    users: u32,
    pages: DirtyBitmap,
}

impl SharedLog {
    fn lock(&self) -> MutexGuard<'_, Log> {
        self.0.lock().expect("nobody panics with the log locked")
    }

    /// Notes what the guest has written.
    pub(super) fn note(&self, addr: u64, len: usize) {
        let mut log = self.lock();
        if log.users > 0 {
            log.pages.insert(Gfn::of(addr));
            log.pages.insert(Gfn::of(addr + len as u64 - 1));
        }
    }
}

/// A machine without KVM.
#[derive(Debug)]
pub struct FakeVm {
    ram: GuestRam,
    log: SharedLog,
}

impl FakeVm {
    /// A machine with this RAM.
    #[must_use]
    pub fn new(ram: GuestRam) -> Self {
        let log = Log {
            users: 0,
            pages: ram.no_pages(),
        };
        Self {
            ram,
            log: SharedLog(Arc::new(Mutex::new(log))),
        }
    }

    /// A toy vCPU that executes from `entry` on, with interrupts off and zeroed registers.
    #[must_use]
    pub fn create_toy(&self, entry: u64, cpuid: CpuidTable) -> ToyVcpu {
        ToyVcpu::new(self.ram.clone(), self.log.clone(), entry, cpuid)
    }
}

impl Vm for FakeVm {
    fn memory(&self) -> &GuestRam {
        &self.ram
    }

    fn set_dirty_log(&self, on: bool) -> Result<(), Error> {
        let mut log = self.log.lock();
        if log.users == 0 {
            log.pages = self.ram.no_pages();
        }
        log.users = if on {
            log.users + 1
        } else {
            log.users.saturating_sub(1)
        };
        Ok(())
    }

    fn dirty_log(&mut self) -> Result<DirtyBitmap, Error> {
        let mut log = self.log.lock();
        if log.users == 0 {
            // As KVM says it of a slot without the flag.
            let source = kvm_ioctls::Error::new(libc::ENOENT);
            return Err(Error::Kvm {
                call: "KVM_GET_DIRTY_LOG",
                source,
            });
        }
        Ok(std::mem::replace(&mut log.pages, self.ram.no_pages()))
    }
}
