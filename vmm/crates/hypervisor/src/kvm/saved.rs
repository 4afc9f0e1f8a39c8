//! Reading and replacing the complete state of a vCPU.
#![allow(unsafe_code)] // kvm_xsave ends in a flexible array.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_xsave};
use kvm_ioctls::VcpuFd;

use super::KvmVcpu;
use crate::state::{Msr, VcpuState, XSAVE_BYTES};
use crate::vcpu::Vcpu;
use crate::{CpuidTable, Error};

/// MSRs that follow the host's clock or its firmware and say nothing about the guest.
const EXCLUDED_MSRS: [(u32, u32); 10] = [
    (0x10, 0x12),               // TSC, kvmclock's old numbers
    (0x34, 0x34),               // SMI count
    (0x3b, 0x3b),               // TSC_ADJUST
    (0x8b, 0x8b),               // microcode revision
    (0xe7, 0xe8),               // MPERF, APERF
    (0x6e0, 0x6e0),             // TSC deadline
    (0x4000_0000, 0x4000_0fff), // Hyper-V, never offered
    (0x4b56_4d00, 0x4b56_4dff), // KVM's own, never offered
    (0xc000_0104, 0xc000_0104), // TSC ratio
    (0xc001_011f, 0xc001_011f), // speculation control of the host's hypervisor
];

/// Of the MSRs that KVM lists, those that belong to the guest's state: readable, and settable to
/// what was read.
pub(super) fn restorable_msrs(fd: &VcpuFd, candidates: &[u32]) -> Vec<u32> {
    let is_excluded = |index: &u32| {
        EXCLUDED_MSRS
            .iter()
            .any(|(first, last)| (first..=last).contains(&index))
    };
    let mut list: Vec<u32> = candidates
        .iter()
        .copied()
        .filter(|index| !is_excluded(index))
        .filter(|index| {
            get_msrs(fd, &[*index])
                .ok()
                .and_then(|read| read.first().copied())
                .is_some_and(|msr| set_msrs(fd, &[msr]).is_ok())
        })
        .collect();
    list.sort_unstable();
    list.dedup();
    list
}

pub(super) fn set_msr(fd: &VcpuFd, index: u32, value: u64) -> Result<(), Error> {
    set_msrs(fd, &[Msr { index, value }])
}

fn get_msrs(fd: &VcpuFd, list: &[u32]) -> Result<Vec<Msr>, Error> {
    let entries: Vec<_> = list
        .iter()
        .map(|index| kvm_msr_entry {
            index: *index,
            ..Default::default()
        })
        .collect();
    let mut msrs = Msrs::from_entries(&entries)
        .map_err(|_| Error::StateMismatch(format!("{} MSRs", list.len())))?;
    let read = fd.get_msrs(&mut msrs).map_err(Error::kvm("KVM_GET_MSRS"))?;
    if let Some(index) = list.get(read) {
        return Err(Error::MsrRefused {
            index: *index,
            value: 0,
        });
    }
    Ok(msrs
        .as_slice()
        .iter()
        .map(|msr| Msr {
            index: msr.index,
            value: msr.data,
        })
        .collect())
}

fn set_msrs(fd: &VcpuFd, list: &[Msr]) -> Result<(), Error> {
    let entries: Vec<_> = list
        .iter()
        .map(|msr| kvm_msr_entry {
            index: msr.index,
            data: msr.value,
            ..Default::default()
        })
        .collect();
    let msrs = Msrs::from_entries(&entries)
        .map_err(|_| Error::StateMismatch(format!("{} MSRs", list.len())))?;
    let written = fd.set_msrs(&msrs).map_err(Error::kvm("KVM_SET_MSRS"))?;
    match list.get(written) {
        None => Ok(()),
        Some(msr) => Err(Error::MsrRefused {
            index: msr.index,
            value: msr.value,
        }),
    }
}

pub(super) fn save(vcpu: &KvmVcpu) -> Result<VcpuState, Error> {
    vcpu.require_settled()?;
    let fd = &vcpu.fd;
    Ok(VcpuState {
        regs: fd.get_regs().map_err(Error::kvm("KVM_GET_REGS"))?,
        sregs: fd.get_sregs().map_err(Error::kvm("KVM_GET_SREGS"))?,
        xsave: xsave_bytes(&fd.get_xsave().map_err(Error::kvm("KVM_GET_XSAVE"))?),
        xcrs: fd.get_xcrs().map_err(Error::kvm("KVM_GET_XCRS"))?,
        msrs: get_msrs(fd, &vcpu.msr_list)?,
        events: fd
            .get_vcpu_events()
            .map_err(Error::kvm("KVM_GET_VCPU_EVENTS"))?,
        debugregs: fd
            .get_debug_regs()
            .map_err(Error::kvm("KVM_GET_DEBUGREGS"))?,
        mp_state: fd.get_mp_state().ok(),
        interrupt_window: vcpu.interrupt_window(),
        trap_tsc: vcpu.trap_tsc,
        cpuid: vcpu.cpuid.clone(),
    })
}

/// In the order in which the parts depend on each other: mode before registers, XCR0 before the
/// state that it governs, registers before the events that setting them would take back.
pub(super) fn restore(vcpu: &mut KvmVcpu, state: &VcpuState) -> Result<(), Error> {
    vcpu.require_settled()?;
    check_cpuid(&vcpu.cpuid, &state.cpuid)?;
    let xsave = xsave_of(&state.xsave)?;
    let fd = &vcpu.fd;
    fd.set_sregs(&state.sregs)
        .map_err(Error::kvm("KVM_SET_SREGS"))?;
    if state.xcrs.nr_xcrs != 0 {
        fd.set_xcrs(&state.xcrs)
            .map_err(Error::kvm("KVM_SET_XCRS"))?;
    }
    // SAFETY: KVM reads at most XSAVE_BYTES: a larger image is refused when the VM is made.
    unsafe { fd.set_xsave(&xsave) }.map_err(Error::kvm("KVM_SET_XSAVE"))?;
    set_msrs(fd, &state.msrs)?;
    fd.set_debug_regs(&state.debugregs)
        .map_err(Error::kvm("KVM_SET_DEBUGREGS"))?;
    if let Some(mp_state) = state.mp_state {
        fd.set_mp_state(mp_state)
            .map_err(Error::kvm("KVM_SET_MP_STATE"))?;
    }
    fd.set_regs(&state.regs)
        .map_err(Error::kvm("KVM_SET_REGS"))?;
    fd.set_vcpu_events(&state.events)
        .map_err(Error::kvm("KVM_SET_VCPU_EVENTS"))?;
    vcpu.set_interrupt_window(state.interrupt_window);
    vcpu.trap_tsc = state.trap_tsc;
    vcpu.refresh()
}

fn check_cpuid(mine: &CpuidTable, saved: &CpuidTable) -> Result<(), Error> {
    if mine == saved {
        return Ok(());
    }
    let leaves = mine.leaves().len().max(saved.leaves().len());
    let differing = (0..leaves)
        .find(|leaf| mine.leaves().get(*leaf) != saved.leaves().get(*leaf))
        .and_then(|leaf| saved.leaves().get(leaf).or(mine.leaves().get(leaf)))
        .map_or(0, |leaf| leaf.function);
    Err(Error::StateMismatch(format!(
        "CPUID leaf {differing:#x} differs"
    )))
}

fn xsave_bytes(xsave: &kvm_xsave) -> Vec<u8> {
    xsave
        .region
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect()
}

fn xsave_of(bytes: &[u8]) -> Result<kvm_xsave, Error> {
    if bytes.len() != XSAVE_BYTES {
        return Err(Error::StateMismatch(format!(
            "{} bytes of XSAVE image",
            bytes.len()
        )));
    }
    let mut xsave = kvm_xsave::default();
    for (word, bytes) in xsave.region.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_le_bytes(bytes.try_into().expect("chunks of four bytes"));
    }
    Ok(xsave)
}
