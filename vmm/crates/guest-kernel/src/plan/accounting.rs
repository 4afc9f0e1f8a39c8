//! Leaves out what accounts memory to control groups, which `cgroup_disable=memory` switches off.

use super::planner::{Planner, Reason};
use super::skips::{Skip, skip};
use crate::asm::Asm;
use crate::bytes::low_half;
use crate::error::PlanError;

const WHY: &str = "no memory is accounted to control groups";

pub(super) fn plan(planner: &mut Planner) -> Result<(), PlanError> {
    let reason = Reason::fast_boot(WHY);
    skip(planner, "memcg_slab_post_alloc_hook", Skip::Return, reason)?;
    counts_of_pages(planner)
}

/// `__mod_lruvec_page_state(page, item, by)` looks for the group of the page, and where it has none counts for
/// its node. No page has a group, and there is one node.
fn counts_of_pages(planner: &mut Planner) -> Result<(), PlanError> {
    let symbols = planner
        .symbol("node_data")
        .zip(planner.symbol("__mod_node_page_state"));
    let Some((nodes, count)) = symbols else {
        return Ok(());
    };
    let reason = Reason::fast_boot(WHY);
    planner.in_front("__mod_lruvec_page_state", reason, |stub, _| {
        count_for_node(stub, nodes, count)
    })
}

fn count_for_node(stub: u64, nodes: u64, count: u64) -> Vec<u8> {
    let mut asm = Asm::at(stub);
    asm.raw(&[0x48, 0x8b, 0x3c, 0x25]) // mov rdi, [node_data]
        .raw(&low_half(nodes))
        .raw(&[0x48, 0x63, 0xd2]) // movsxd rdx, edx
        .jmp(count);
    asm.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::asm::listing;

    #[test]
    fn stub_decodes_to_its_listing() {
        const STUB: u64 = 0xffff_ffff_8101_0000;
        let code = count_for_node(STUB, 0xffff_ffff_82c3_68e0, 0xffff_ffff_8120_0000);
        assert_eq!(
            listing(&code, STUB),
            "mov rdi,[0FFFFFFFF82C368E0h]\n\
             movsxd rdx,edx\n\
             jmp 0FFFFFFFF81200000h\n"
        );
    }
}
