//! Maps the kernel's code and data, and all memory, by pages of a gigabyte where ring 0 is emulated.
//!
//! An emulator walks the guest's page tables for every instruction that it fetches and every operand: each
//! level that is left out makes all of ring 0 faster. The kernel splits such a page by itself where it needs
//! other permissions for a part of it. What is mapped beyond the end of memory is never touched.

use iced_x86::{Code, Register};

use super::planner::{Planner, Reason};
use crate::error::PlanError;

const REASON: Reason = Reason::fast_boot("kernel and memory are mapped by pages of a gigabyte");
/// Entry of the third level that maps the kernel, which lies at the first gigabyte's begin in memory.
const KERNEL_ENTRY: u64 = 510 * 8;
/// Present, writable, accessed, dirty, global; the page ends the walk.
const LARGE_PAGE: u64 = 0x1e3;
/// Present, writable, accessed, dirty: a table.
const TABLE: u64 = 0x63;
/// Where the kernel's addresses begin.
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

pub(super) fn plan(planner: &mut Planner) -> Result<(), PlanError> {
    kernel(planner)?;
    memory(planner)
}

/// The entry for the kernel's image becomes a page. The table that it has led to stays, and is not used.
fn kernel(planner: &mut Planner) -> Result<(), PlanError> {
    let tables = planner
        .symbol("level3_kernel_pgt")
        .zip(planner.symbol("level2_kernel_pgt"));
    let Some((upper, lower)) = tables else {
        return Ok(());
    };
    let old = (lower - KERNEL_MAP) | TABLE;
    planner.replace(
        upper + KERNEL_ENTRY,
        &old.to_le_bytes(),
        &LARGE_PAGE.to_le_bytes(),
        REASON,
    )
}

/// `phys_pud_init` asks in two places whether pages of a gigabyte are allowed for the range: they are, and
/// reach beyond it.
fn memory(planner: &mut Planner) -> Result<(), PlanError> {
    const FUNCTION: &str = "phys_pud_init";
    /// `1 << PG_LEVEL_1G`.
    const GIGABYTE: u8 = 8;
    let insns = planner.insns(FUNCTION, |_| true);
    let asks: Vec<_> = insns
        .windows(2)
        .filter(|pair| {
            pair[0].code() == Code::Test_rm8_imm8
                && pair[0].memory_base() == Register::RSP
                && pair[0].immediate8() == GIGABYTE
                && pair[0].len() == 5
                && pair[1].code() == Code::Je_rel8_64
        })
        .map(|pair| pair[0])
        .collect();
    if asks.len() != 2 {
        planner.miss_table(
            FUNCTION,
            format!("asks for pages of a gigabyte {} times", asks.len()),
        );
    }
    for ask in asks {
        let old = planner.image.read(ask.ip(), ask.len()).unwrap_or_default();
        // test rsp, rsp; nop: never zero.
        planner.replace(ask.ip(), old, &[0x48, 0x85, 0xe4, 0x66, 0x90], REASON)?;
    }
    Ok(())
}
