//! Gives memory to the page allocator at start.
//!
//! The kernel takes the count of each free page from 1 to 0, and then looks at each as at one that was in use.
//! Here the counts are 0 from the beginning ([`super::memory_map`]) and blocks are handed over as they are; the
//! fewer pages that are reserved get their count of 1 when they are marked.

use iced_x86::{Code, OpKind};

use super::planner::{Planner, Reason};
use crate::asm::{Asm, near_branch};
use crate::bytes::low_half;
use crate::error::PlanError;

/// Bit of a page's flags: reserved.
const RESERVED_BIT: u8 = 12;
/// What `__free_one_page` does with its last two arguments: keeps them, compares the kind of pages with 4
/// (isolated), and looks for the flag 2 (to the list's tail).
const FREE_ONE_ARGUMENTS: [&[u8]; 4] = [
    &[0x44, 0x89, 0x44, 0x24, 0x10], // mov [rsp+0x10], r8d
    &[0x44, 0x89, 0x4c, 0x24, 0x14], // mov [rsp+0x14], r9d
    &[0x83, 0x7c, 0x24, 0x10, 0x04], // cmp dword [rsp+0x10], 4
    &[0xf6, 0x44, 0x24, 0x14, 0x02], // test byte [rsp+0x14], 2
];

/// `counts_are_zero`: of all pages at start.
pub(super) fn plan(planner: &mut Planner, counts_are_zero: bool) -> Result<(), PlanError> {
    reserved_pages(planner)?;
    if counts_are_zero {
        free_pages(planner)?;
    }
    Ok(())
}

/// What is reserved lies in memory, and its pages are described: what is left to do is to mark them, and to
/// count them as used.
fn reserved_pages(planner: &mut Planner) -> Result<(), PlanError> {
    const FUNCTION: &str = "reserve_bootmem_region";
    let reason = Reason::fast_boot("pages that are reserved at start are marked in a loop");
    planner.has_insn(FUNCTION, "the bit of reserved pages", |insn| {
        insn.code() == Code::Bts_rm64_imm8
            && insn.op0_kind() == OpKind::Memory
            && insn.immediate8() == RESERVED_BIT
    });
    let symbols = planner.symbol(FUNCTION).zip(planner.symbol("vmemmap_base"));
    let Some((addr, descriptions)) = symbols else {
        return Ok(());
    };
    let Some(stub) = planner.stub(reason, |stub| reserve(stub, descriptions))? else {
        return Ok(());
    };
    let new = near_branch(0xe9, addr, stub);
    let old = planner
        .image
        .read(addr, new.len())
        .unwrap_or_default()
        .to_vec();
    planner.replace(addr, &old, &new, reason)
}

/// Marks the pages of the memory from RDI to RSI as reserved. `descriptions` has the address of the first
/// description.
fn reserve(stub: u64, descriptions: u64) -> Vec<u8> {
    let mut asm = Asm::at(stub);
    let done = asm.forward();
    asm.raw(&[0x48, 0xc1, 0xef, 0x0c]) // shr rdi, 12
        .raw(&[0x48, 0x81, 0xc6, 0xff, 0x0f, 0, 0]) // add rsi, 4095
        .raw(&[0x48, 0xc1, 0xee, 0x0c]) // shr rsi, 12
        .raw(&[0x48, 0x29, 0xfe]) // sub rsi, rdi: pages
        .short(0x76, done) // jbe
        .raw(&[0x48, 0xc1, 0xe7, 0x06]) // shl rdi, 6
        .raw(&[0x48, 0x03, 0x3c, 0x25]) // add rdi, [descriptions]
        .raw(&low_half(descriptions));
    let another = asm.here();
    asm.raw(&[0x80, 0x4f, 0x01, 1 << (RESERVED_BIT - 8)]) // or byte [rdi+1], reserved
        .raw(&[0xc7, 0x47, 0x34, 1, 0, 0, 0]) // mov dword [rdi+0x34], 1
        .raw(&[0x48, 0x83, 0xc7, 0x40]) // add rdi, 0x40
        .raw(&[0xff, 0xce]) // dec esi
        .short(0x75, another) // jnz
        .label(done)
        .raw(&[0xc3]); // ret
    asm.finish()
}

/// Blocks of two pages and more that are free at start go to the page allocator's function for one block: there
/// is no other processor to keep away, and nothing of a use before to be looked for.
fn free_pages(planner: &mut Planner) -> Result<(), PlanError> {
    const FUNCTION: &str = "memblock_free_pages";
    const FREE_ONE: &str = "__free_one_page";
    /// Under which name a kernel in which they go the long way is counted.
    const KIND: &str = "pages that are free at start";
    let nodes = planner.symbol("node_data");
    let Some((nodes, free_one)) = nodes.zip(planner.image.symbols().unique(FREE_ONE)) else {
        planner.leave_site(KIND);
        return Ok(());
    };
    let is_known = planner
        .function("__free_pages_core")
        .is_some_and(|(_, code)| contains(code, &managed(nodes)))
        && planner
            .function(FREE_ONE)
            .is_some_and(|(_, code)| FREE_ONE_ARGUMENTS.iter().all(|part| contains(code, part)));
    if !is_known {
        planner.leave_site(KIND);
        return Ok(());
    }
    let reason = Reason::fast_boot("free pages are not looked at one by one");
    planner.in_front(FUNCTION, reason, |stub, rest| {
        free_block(stub, nodes, free_one, rest)
    })
}

fn contains(code: &[u8], part: &[u8]) -> bool {
    code.windows(part.len()).any(|window| window == part)
}

/// How the kernel counts R9 pages, the first of which R10 describes, to their zone.
fn managed(nodes: u64) -> Vec<u8> {
    let node: &[u8] = &[
        0x49, 0x8b, 0x02, // mov rax, [r10]: flags
        0x48, 0x89, 0xc2, // mov rdx, rax
        0x48, 0xc1, 0xe8, 0x33, // shr rax, 51
        0x83, 0xe0, 0x07, // and eax, 7: the zone's number
        0x48, 0xc1, 0xea, 0x36, // shr rdx, 54: the node's number
        0x48, 0x8d, 0x04, 0x40, // lea rax, [rax+rax*2]
        0x48, 0x8b, 0x14, 0xd5, // mov rdx, [node_data+rdx*8]
    ];
    let zone: &[u8] = &[
        0x48, 0xc1, 0xe0, 0x09, // shl rax, 9: 1536 bytes for each zone
        0xf0, 0x4c, 0x01, 0x8c, 0x02, 0x88, 0, 0, 0, // lock add [rdx+rax+0x88], r9
        0xba, 0x06, 0, 0, 0, // mov edx, 6: to the tail of the list, unpoisoned
    ];
    [node, &low_half(nodes), zone].concat()
}

/// Frees the block of 1 << EDX pages that RDI describes and whose first has the number RSI; one page alone goes
/// the kernel's way.
fn free_block(stub: u64, nodes: u64, free_one: u64, rest: u64) -> Vec<u8> {
    let mut asm = Asm::at(stub);
    let block = asm.forward();
    asm.raw(&[0x85, 0xd2]) // test edx, edx
        .short(0x75, block) // jnz
        .jmp(rest)
        .label(block)
        .raw(&[0x48, 0x8b, 0x07]) // mov rax, [rdi]: flags
        .raw(&[0x48, 0xc1, 0xe8, 0x33]) // shr rax, 51
        .raw(&[0x83, 0xe0, 0x07]) // and eax, 7
        .raw(&[0x48, 0x8d, 0x04, 0x40]) // lea rax, [rax+rax*2]
        .raw(&[0x48, 0xc1, 0xe0, 0x09]) // shl rax, 9
        .raw(&[0x48, 0x03, 0x04, 0x25]) // add rax, [node_data]: of the one node
        .raw(&low_half(nodes))
        .raw(&[0x89, 0xd1]) // mov ecx, edx: order
        .raw(&[0xba, 1, 0, 0, 0]) // mov edx, 1
        .raw(&[0x48, 0xd3, 0xe2]) // shl rdx, cl
        .raw(&[0x48, 0x01, 0x90, 0x88, 0, 0, 0]) // add [rax+0x88], rdx
        .raw(&[0x48, 0x89, 0xc2]) // mov rdx, rax: zone
        .raw(&[0x41, 0xb8, 1, 0, 0, 0]) // mov r8d, 1: movable
        .raw(&[0x41, 0xb9, 6, 0, 0, 0]) // mov r9d, 6: to the tail of the list, unpoisoned
        .jmp(free_one);
    asm.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::asm::listing;

    const STUB: u64 = 0xffff_ffff_8101_0000;

    #[test]
    fn reserve_decodes_to_its_listing() {
        assert_eq!(
            listing(&reserve(STUB, 0xffff_ffff_8239_8470), STUB),
            "shr rdi,0Ch\n\
             add rsi,0FFFh\n\
             shr rsi,0Ch\n\
             sub rsi,rdi\n\
             jbe short 0FFFFFFFF81010033h\n\
             shl rdi,6\n\
             add rdi,[0FFFFFFFF82398470h]\n\
             or byte ptr [rdi+1],10h\n\
             mov dword ptr [rdi+34h],1\n\
             add rdi,40h\n\
             dec esi\n\
             jne short 0FFFFFFFF81010020h\n\
             ret\n"
        );
    }

    #[test]
    fn free_block_decodes_to_its_listing() {
        let (nodes, free_one) = (0xffff_ffff_82c3_68e0, 0xffff_ffff_8120_0000);
        assert_eq!(
            listing(&free_block(STUB, nodes, free_one, STUB + 0x1000), STUB),
            "test edx,edx\n\
             jne short 0FFFFFFFF81010009h\n\
             jmp 0FFFFFFFF81011000h\n\
             mov rax,[rdi]\n\
             shr rax,33h\n\
             and eax,7\n\
             lea rax,[rax+rax*2]\n\
             shl rax,9\n\
             add rax,[0FFFFFFFF82C368E0h]\n\
             mov ecx,edx\n\
             mov edx,1\n\
             shl rdx,cl\n\
             add [rax+88h],rdx\n\
             mov rdx,rax\n\
             mov r8d,1\n\
             mov r9d,6\n\
             jmp 0FFFFFFFF81200000h\n"
        );
    }

    #[test]
    fn the_kernels_own_count_decodes_to_its_listing() {
        assert_eq!(
            listing(&managed(0xffff_ffff_82c3_68e0), STUB),
            "mov rax,[r10]\n\
             mov rdx,rax\n\
             shr rax,33h\n\
             and eax,7\n\
             shr rdx,36h\n\
             lea rax,[rax+rax*2]\n\
             mov rdx,[rdx*8-7D3C9720h]\n\
             shl rax,9\n\
             lock add [rdx+rax+88h],r9\n\
             mov edx,6\n"
        );
    }
}
