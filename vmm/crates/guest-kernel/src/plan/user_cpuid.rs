//! CPUID of programs on a host where it cannot be made to fault: the stub that answers the opcode that
//! [`crate::initramfs`] puts in its place.
//!
//! #UD has no error code; for everything else see [`super::stubs`].

use super::planner::{Planner, Reason};
use super::stubs::{ErrorCode, Original, detour};
use crate::asm::Asm;
use crate::error::PlanError;
use crate::initramfs::CPUID_STAND_IN;
use crate::patch::PatchSet;
use crate::ports;

/// The code segment of 64-bit programs (`__USER_CS`). Its base is zero, so RIP is an address.
const USER_CS: u8 = 0x33;

/// The opcode that stands for CPUID raises #UD; the stub executes the port read of the kernel's own
/// patch in its place and returns behind it.
pub(super) fn answer_stand_in(planner: &mut Planner) -> Result<(), PlanError> {
    let reason = Reason {
        set: PatchSet::HostQuirks,
        why: "CPUID of programs was replaced by an undefined opcode: turn its #UD into a port read",
    };
    detour(
        planner,
        "asm_exc_invalid_op",
        ErrorCode::None,
        reason,
        invalid_op,
    )
}

fn invalid_op(stub: u64, original: Original) -> Vec<u8> {
    let [first, second] = CPUID_STAND_IN;
    let mut asm = Asm::at(stub);
    let (not_ours, restore) = (asm.forward(), asm.forward());
    asm.raw(&[0x48, 0x83, 0x7c, 0x24, 0x08, USER_CS]) // cmp qword [rsp+8], __USER_CS
        .short(0x75, not_ours) // jnz
        .raw(&[0x50]) // push rax
        .raw(&[0x48, 0x8b, 0x44, 0x24, 0x08]) // mov rax, [rsp+8]: RIP
        .raw(&[0x48, 0xc1, 0xe8, 0x2f]) // shr rax, 47: a RIP that no user can have?
        .short(0x75, restore) // jnz
        .raw(&[0x48, 0x8b, 0x44, 0x24, 0x08]) // mov rax, [rsp+8]
        .raw(&[0x80, 0x38, first]) // cmp byte [rax], first
        .short(0x75, restore) // jnz: the next byte may be on a page that is not there
        .raw(&[0x80, 0x78, 0x01, second]) // cmp byte [rax+1], second
        .short(0x75, restore) // jnz
        .raw(&[0x58]) // pop rax
        .raw(&[0x48, 0x83, 0x04, 0x24, 0x02]) // add qword [rsp], 2: behind it
        .raw(&[0xe5, ports::CPUID.to_le_bytes()[0]]) // in eax, port
        .raw(&[0x48, 0xcf]) // iretq
        .label(restore)
        .raw(&[0x58]) // pop rax
        .label(not_ours);
    original.continue_in(&mut asm);
    asm.finish()
}

#[cfg(test)]
#[path = "user_cpuid_tests.rs"]
mod tests;
