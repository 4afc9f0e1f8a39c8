//! Patches for defects of the host's KVM. Each is made only if a probe of the VMM found the defect.

use super::planner::{Planner, Reason};
use super::skips::{Skip, skip};
use super::{QuirkSet, stubs, user_cpuid};
use crate::asm::near_branch;
use crate::error::PlanError;
use crate::patch::PatchSet;

const fn reason(why: &'static str) -> Reason {
    Reason {
        set: PatchSet::HostQuirks,
        why,
    }
}

pub(super) fn plan(planner: &mut Planner, quirks: &QuirkSet) -> Result<(), PlanError> {
    if quirks.syscall_keeps_cpl3 {
        stubs::enter_syscall(planner)?;
    }
    if quirks.cpuid_visible_in_ring3 {
        user_cpuid::answer_stand_in(planner)?;
    }
    if quirks.int3_not_emulated {
        without_int3(planner)?;
    }
    if quirks.x87_not_emulated {
        without_x87(planner)?;
    }
    Ok(())
}

/// The kernel executes INT3 in a self-test, and where an interrupt comes upon code that is being
/// changed under its protection (jump labels, static calls). With one processor code can be changed
/// with interrupts off instead, as the kernel itself does while it starts; its text has to stay
/// writable for that (`rodata=off`). The two functions get the same first three arguments as
/// `text_poke_early`, so a jump in place of their `call __fentry__` will do.
fn without_int3(planner: &mut Planner) -> Result<(), PlanError> {
    skip(
        planner,
        "int3_selftest",
        Skip::Return,
        reason("INT3 in ring 0 is not emulated: leave its self-test out"),
    )?;
    for function in ["text_poke_bp", "text_poke_queue"] {
        let found = planner
            .fentry_site(function)
            .zip(planner.symbol("text_poke_early"));
        let Some(((addr, old), early)) = found else {
            continue;
        };
        let why = "INT3 in ring 0 is not emulated: change code with interrupts off";
        planner.replace(addr, &old, &near_branch(0xe9, addr, early), reason(why))?;
    }
    Ok(())
}

/// x87 instructions in ring 0. On AMD processors that do not announce XSAVEERPTR the kernel clears
/// the last x87 pointers before it loads another process's state; a process could learn an address
/// of another one otherwise. Before it drops a state it waits for pending x87 exceptions, which only
/// a process with unmasked ones can have; they are lost.
fn without_x87(planner: &mut Planner) -> Result<(), PlanError> {
    const FNCLEX_EMMS_FILD: [u8; 6] = [0xdb, 0xe2, 0x0f, 0x77, 0xdb, 0x07];
    const NOP6: [u8; 6] = [0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00];
    let why = "x87 in ring 0 is not emulated: do not clear the last pointers";
    planner.replace_insn(
        "restore_fpregs_from_fpstate",
        &FNCLEX_EMMS_FILD,
        &NOP6,
        reason(why),
    )?;
    let why = "x87 in ring 0 is not emulated: do not wait for exceptions of a dropped state";
    planner.replace_insn("fpu__drop", &[0x9b], &[0x90], reason(why))
}
