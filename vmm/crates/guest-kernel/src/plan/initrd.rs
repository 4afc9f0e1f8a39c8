//! Gives the pages of the initial RAM disk to the files that are unpacked from it, in place of copies.
//!
//! Where KVM emulates ring 0 it is slow to allocate a page, to copy 4 KiB and to put the page into the page
//! cache, for each page of 19 MiB. A page of the RAM disk that holds nothing but data of one file is put into
//! the page cache as it is: by the kernel's function where the tree of pages needs a new node, and else,
//! 63 times of 64, by a few stores, since nobody else knows the file yet. The memory of the RAM disk is never
//! given back then, also when a file is deleted.

use iced_x86::{Code, Instruction, Register};

use super::planner::{Planner, Reason};
use crate::asm::Asm;
use crate::bytes::low_half;
use crate::error::PlanError;

const REASON: Reason =
    Reason::fast_boot("whole pages of the initial RAM disk become pages of its files");

/// `mov rax, [rdi+0xd8]`: `file->f_mapping`, as `generic_file_llseek` reads it.
const LOAD_MAPPING: [u8; 7] = [0x48, 0x8b, 0x87, 0xd8, 0, 0, 0];
/// `GFP_KERNEL`.
const GFP_KERNEL: [u8; 4] = [0xc0, 0x0c, 0, 0];

/// `NR_FILE_PAGES`, an item of the statistics.
const FILE_PAGES: u32 = 0x13;

/// What the stub needs of the kernel.
#[derive(Clone, Copy)]
struct Places {
    initrd_start: u64,
    initrd_end: u64,
    page_offset_base: u64,
    vmemmap_base: u64,
    filemap_add_folio: u64,
    mod_page_state: u64,
    /// `kernel_write` behind its `call __fentry__`.
    rest: u64,
}

/// `kernel_write(file, buffer, count, pos)` writes the files of the RAM disk; a short write is
/// continued by its caller. The stub writes whole pages.
pub(super) fn plan(planner: &mut Planner) -> Result<(), PlanError> {
    check_layouts(planner);
    let data = [
        planner.symbol("initrd_start"),
        planner.symbol("initrd_end"),
        planner.symbol("page_offset_base"),
        planner.symbol("vmemmap_base"),
    ];
    let code = [
        planner.symbol("__filemap_add_folio"),
        planner.symbol("__mod_lruvec_page_state"),
    ];
    let (
        [
            Some(initrd_start),
            Some(initrd_end),
            Some(page_offset_base),
            Some(vmemmap_base),
        ],
        [Some(filemap_add_folio), Some(mod_page_state)],
    ) = (data, code)
    else {
        return Ok(());
    };
    planner.in_front("kernel_write", REASON, |stub, rest| {
        let places = Places {
            initrd_start,
            initrd_end,
            page_offset_base,
            vmemmap_base,
            filemap_add_folio,
            mod_page_state,
            rest,
        };
        write_pages(stub, places)
    })
}

/// The layouts that the stub relies on, told by instructions of the kernel that do the same.
fn check_layouts(planner: &mut Planner) {
    const ADD: &str = "__filemap_add_folio";
    planner.unique_insn("generic_file_llseek", &LOAD_MAPPING);
    let store = |insn: &Instruction, code: Code, at: u64| {
        insn.code() == code
            && insn.memory_base() != Register::RSP
            && insn.memory_displacement64() == at
    };
    planner.has_insn(ADD, "page.refs at 0x34", |insn| {
        insn.has_lock_prefix() && store(insn, Code::Add_rm32_r32, 0x34)
    });
    planner.has_insn(ADD, "page.mapping at 0x18", |insn| {
        store(insn, Code::Mov_rm64_r64, 0x18)
    });
    planner.has_insn(ADD, "page.index at 0x20", |insn| {
        store(insn, Code::Mov_rm64_r64, 0x20)
    });
    planner.has_insn(ADD, "mapping.nrpages at 0x80", |insn| {
        store(insn, Code::Add_rm64_r64, 0x80)
    });
    planner.has_insn(ADD, "the item of the statistics", |insn| {
        insn.code() == Code::Mov_r32_imm32
            && insn.op0_register() == Register::ESI
            && insn.immediate32() == FILE_PAGES
    });
    planner.has_insn("xas_store", "node.count at 2", |insn| {
        store(insn, Code::Mov_rm8_r8, 2)
    });
    // With `add rax, 4` before it.
    planner.has_insn("xas_descend", "node.slots at 0x28", |insn| {
        insn.code() == Code::Mov_r64_rm64
            && insn.memory_index_scale() == 8
            && insn.memory_displacement64() == 8
    });
    planner.has_insn("xas_descend", "node.shift at 0", |insn| {
        insn.code() == Code::Movzx_r32_rm8 && insn.memory_displacement64() == 0
    });
    planner.has_insn("xas_start", "mapping.xa_head at 0x10", |insn| {
        insn.code() == Code::Mov_r64_rm64 && insn.memory_displacement64() == 8
    });
}

/// RBX is the position, RBP the index of the next page, R12 the page, R13 the mapping, R14 how many
/// pages are left, R15 how many went in without the kernel's function.
///
/// Flags of a page: not reserved any more (bit 12), up to date and dirty (bits 2 and 3), so that it is
/// not dropped; locked (bit 0) while the kernel's function puts it into the page cache. It is put on no list
/// of pages to reclaim: pages of a RAM disk cannot be. The size of the file is set already: its data come
/// after it has been made that long.
fn write_pages(stub: u64, places: Places) -> Vec<u8> {
    let mut asm = Asm::at(stub);
    leave_others(&mut asm, places);
    set_up(&mut asm, places);
    add_pages(&mut asm, places);
    end(&mut asm, places);
    asm.finish()
}

/// Goes on only with whole pages of the RAM disk that become whole pages of a file.
fn leave_others(asm: &mut Asm, places: Places) {
    let (original, pages) = (asm.forward(), asm.forward());
    asm.raw(&[0x48, 0x81, 0xfa, 0, 0x10, 0, 0]) // cmp rdx, 0x1000: a whole page?
        .short(0x72, original) // jb
        .raw(&[0xf7, 0xc6, 0xff, 0x0f, 0, 0]) // test esi, 0xfff: of one page?
        .short(0x75, original) // jnz
        .raw(&[0xf7, 0x01, 0xff, 0x0f, 0, 0]) // test dword [rcx], 0xfff: to one page?
        .short(0x75, original) // jnz
        .raw(&[0x48, 0x3b, 0x34, 0x25]) // cmp rsi, [initrd_start]
        .raw(&low_half(places.initrd_start))
        .short(0x72, original) // jb
        .raw(&[0x48, 0x8d, 0x04, 0x16]) // lea rax, [rsi+rdx]
        .raw(&[0x48, 0x3b, 0x04, 0x25]) // cmp rax, [initrd_end]
        .raw(&low_half(places.initrd_end))
        .short(0x76, pages) // jbe
        .label(original)
        .jmp(places.rest)
        .label(pages);
}

fn set_up(asm: &mut Asm, places: Places) {
    asm.raw(&[0x53, 0x55]) // push rbx; push rbp
        .raw(&[0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57]) // push r12; r13; r14; r15
        .raw(&[0x50]) // push rax: room
        .raw(&[0x48, 0x89, 0xcb]) // mov rbx, rcx
        .raw(&[0x48, 0x8b, 0x29]) // mov rbp, [rcx]
        .raw(&[0x48, 0xc1, 0xed, 0x0c]) // shr rbp, 12
        .raw(&[0x48, 0x2b, 0x34, 0x25]) // sub rsi, [page_offset_base]
        .raw(&low_half(places.page_offset_base))
        .raw(&[0x48, 0xc1, 0xee, 0x06]) // shr rsi, 6: 64 bytes for each page
        .raw(&[0x48, 0x03, 0x34, 0x25]) // add rsi, [vmemmap_base]
        .raw(&low_half(places.vmemmap_base))
        .raw(&[0x49, 0x89, 0xf4]) // mov r12, rsi
        .raw(&[0x4c, 0x8b, 0xaf, 0xd8, 0, 0, 0]) // mov r13, [rdi+0xd8]
        .raw(&[0x48, 0xc1, 0xea, 0x0c]) // shr rdx, 12
        .raw(&[0x49, 0x89, 0xd6]) // mov r14, rdx
        .raw(&[0x45, 0x31, 0xff]); // xor r15d, r15d
}

/// Puts the pages into the page cache, up to the last or to the first that fails; EAX is the error, or else not
/// negative.
fn add_pages(asm: &mut Asm, places: Places) {
    let (next, added, leaf) = (asm.forward(), asm.forward(), asm.forward());
    let done = asm.forward();
    asm.short(0xeb, next); // jmp
    let by_kernel = asm.here();
    asm.raw(&[0x41, 0x80, 0x0c, 0x24, 0x01]) // or byte [r12], 1: locked
        .raw(&[0x4c, 0x89, 0xef]) // mov rdi, r13
        .raw(&[0x4c, 0x89, 0xe6]) // mov rsi, r12
        .raw(&[0x48, 0x89, 0xea]) // mov rdx, rbp
        .raw(&[0xb9])
        .raw(&GFP_KERNEL) // mov ecx, GFP_KERNEL
        .raw(&[0x49, 0x89, 0xe0]) // mov r8, rsp: where a former page's shadow goes
        .call(places.filemap_add_folio)
        .raw(&[0x41, 0x80, 0x24, 0x24, 0xfe]) // and byte [r12], 0xfe: nobody can wait for it yet
        .raw(&[0x85, 0xc0]) // test eax, eax
        .short(0x75, done) // jnz: an error
        .short(0xeb, added) // jmp
        .label(next)
        .raw(&[0x41, 0x80, 0x64, 0x24, 0x01, 0xef]) // and byte [r12+1], 0xef
        .raw(&[0x41, 0x80, 0x0c, 0x24, 0x0c]) // or byte [r12], 0x0c
        .raw(&[0x49, 0x8b, 0x45, 0x10]) // mov rax, [r13+0x10]: the root of the tree
        .raw(&[0xa8, 0x02]) // test al, 2: a node? To its address 2 is added
        .short(0x74, by_kernel) // jz
        .raw(&[0x0f, 0xb6, 0x48, 0xfe]) // movzx ecx, byte [rax-2]: its shift
        .raw(&[0x48, 0x89, 0xea, 0x48, 0xd3, 0xea]) // mov rdx, rbp; shr rdx, cl
        .raw(&[0x48, 0x83, 0xfa, 0x3f]) // cmp rdx, 0x3f
        .short(0x77, by_kernel); // ja: the tree is not high enough
    let level = asm.here();
    asm.raw(&[0x85, 0xc9]) // test ecx, ecx
        .short(0x74, leaf) // jz
        .raw(&[0x48, 0x8b, 0x44, 0xd0, 0x26]) // mov rax, [rax+rdx*8+0x26]: the slot
        .raw(&[0xa8, 0x02]) // test al, 2
        .short(0x74, by_kernel) // jz
        .raw(&[0x0f, 0xb6, 0x48, 0xfe]) // movzx ecx, byte [rax-2]
        .raw(&[0x48, 0x89, 0xea, 0x48, 0xd3, 0xea]) // mov rdx, rbp; shr rdx, cl
        .raw(&[0x83, 0xe2, 0x3f]) // and edx, 0x3f
        .short(0xeb, level) // jmp
        .label(leaf)
        .raw(&[0x48, 0x8d, 0x54, 0xd0, 0x26]) // lea rdx, [rax+rdx*8+0x26]: the slot
        .raw(&[0x48, 0x83, 0x3a, 0]) // cmp qword [rdx], 0
        .short(0x75, by_kernel) // jnz: taken
        .raw(&[0x4c, 0x89, 0x22]) // mov [rdx], r12
        .raw(&[0xfe, 0x00]) // inc byte [rax]: the node's count
        .raw(&[0x41, 0xff, 0x44, 0x24, 0x34]) // inc dword [r12+0x34]: the page's references
        .raw(&[0x4d, 0x89, 0x6c, 0x24, 0x18]) // mov [r12+0x18], r13
        .raw(&[0x49, 0x89, 0x6c, 0x24, 0x20]) // mov [r12+0x20], rbp
        .raw(&[0x49, 0xff, 0x85, 0x80, 0, 0, 0]) // inc qword [r13+0x80]: the mapping's pages
        .raw(&[0x41, 0xff, 0xc7]) // inc r15d
        .label(added)
        .raw(&[0x49, 0x83, 0xc4, 0x40]) // add r12, 0x40
        .raw(&[0x48, 0xff, 0xc5]) // inc rbp
        .raw(&[0x49, 0xff, 0xce]) // dec r14
        .short(0x75, next) // jnz
        .label(done);
}

/// Moves the position, adds to the statistics, and returns how many bytes were written; the error, if none.
fn end(asm: &mut Asm, places: Places) {
    let out = asm.forward();
    asm.raw(&[0x48, 0x98]) // cdqe
        .raw(&[0x48, 0xc1, 0xe5, 0x0c]) // shl rbp, 12
        .raw(&[0x49, 0x89, 0xee]) // mov r14, rbp
        .raw(&[0x4c, 0x2b, 0x33]) // sub r14, [rbx]
        .short(0x74, out) // jz: the error
        .raw(&[0x48, 0x89, 0x2b]) // mov [rbx], rbp
        .raw(&[0x49, 0x8d, 0x7c, 0x24, 0xc0]) // lea rdi, [r12-0x40]
        .raw(&[0xbe])
        .raw(&FILE_PAGES.to_le_bytes()) // mov esi, NR_FILE_PAGES
        .raw(&[0x44, 0x89, 0xfa]) // mov edx, r15d
        .raw(&[0xfa]) // cli
        .call(places.mod_page_state)
        .raw(&[0xfb]) // sti
        .raw(&[0x4c, 0x89, 0xf0]) // mov rax, r14: bytes
        .label(out)
        .raw(&[0x59]) // pop rcx
        .raw(&[0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c]) // pop r15; r14; r13; r12
        .raw(&[0x5d, 0x5b, 0xc3]); // pop rbp; pop rbx; ret
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::asm::listing;

    const LISTING: &str = "cmp rdx,1000h\n\
             jb short 0FFFFFFFF81010031h\n\
             test esi,0FFFh\n\
             jne short 0FFFFFFFF81010031h\n\
             test dword ptr [rcx],0FFFh\n\
             jne short 0FFFFFFFF81010031h\n\
             cmp rsi,[0FFFFFFFF83000010h]\n\
             jb short 0FFFFFFFF81010031h\n\
             lea rax,[rsi+rdx]\n\
             cmp rax,[0FFFFFFFF83000018h]\n\
             jbe short 0FFFFFFFF81010036h\n\
             jmp 0FFFFFFFF81300005h\n\
             push rbx\n\
             push rbp\n\
             push r12\n\
             push r13\n\
             push r14\n\
             push r15\n\
             push rax\n\
             mov rbx,rcx\n\
             mov rbp,[rcx]\n\
             shr rbp,0Ch\n\
             sub rsi,[0FFFFFFFF82000010h]\n\
             shr rsi,6\n\
             add rsi,[0FFFFFFFF82000018h]\n\
             mov r12,rsi\n\
             mov r13,[rdi+0D8h]\n\
             shr rdx,0Ch\n\
             mov r14,rdx\n\
             xor r15d,r15d\n\
             jmp short 0FFFFFFFF8101009Bh\n\
             or byte ptr [r12],1\n\
             mov rdi,r13\n\
             mov rsi,r12\n\
             mov rdx,rbp\n\
             mov ecx,0CC0h\n\
             mov r8,rsp\n\
             call 0FFFFFFFF81200000h\n\
             and byte ptr [r12],0FEh\n\
             test eax,eax\n\
             jne short 0FFFFFFFF8101010Fh\n\
             jmp short 0FFFFFFFF81010103h\n\
             and byte ptr [r12+1],0EFh\n\
             or byte ptr [r12],0Ch\n\
             mov rax,[r13+10h]\n\
             test al,2\n\
             je short 0FFFFFFFF81010075h\n\
             movzx ecx,byte ptr [rax-2]\n\
             mov rdx,rbp\n\
             shr rdx,cl\n\
             cmp rdx,3Fh\n\
             ja short 0FFFFFFFF81010075h\n\
             test ecx,ecx\n\
             je short 0FFFFFFFF810100DAh\n\
             mov rax,[rax+rdx*8+26h]\n\
             test al,2\n\
             je short 0FFFFFFFF81010075h\n\
             movzx ecx,byte ptr [rax-2]\n\
             mov rdx,rbp\n\
             shr rdx,cl\n\
             and edx,3Fh\n\
             jmp short 0FFFFFFFF810100BEh\n\
             lea rdx,[rax+rdx*8+26h]\n\
             cmp qword ptr [rdx],0\n\
             jne short 0FFFFFFFF81010075h\n\
             mov [rdx],r12\n\
             inc byte ptr [rax]\n\
             inc dword ptr [r12+34h]\n\
             mov [r12+18h],r13\n\
             mov [r12+20h],rbp\n\
             inc qword ptr [r13+80h]\n\
             inc r15d\n\
             add r12,40h\n\
             inc rbp\n\
             dec r14\n\
             jne short 0FFFFFFFF8101009Bh\n\
             cdqe\n\
             shl rbp,0Ch\n\
             mov r14,rbp\n\
             sub r14,[rbx]\n\
             je short 0FFFFFFFF81010137h\n\
             mov [rbx],rbp\n\
             lea rdi,[r12-40h]\n\
             mov esi,13h\n\
             mov edx,r15d\n\
             cli\n\
             call 0FFFFFFFF81210000h\n\
             sti\n\
             mov rax,r14\n\
             pop rcx\n\
             pop r15\n\
             pop r14\n\
             pop r13\n\
             pop r12\n\
             pop rbp\n\
             pop rbx\n\
             ret\n";

    #[test]
    fn stub_decodes_to_its_listing() {
        const STUB: u64 = 0xffff_ffff_8101_0000;
        let code = write_pages(
            STUB,
            Places {
                initrd_start: 0xffff_ffff_8300_0010,
                initrd_end: 0xffff_ffff_8300_0018,
                page_offset_base: 0xffff_ffff_8200_0010,
                vmemmap_base: 0xffff_ffff_8200_0018,
                filemap_add_folio: 0xffff_ffff_8120_0000,
                mod_page_state: 0xffff_ffff_8121_0000,
                rest: 0xffff_ffff_8130_0005,
            },
        );
        assert_eq!(listing(&code, STUB), LISTING);
    }
}
