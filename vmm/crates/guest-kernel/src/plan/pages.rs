//! Clearing and copying a page by one exit instead of 512 emulated stores.

use super::planner::{Planner, Reason};
use crate::error::PlanError;
use crate::patch::PatchSet;
use crate::ports;

/// `out port, al; ret`.
const fn by_port(port: u16) -> [u8; 3] {
    assert!(port < 0x100);
    [0xe6, port.to_le_bytes()[0], 0xc3]
}

const CLEAR: &str = "clear_page";
const COPY: &str = "copy_page";

pub(super) fn plan(planner: &mut Planner) -> Result<(), PlanError> {
    let clear = Reason {
        set: PatchSet::FastBoot,
        why: "the VMM clears the page",
    };
    // The kernel chooses among them by processor features.
    for function in ["clear_page_orig", "clear_page_rep", "clear_page_erms"] {
        if let Some(addr) = planner.symbol(function) {
            first_bytes(planner, CLEAR, addr, by_port(ports::CLEAR_PAGE), clear)?;
        }
    }
    let copy = Reason {
        set: PatchSet::FastBoot,
        why: "the VMM copies the page",
    };
    if let Some(addr) = planner.symbol("copy_page_regs") {
        first_bytes(planner, COPY, addr, by_port(ports::COPY_PAGE), copy)?;
    }
    if let Some(addr) = planner.symbol("copy_page") {
        // A short jump to copy_page_regs, which becomes a NOP if the processor has fast strings;
        // behind it `mov ecx, 512; rep movsq`.
        let known = [0xeb, 0, 0xb9, 0, 2, 0, 0, 0xf3, 0x48, 0xa5];
        let found = planner.image.read(addr, known.len()).unwrap_or_default();
        if found.len() != known.len() || found[0] != known[0] || found[2..] != known[2..] {
            planner.miss_table(
                "copy_page",
                format!("is not of the known form: {found:02x?}"),
            );
            return Ok(());
        }
        first_bytes(planner, COPY, addr + 2, by_port(ports::COPY_PAGE), copy)?;
    }
    Ok(())
}

fn first_bytes(
    planner: &mut Planner,
    kind: &'static str,
    addr: u64,
    new: [u8; 3],
    reason: Reason,
) -> Result<(), PlanError> {
    let old = planner
        .image
        .read(addr, new.len())
        .unwrap_or_default()
        .to_vec();
    planner.replace_site(kind, addr, &old, &new, reason)
}
