//! The virtual machine on KVM.
#![allow(unsafe_code)] // Memory slots are raw addresses.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_SYNC_REGS, KVM_CAP_XSAVE2,
    KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};

use crate::dirty::{DirtyBitmap, Gfn, PAGE_SIZE};
use crate::kvm::{KvmVcpu, notice};
use crate::probe::Capabilities;
use crate::state::XSAVE_BYTES;
use crate::{CpuidTable, Error, GuestRam, Vm};

/// Three pages below 4 GiB that Intel hardware needs; inside the MMIO hole, used by no device.
const TSS_ADDR: usize = 0xfffb_d000;

/// MSRs that show the host's clock; first number and count. The guest gets #GP for them where KVM
/// can filter MSRs: TSC and kvmclock's old numbers, TSC_ADJUST, MPERF and APERF, TSC deadline,
/// kvmclock and KVM's other paravirtual ones.
const CLOCK_MSRS: [(u32, u32); 5] = [
    (0x10, 3),
    (0x3b, 1),
    (0xe7, 2),
    (0x6e0, 1),
    (0x4b56_4d00, 8),
];

/// A virtual machine on KVM. Clones are the same machine, and a vCPU has one: the memory that KVM maps stays
/// until all are dropped.
#[derive(Clone, Debug)]
pub struct KvmVm(Arc<Inner>);

/// A [`KvmVm`] that does not keep the machine.
#[derive(Clone, Debug)]
pub struct WeakKvmVm(Weak<Inner>);

impl WeakKvmVm {
    /// The machine, if there still is one.
    #[must_use]
    pub fn upgrade(&self) -> Option<KvmVm> {
        self.0.upgrade().map(KvmVm)
    }
}

#[derive(Debug)]
struct Inner {
    kvm: Kvm,
    fd: VmFd,
    slots: Vec<kvm_userspace_memory_region>,
    /// How many want the dirty log on; locked while it is switched.
    dirty_log: Mutex<u32>,
    /// Behind the descriptor: dropped last, since KVM maps them.
    ram: GuestRam,
    notice: notice::Slot,
}

/// Opens `/dev/kvm` and checks the version of its interface.
///
/// # Errors
/// [`Error::NoKvm`], [`Error::NoPermission`], [`Error::ApiVersion`].
pub fn open() -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(|source| match source.errno() {
        libc::EACCES | libc::EPERM => Error::NoPermission(source),
        libc::ENOENT | libc::ENODEV | libc::ENXIO if !Path::new("/dev/kvm").exists() => {
            Error::NoKvm(source)
        }
        _ => Error::kvm("open /dev/kvm")(source),
    })?;
    let found = kvm.get_api_version();
    let expected = KVM_API_VERSION as i32;
    if found == expected {
        Ok(kvm)
    } else {
        Err(Error::ApiVersion { found, expected })
    }
}

/// Everything that KVM supports in CPUID; the base of [`CpuidTable::restricted`].
///
/// # Errors
/// If KVM refuses.
pub fn supported_cpuid(kvm: &Kvm) -> Result<CpuidTable, Error> {
    let table = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(Error::kvm("KVM_GET_SUPPORTED_CPUID"))?;
    Ok(CpuidTable::from_kvm(&table))
}

impl KvmVm {
    /// Makes a machine with this RAM.
    ///
    /// # Errors
    /// Those of [`open`], [`Error::MissingCapability`], or what KVM refuses.
    pub fn new(ram: GuestRam) -> Result<Self, Error> {
        let kvm = open()?;
        let fd = kvm.create_vm().map_err(Error::kvm("KVM_CREATE_VM"))?;
        require_capabilities(&fd)?;
        fd.set_tss_address(TSS_ADDR)
            .map_err(Error::kvm("KVM_SET_TSS_ADDR"))?;
        hide_clock_msrs(&fd)?;
        let slots = ram
            .regions()
            .enumerate()
            .map(|(slot, region)| kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.start,
                memory_size: region.len as u64,
                userspace_addr: region.host as u64,
            })
            .collect();
        let notice = notice::Slot::new(&ram)?;
        let inner = Inner {
            kvm,
            fd,
            slots,
            dirty_log: Mutex::new(0),
            ram,
            notice,
        };
        inner.set_slots(false)?;
        inner.set_slot(inner.notice.describe(inner.slots.len() as u32))?;
        Ok(Self(Arc::new(inner)))
    }

    /// The same without keeping it.
    #[must_use]
    pub fn downgrade(&self) -> WeakKvmVm {
        WeakKvmVm(Arc::downgrade(&self.0))
    }

    /// Everything that KVM supports in CPUID.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn supported_cpuid(&self) -> Result<CpuidTable, Error> {
        supported_cpuid(&self.0.kvm)
    }

    /// What this KVM offers beyond the necessary.
    pub(crate) fn capabilities(&self) -> Capabilities {
        let Inner { kvm, fd, .. } = &*self.0;
        Capabilities {
            api_version: kvm.get_api_version(),
            msr_filter: fd.check_extension(Cap::X86MsrFilter),
            xsave_bytes: fd.check_extension_raw(KVM_CAP_XSAVE2.into()),
            memory_slots: kvm.get_nr_memslots(),
        }
    }

    /// Makes the machine's vCPU number `id`, with this CPUID table, in its state after reset.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn create_vcpu(&self, id: u64, cpuid: CpuidTable) -> Result<KvmVcpu, Error> {
        let Inner { kvm, fd, .. } = &*self.0;
        let vcpu = fd.create_vcpu(id).map_err(Error::kvm("KVM_CREATE_VCPU"))?;
        let msrs = kvm
            .get_msr_index_list()
            .map_err(Error::kvm("KVM_GET_MSR_INDEX_LIST"))?;
        KvmVcpu::new(vcpu, fd.run_size(), cpuid, msrs.as_slice(), self.clone())
    }
}

impl Inner {
    fn set_slot(&self, slot: kvm_userspace_memory_region) -> Result<(), Error> {
        // SAFETY: the slot is one region of `self.ram` or `self.notice`, which outlive the VM's
        // descriptor here, and by their clone of this those of its vCPUs.
        unsafe { self.fd.set_user_memory_region(slot) }
            .map_err(Error::kvm("KVM_SET_USER_MEMORY_REGION"))
    }

    fn set_slots(&self, dirty_log: bool) -> Result<(), Error> {
        let flags = if dirty_log {
            KVM_MEM_LOG_DIRTY_PAGES
        } else {
            0
        };
        self.slots
            .iter()
            .try_for_each(|slot| self.set_slot(kvm_userspace_memory_region { flags, ..*slot }))
    }
}

impl Vm for KvmVm {
    fn memory(&self) -> &GuestRam {
        &self.0.ram
    }

    fn set_dirty_log(&self, on: bool) -> Result<(), Error> {
        let users = self.0.dirty_log.lock();
        let mut users = users.unwrap_or_else(PoisonError::into_inner);
        let wanted = if on {
            *users + 1
        } else {
            users.saturating_sub(1)
        };
        if (wanted > 0) != (*users > 0) {
            self.0.set_slots(on)?;
        }
        *users = wanted;
        Ok(())
    }

    fn dirty_log(&mut self) -> Result<DirtyBitmap, Error> {
        let mut dirty = DirtyBitmap::default();
        for slot in &self.0.slots {
            let bytes = slot.memory_size as usize;
            let mut words = self
                .0
                .fd
                .get_dirty_log(slot.slot, bytes)
                .map_err(Error::kvm("KVM_GET_DIRTY_LOG"))?;
            words.truncate((bytes / PAGE_SIZE).div_ceil(64));
            dirty.push_span(Gfn::of(slot.guest_phys_addr), words);
        }
        Ok(dirty)
    }
}

fn require_capabilities(fd: &VmFd) -> Result<(), Error> {
    let sync = fd.check_extension_raw(KVM_CAP_SYNC_REGS.into());
    let wanted = (KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS) as i32;
    let xsave_bytes = fd.check_extension_raw(KVM_CAP_XSAVE2.into());
    let needs = [
        (fd.check_extension(Cap::UserMemory), "KVM_CAP_USER_MEMORY"),
        (fd.check_extension(Cap::SetTssAddr), "KVM_CAP_SET_TSS_ADDR"),
        (fd.check_extension(Cap::ReadonlyMem), "KVM_CAP_READONLY_MEM"),
        (fd.check_extension(Cap::VcpuEvents), "KVM_CAP_VCPU_EVENTS"),
        (fd.check_extension(Cap::Xcrs), "KVM_CAP_XCRS"),
        (fd.check_extension(Cap::Debugregs), "KVM_CAP_DEBUGREGS"),
        (
            fd.check_extension_raw(KVM_CAP_IMMEDIATE_EXIT.into()) != 0,
            "KVM_CAP_IMMEDIATE_EXIT",
        ),
        (
            sync & wanted == wanted,
            "KVM_CAP_SYNC_REGS for general and segment registers",
        ),
        (fd.check_extension(Cap::Xsave), "KVM_CAP_XSAVE"),
        (
            xsave_bytes <= XSAVE_BYTES as i32,
            "an XSAVE image of 4096 bytes or less",
        ),
    ];
    match needs.into_iter().find(|(present, _)| !present) {
        None => Ok(()),
        Some((_, name)) => Err(Error::MissingCapability(name)),
    }
}

/// Makes MSRs that show the host's clock unknown to the guest, as far as KVM can.
fn hide_clock_msrs(fd: &VmFd) -> Result<(), Error> {
    if !fd.check_extension(Cap::X86MsrFilter) {
        return Ok(());
    }
    let bitmap = [0u8];
    let ranges = CLOCK_MSRS.map(|(base, msr_count)| MsrFilterRange {
        base,
        msr_count,
        flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
        bitmap: &bitmap,
    });
    fd.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges)
        .map_err(Error::kvm("KVM_X86_SET_MSR_FILTER"))
}
