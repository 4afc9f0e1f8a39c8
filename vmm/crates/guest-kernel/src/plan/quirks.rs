//! Patches for defects of the host's KVM. Each is made only if a probe of the VMM found the defect.

use super::planner::{Planner, Reason};
use super::skips::{Skip, skip};
use super::{QuirkSet, stubs};
use crate::error::PlanError;
use crate::patch::PatchSet;

pub(super) fn plan(planner: &mut Planner, quirks: &QuirkSet) -> Result<(), PlanError> {
    if quirks.syscall_keeps_cpl3 {
        stubs::enter_syscall(planner)?;
    }
    if quirks.int3_not_emulated {
        let reason = Reason {
            set: PatchSet::HostQuirks,
            why: "INT3 in ring 0 is not emulated: leave its self-test out",
        };
        skip(planner, "int3_selftest", Skip::Return, reason)?;
    }
    Ok(())
}
