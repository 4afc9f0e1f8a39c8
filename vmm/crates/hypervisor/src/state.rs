//! The saved state of a vCPU: everything that decides how the guest goes on.
//!
//! Left out on purpose is what follows the host's clock (TSC, kvmclock, APIC timer MSRs): none of
//! it is visible to a guest whose time comes from the VMM. The blocks are the kernel's own ABI
//! structures; whoever stores a state wraps it in a tagged, versioned format.

use kvm_bindings::{kvm_debugregs, kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs};
use serde::{Deserialize, Serialize};

use crate::{CpuidTable, digest};

/// Bytes of the XSAVE image (`KVM_GET_XSAVE`).
pub const XSAVE_BYTES: usize = 4096;

/// One model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// Number of the MSR.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

/// The complete state of a settled vCPU. Restored into another vCPU over the same memory, the
/// guest goes on bit for bit as it would have done here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, control registers, EFER, pending interrupt.
    pub sregs: kvm_sregs,
    /// x87, SSE and further extended state, [`XSAVE_BYTES`] long.
    pub xsave: Vec<u8>,
    /// XCR0, where the guest has one.
    pub xcrs: kvm_xcrs,
    /// MSRs, ascending by number.
    pub msrs: Vec<Msr>,
    /// Exceptions, interrupts and NMIs on their way, interrupt shadow.
    pub events: kvm_vcpu_events,
    /// DR0 to DR7.
    pub debugregs: kvm_debugregs,
    /// Running, halted; none where KVM does not offer it.
    pub mp_state: Option<kvm_mp_state>,
    /// Whether the interrupt window is asked for.
    pub interrupt_window: bool,
    /// Whether RDTSC of ring 3 is made to fault by the host.
    pub trap_tsc: bool,
    /// The CPUID table; CPUID faulting itself is MSR 140h.
    pub cpuid: CpuidTable,
}

impl VcpuState {
    /// Digest of general, segment and control registers, as [`crate::Vcpu::digest`].
    #[must_use]
    pub fn digest(&self) -> u64 {
        digest::registers(&self.regs, &self.sregs)
    }

    /// Digest of the x87 and SSE registers: the FXSAVE part without its software-reserved bytes.
    #[must_use]
    pub fn fpu_digest(&self) -> u64 {
        /// End of XMM15 in the FXSAVE area (Intel SDM volume 1, table 10-2).
        const FXSAVE_USED_BYTES: usize = 416;
        digest::bytes(&self.xsave[..self.xsave.len().min(FXSAVE_USED_BYTES)])
    }

    /// The value of an MSR, if it was saved.
    #[must_use]
    pub fn msr(&self, index: u32) -> Option<u64> {
        self.msrs
            .iter()
            .find(|msr| msr.index == index)
            .map(|msr| msr.value)
    }
}
