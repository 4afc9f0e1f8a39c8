//! Has KVM notice writes to guest memory that it has not seen.
//!
//! Where KVM runs a guest on shadow page tables, it derives them from the guest's own and follows what the guest
//! writes to those. What the VMM writes there it does not see. Deleting and adding memory slots would drop
//! all that was derived; but that waits for grace periods of SRCU, so for the kernel's workers, which may
//! not run for seconds where the processors are busy, and the guest then meets a fault for every page that it uses.
//!
//! So the vCPU itself writes to each such page once more: one byte, with what it holds. KVM drops what it has
//! derived from a page when it sees a write to it that is smaller than an entry; the second byte of one, since it
//! takes a write to the first for a change of flags. Where KVM derives nothing from memory, this is a few instructions.
//!
//! The code and the page tables for it lie in a slot of their own, read-only and the same in every VM of a
//! size, so that a guest that finds them finds nothing that differs:
//!
//! ```text
//! 0xff00_0000  code
//!    + 0x1000  PML4, which maps all addresses up to the end of RAM, or 4 GiB, one to one
//!    + 0x2000  its page-directory-pointer tables, and then their page directories: 2 MiB pages
//! ```
#![allow(unsafe_code)] // Code of the guest.

use kvm_bindings::{
    KVM_MEM_READONLY, KVM_VCPUEVENT_VALID_SHADOW, kvm_debugregs, kvm_dtable, kvm_regs, kvm_sregs,
    kvm_userspace_memory_region, kvm_vcpu_events,
};
use kvm_ioctls::VcpuExit;
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

use super::KvmVcpu;
use super::vcpu::is_interruption;
use crate::bare::{CR0, CR4, EFER, code_segment, data_segment, task_segment};
use crate::dirty::{Gfn, PAGE_SIZE};
use crate::ram::page_addr;
use crate::{Error, GuestRam, RamError, Vm, guest_code};

/// Where the slot begins: in the MMIO hole, used by no device.
const START: u64 = 0xff00_0000;
/// What one page directory maps.
const GIB: u64 = 1 << 30;
const ENTRIES: usize = PAGE_SIZE / 8;
/// Present, writable, accessed.
const TABLE: u64 = 0x23;
/// The same, dirty, large.
const LARGE_PAGE: u64 = 0xe3;
/// Pages that one run writes to: one for each general register.
const BATCH: usize = 16;

guest_code! {
    fn write_back() {
        "or byte ptr [rax + 1], 0", "or byte ptr [rbx + 1], 0", "or byte ptr [rcx + 1], 0", "or byte ptr [rdx + 1], 0",
        "or byte ptr [rsi + 1], 0", "or byte ptr [rdi + 1], 0", "or byte ptr [rsp + 1], 0", "or byte ptr [rbp + 1], 0",
        "or byte ptr [r8 + 1], 0", "or byte ptr [r9 + 1], 0", "or byte ptr [r10 + 1], 0", "or byte ptr [r11 + 1], 0",
        "or byte ptr [r12 + 1], 0", "or byte ptr [r13 + 1], 0", "or byte ptr [r14 + 1], 0", "or byte ptr [r15 + 1], 0",
        "hlt",
    }
}

/// The slot's memory.
#[derive(Debug)]
pub(super) struct Slot {
    region: MmapRegion,
}

impl Slot {
    /// For a machine with this RAM.
    pub(super) fn new(ram: &GuestRam) -> Result<Self, Error> {
        let end = ram.regions().last().map_or(0, |r| r.start + r.len as u64);
        let bytes = contents(end.max(4 * GIB).div_ceil(GIB) as usize);
        let map = |source| RamError::Map {
            bytes: bytes.len(),
            source,
        };
        let region = MmapRegion::new(bytes.len()).map_err(map)?;
        let all = region.as_volatile_slice();
        all.write_slice(&bytes, 0).expect("it was made so long");
        Ok(Self { region })
    }

    /// As KVM takes it.
    pub(super) fn describe(&self, slot: u32) -> kvm_userspace_memory_region {
        kvm_userspace_memory_region {
            slot,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: START,
            memory_size: self.region.size() as u64,
            userspace_addr: self.region.as_ptr() as u64,
        }
    }
}

/// Code, and page tables for so many GiB.
fn contents(gib: usize) -> Vec<u8> {
    let pointer_tables = gib.div_ceil(ENTRIES);
    let page = |number: usize| START + (number * PAGE_SIZE) as u64;
    let (first_pointer_table, first_directory) = (2, 2 + pointer_tables);
    let mut words = vec![0; (first_directory + gib) * ENTRIES];
    for table in 0..pointer_tables {
        words[ENTRIES + table] = page(first_pointer_table + table) | TABLE;
    }
    for directory in 0..gib {
        words[first_pointer_table * ENTRIES + directory] =
            page(first_directory + directory) | TABLE;
    }
    for large in 0..gib * ENTRIES {
        words[first_directory * ENTRIES + large] = (large as u64 * (2 << 20)) | LARGE_PAGE;
    }
    let mut bytes: Vec<u8> = words
        .iter()
        .flat_map(|word: &u64| word.to_le_bytes())
        .collect();
    bytes[..write_back().len()].copy_from_slice(write_back());
    bytes
}

/// See [`crate::Vcpu::notice_writes`].
pub(super) fn notice_writes(vcpu: &mut KvmVcpu, pages: &[Gfn]) -> Result<(), Error> {
    vcpu.require_settled()?;
    if pages.is_empty() {
        return Ok(());
    }
    become_nobody(vcpu)?;
    for batch in pages.chunks(BATCH) {
        let mut addresses = [0; BATCH];
        for (index, address) in addresses.iter_mut().enumerate() {
            *address = address_of(vcpu.vm.memory(), batch[index % batch.len()])?;
        }
        let regs = registers(addresses);
        vcpu.fd
            .set_regs(&regs)
            .map_err(Error::kvm("KVM_SET_REGS"))?;
        run_to_halt(vcpu)?;
    }
    Ok(())
}

fn address_of(ram: &GuestRam, gfn: Gfn) -> Result<u64, RamError> {
    let addr = page_addr(gfn)?;
    ram.read(addr, &mut [0])?;
    Ok(addr)
}

/// Ring 0 of 64-bit mode over the slot's page tables; no event on its way, no breakpoint.
fn become_nobody(vcpu: &mut KvmVcpu) -> Result<(), Error> {
    let data = data_segment(0x18, 0);
    let none = kvm_dtable::default();
    let sregs = kvm_sregs {
        cs: code_segment(0x10, 0),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: task_segment(),
        gdt: none,
        idt: none,
        cr3: START + PAGE_SIZE as u64,
        cr0: CR0,
        cr4: CR4,
        efer: EFER,
        apic_base: vcpu.sregs.apic_base,
        ..Default::default()
    };
    let events = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    let breakpoints = kvm_debugregs {
        dr6: 0xffff_0ff0,
        dr7: 0x400,
        ..Default::default()
    };
    let fd = &vcpu.fd;
    fd.set_vcpu_events(&events)
        .map_err(Error::kvm("KVM_SET_VCPU_EVENTS"))?;
    fd.set_debug_regs(&breakpoints)
        .map_err(Error::kvm("KVM_SET_DEBUGREGS"))?;
    fd.set_sregs(&sregs).map_err(Error::kvm("KVM_SET_SREGS"))
}

fn registers(addresses: [u64; BATCH]) -> kvm_regs {
    let at = |register: usize| addresses[register];
    kvm_regs {
        rax: at(0),
        rbx: at(1),
        rcx: at(2),
        rdx: at(3),
        rsi: at(4),
        rdi: at(5),
        rsp: at(6),
        rbp: at(7),
        r8: at(8),
        r9: at(9),
        r10: at(10),
        r11: at(11),
        r12: at(12),
        r13: at(13),
        r14: at(14),
        r15: at(15),
        rip: START,
        rflags: 2,
    }
}

/// Without the kicker: who kicks wants the guest, which does not run here.
fn run_to_halt(vcpu: &mut KvmVcpu) -> Result<(), Error> {
    loop {
        match vcpu.fd.run() {
            Ok(VcpuExit::Hlt) => return Ok(()),
            Ok(other) => return Err(Error::Notice(format!("{other:?}"))),
            Err(error) if is_interruption(error) => {}
            Err(source) => {
                return Err(Error::Kvm {
                    call: "KVM_RUN",
                    source,
                });
            }
        }
    }
}
