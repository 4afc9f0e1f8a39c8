//! Gives the pages of the initial RAM disk to the files that are unpacked from it, in place of copies.
//!
//! Where KVM emulates ring 0 it is slow to allocate a page, to copy 4 KiB and to put the page into the page
//! cache, for each page of 19 MiB. A page of the RAM disk that holds nothing but data of one file is put into
//! the page cache as it is. The memory of the RAM disk is never given back then, also when a file is deleted.

use super::planner::{Planner, Reason};
use crate::asm::{Asm, near_branch};
use crate::error::PlanError;
use crate::patch::PatchSet;

const REASON: Reason = Reason {
    set: PatchSet::FastBoot,
    why: "whole pages of the initial RAM disk become pages of its files",
};

/// `mov rax, [rdi+0xd8]`: `file->f_mapping`, as `generic_file_llseek` reads it.
const LOAD_MAPPING: [u8; 7] = [0x48, 0x8b, 0x87, 0xd8, 0, 0, 0];
/// `GFP_KERNEL`.
const GFP_KERNEL: [u8; 4] = [0xc0, 0x0c, 0, 0];

/// What the stub needs of the kernel.
#[derive(Clone, Copy)]
struct Places {
    initrd_start: u64,
    initrd_end: u64,
    page_offset_base: u64,
    vmemmap_base: u64,
    filemap_add_folio: u64,
    /// `kernel_write` behind its `call __fentry__`.
    rest: u64,
}

/// `kernel_write(file, buffer, count, pos)` writes the files of the RAM disk; a short write is
/// continued by its caller. The stub writes one page.
pub(super) fn plan(planner: &mut Planner) -> Result<(), PlanError> {
    // The layout of struct file.
    planner.unique_insn("generic_file_llseek", &LOAD_MAPPING);
    let data = [
        planner.symbol("initrd_start"),
        planner.symbol("initrd_end"),
        planner.symbol("page_offset_base"),
        planner.symbol("vmemmap_base"),
    ];
    let code = planner.symbol("__filemap_add_folio");
    let site = planner.fentry_site("kernel_write");
    let (
        [
            Some(initrd_start),
            Some(initrd_end),
            Some(page_offset_base),
            Some(vmemmap_base),
        ],
        Some(filemap_add_folio),
        Some((addr, old)),
    ) = (data, code, site)
    else {
        return Ok(());
    };
    let places = Places {
        initrd_start,
        initrd_end,
        page_offset_base,
        vmemmap_base,
        filemap_add_folio,
        rest: addr + old.len() as u64,
    };
    match planner.stub(REASON, |stub| write_page(stub, places))? {
        Some(stub) => planner.replace(addr, &old, &near_branch(0xe9, addr, stub), REASON),
        None => Ok(()),
    }
}

/// The low half of an address in the top 2 GiB, which an instruction extends by its sign.
fn low(addr: u64) -> [u8; 4] {
    let [a, b, c, d, ..] = addr.to_le_bytes();
    [a, b, c, d]
}

/// Flags of a page: not reserved any more (bit 12), up to date and dirty (bits 2 and 3), so that it is
/// not dropped; locked (bit 0) while it is put into the page cache. It is put on no list of pages to reclaim:
/// pages of a RAM disk cannot be. The size of the file is set already: its data come after it has been made
/// that long.
fn write_page(stub: u64, places: Places) -> Vec<u8> {
    let mut asm = Asm::at(stub);
    let (original, page, failed) = (asm.forward(), asm.forward(), asm.forward());
    asm.raw(&[0x48, 0x81, 0xfa, 0, 0x10, 0, 0]) // cmp rdx, 0x1000: a whole page?
        .short(0x72, original) // jb
        .raw(&[0xf7, 0xc6, 0xff, 0x0f, 0, 0]) // test esi, 0xfff: of one page?
        .short(0x75, original) // jnz
        .raw(&[0xf7, 0x01, 0xff, 0x0f, 0, 0]) // test dword [rcx], 0xfff: to one page?
        .short(0x75, original) // jnz
        .raw(&[0x48, 0x3b, 0x34, 0x25]) // cmp rsi, [initrd_start]
        .raw(&low(places.initrd_start))
        .short(0x72, original) // jb
        .raw(&[0x48, 0x8d, 0x04, 0x16]) // lea rax, [rsi+rdx]
        .raw(&[0x48, 0x3b, 0x04, 0x25]) // cmp rax, [initrd_end]
        .raw(&low(places.initrd_end))
        .short(0x76, page) // jbe
        .label(original)
        .jmp(places.rest)
        .label(page)
        .raw(&[0x53, 0x41, 0x54]) // push rbx; push r12
        .raw(&[0x48, 0x83, 0xec, 0x08]) // sub rsp, 8
        .raw(&[0x48, 0x89, 0xcb]) // mov rbx, rcx: the position
        .raw(&[0x48, 0x2b, 0x34, 0x25]) // sub rsi, [page_offset_base]
        .raw(&low(places.page_offset_base))
        .raw(&[0x48, 0xc1, 0xee, 0x06]) // shr rsi, 6: 64 bytes for each page
        .raw(&[0x48, 0x03, 0x34, 0x25]) // add rsi, [vmemmap_base]
        .raw(&low(places.vmemmap_base))
        .raw(&[0x49, 0x89, 0xf4]) // mov r12, rsi: the page
        .raw(&[0x80, 0x66, 0x01, 0xef]) // and byte [rsi+1], 0xef
        .raw(&[0x80, 0x0e, 0x0d]) // or byte [rsi], 0x0d
        .raw(&[0x48, 0x8b, 0xbf, 0xd8, 0, 0, 0]) // mov rdi, [rdi+0xd8]: the mapping
        .raw(&[0x48, 0x8b, 0x13]) // mov rdx, [rbx]
        .raw(&[0x48, 0xc1, 0xea, 0x0c]) // shr rdx, 12: the index
        .raw(&[0xb9])
        .raw(&GFP_KERNEL) // mov ecx, GFP_KERNEL
        .raw(&[0x49, 0x89, 0xe0]) // mov r8, rsp: where a former page's shadow goes
        .call(places.filemap_add_folio)
        .raw(&[0x85, 0xc0]) // test eax, eax
        .short(0x75, failed) // jnz
        .raw(&[0x41, 0x80, 0x24, 0x24, 0xfe]) // and byte [r12], 0xfe: nobody can wait for it yet
        .raw(&[0x48, 0x81, 0x03, 0, 0x10, 0, 0]) // add qword [rbx], 0x1000
        .raw(&[0xb8, 0, 0x10, 0, 0]) // mov eax, 0x1000
        .label(failed)
        .raw(&[0x48, 0x98]) // cdqe
        .raw(&[0x48, 0x83, 0xc4, 0x08]) // add rsp, 8
        .raw(&[0x41, 0x5c, 0x5b, 0xc3]); // pop r12; pop rbx; ret
    asm.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::asm::listing;

    #[test]
    fn stub_decodes_to_its_listing() {
        const STUB: u64 = 0xffff_ffff_8101_0000;
        let code = write_page(
            STUB,
            Places {
                initrd_start: 0xffff_ffff_8300_0010,
                initrd_end: 0xffff_ffff_8300_0018,
                page_offset_base: 0xffff_ffff_8200_0010,
                vmemmap_base: 0xffff_ffff_8200_0018,
                filemap_add_folio: 0xffff_ffff_8120_0000,
                rest: 0xffff_ffff_8130_0005,
            },
        );
        assert_eq!(
            listing(&code, STUB),
            "cmp rdx,1000h\n\
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
             push r12\n\
             sub rsp,8\n\
             mov rbx,rcx\n\
             sub rsi,[0FFFFFFFF82000010h]\n\
             shr rsi,6\n\
             add rsi,[0FFFFFFFF82000018h]\n\
             mov r12,rsi\n\
             and byte ptr [rsi+1],0EFh\n\
             or byte ptr [rsi],0Dh\n\
             mov rdi,[rdi+0D8h]\n\
             mov rdx,[rbx]\n\
             shr rdx,0Ch\n\
             mov ecx,0CC0h\n\
             mov r8,rsp\n\
             call 0FFFFFFFF81200000h\n\
             test eax,eax\n\
             jne short 0FFFFFFFF8101008Eh\n\
             and byte ptr [r12],0FEh\n\
             add qword ptr [rbx],1000h\n\
             mov eax,1000h\n\
             cdqe\n\
             add rsp,8\n\
             pop r12\n\
             pop rbx\n\
             ret\n"
        );
    }
}
