//! Instructions that a program can execute although CPUID does not offer them.
//!
//! Those that yield a different result each time make a program diverge that uses them unasked;
//! AVX adds registers that a guest kernel without XSAVE does not switch between programs.
#![allow(unsafe_code)] // The guest's code is assembled in and read as bytes.

use serde::{Deserialize, Serialize};

use super::lab::Lab;
use crate::bare::{CR4_TSD, Ring};
use crate::{CpuidPolicy, CpuidTable, Error, Vcpu, guest_code};

/// An instruction that is not offered to guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum HiddenInstruction {
    /// RDRAND.
    Rdrand,
    /// RDSEED.
    Rdseed,
    /// RDPID.
    Rdpid,
    /// RDTSCP, with everything on that makes RDTSC fault.
    Rdtscp,
    /// XGETBV.
    Xgetbv,
    /// AVX.
    Avx,
}

guest_code! { fn rdrand() { "rdrand rax", "out 0x10, al" } }
guest_code! { fn rdseed() { "rdseed rax", "out 0x10, al" } }
guest_code! { fn rdpid() { "rdpid rax", "out 0x10, al" } }
guest_code! { fn rdtscp() { "rdtscp", "out 0x10, al" } }
guest_code! { fn xgetbv() { "xor ecx, ecx", "xgetbv", "out 0x10, al" } }
guest_code! { fn avx() { "vpxor ymm0, ymm0, ymm0", "out 0x10, al" } }

type Code = fn() -> &'static [u8];

const PROBES: [(HiddenInstruction, Code); 6] = [
    (HiddenInstruction::Rdrand, rdrand),
    (HiddenInstruction::Rdseed, rdseed),
    (HiddenInstruction::Rdpid, rdpid),
    (HiddenInstruction::Rdtscp, rdtscp),
    (HiddenInstruction::Xgetbv, xgetbv),
    (HiddenInstruction::Avx, avx),
];

pub(super) fn probe() -> Result<Vec<HiddenInstruction>, Error> {
    let policy = CpuidPolicy::default();
    let mut lab = Lab::over(|supported| CpuidTable::restricted(&supported, policy))?;
    let mut usable = Vec::new();
    for (instruction, code) in PROBES {
        lab.load(code(), Ring::User, CR4_TSD)?;
        lab.guest.vcpu.set_trap_tsc(true);
        let seen = lab.run();
        lab.guest.vcpu.set_trap_tsc(false);
        if seen.wrote_to(0x10) {
            usable.push(instruction);
        }
    }
    Ok(usable)
}
