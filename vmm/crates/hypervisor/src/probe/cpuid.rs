//! Whether CPUID shows the given table, and whether it can be made to fault.
#![allow(unsafe_code)] // The guest's code is assembled in and read as bytes.

use super::lab::Lab;
use crate::bare::Ring;
use crate::{CpuidPolicy, CpuidTable, Error, Vcpu, guest_code};

guest_code! { fn cpuid() { "cpuid", "out 0x10, al" } }

const GENERAL_PROTECTION: u8 = 13;

/// Runs CPUID leaf 1 under the restricted table and looks for bits that it hides.
pub(super) fn probe_hiding(ring: Ring) -> Result<bool, Error> {
    let policy = CpuidPolicy {
        tsc: false,
        popcnt: false,
        gigabyte_pages: false,
    };
    let mut lab = Lab::over(|supported| CpuidTable::restricted(&supported, policy))?;
    lab.load(cpuid(), ring, 0)?;
    lab.guest.update_regs(|regs| regs.rax = 1);
    let seen = lab.run();
    let table = lab.guest.vcpu.cpuid().lookup(1, 0);
    let shown = (seen.regs.rcx as u32 & !table.ecx) | (seen.regs.rdx as u32 & !table.edx);
    Ok(seen.wrote_to(0x10) && shown == 0)
}

pub(super) fn probe_faulting(lab: &mut Lab) -> Result<bool, Error> {
    lab.load(cpuid(), Ring::User, 0)?;
    if lab.guest.vcpu.set_cpuid_fault(true).is_err() {
        return Ok(false);
    }
    let seen = lab.run();
    lab.guest.vcpu.set_cpuid_fault(false)?;
    Ok(seen.took_exception(GENERAL_PROTECTION))
}
