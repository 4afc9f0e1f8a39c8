//! Sets up the descriptions of memory's pages with fewer instructions.
//!
//! The kernel makes one of 64 bytes for each page, by a call each, and asks for each whether its set-up is
//! put off. Here the first two of each block of 512 pages are made by the kernel, and a loop makes the
//! others like the second: they differ in nothing but the list head within, which points to itself.
//! Their count is zero here, and 1 in the kernel's: what that is for says [`super::free_memory`].

use super::planner::{Planner, Reason};
use crate::asm::{Asm, near_branch};
use crate::error::PlanError;

const REASON: Reason = Reason::fast_boot("descriptions of pages are copied within a block");
/// Under which name a kernel whose loop stays is counted.
const KIND: &str = "descriptions of pages";
const FUNCTION: &str = "memmap_init_range";
const MAKE_ONE: &str = "__init_single_page";
/// `mov [rsp], rdi` before the call: the description.
const BEFORE: [u8; 4] = [0x48, 0x89, 0x3c, 0x24];
/// Behind it: `cmp r15d, 1` (when: 0 at start), `mov rdi, [rsp]`, `lea rdx, [rbx+1]` (the page's number).
const BEHIND: [u8; 12] = [
    0x41, 0x83, 0xff, 0x01, 0x48, 0x8b, 0x3c, 0x24, 0x48, 0x8d, 0x53, 0x01,
];
/// `add rbp, rcx`: the number behind the last page.
const END: [u8; 3] = [0x48, 0x01, 0xcd];
/// What `__init_single_page` writes: a count of 1 at 0x34, -1 at 0x30, the list head at 8.
const WRITES: [&[u8]; 3] = [
    &[0xc7, 0x47, 0x34, 1, 0, 0, 0],
    &[0xc7, 0x47, 0x30, 0xff, 0xff, 0xff, 0xff],
    &[0x48, 0x89, 0x47, 0x08],
];

/// True where all descriptions have a count of zero at start.
pub(super) fn plan(planner: &mut Planner) -> Result<bool, PlanError> {
    nothing_put_off(planner)?;
    blocks(planner)
}

/// With more than 128 MiB the kernel leaves a part to threads that run before the first program: no gain
/// where there is one processor.
fn nothing_put_off(planner: &mut Planner) -> Result<(), PlanError> {
    let reason = Reason::fast_boot("the set-up of no page is put off");
    planner.replace_insn(
        FUNCTION,
        &[0x48, 0x81, 0xfa, 0, 0x80, 0, 0], // cmp rdx, 32768
        &[0x48, 0x81, 0xfa, 0xff, 0xff, 0xff, 0x7f],
        reason,
    )?;
    planner.answer_calls("memblock_free_pages", "early_page_uninitialised", 0, reason)
}

fn blocks(planner: &mut Planner) -> Result<bool, PlanError> {
    // In some builds it has another name, and other arguments: the kernel's own loop stays there.
    let Some(make_one) = planner.image.symbols().unique(MAKE_ONE) else {
        planner.leave_site(KIND);
        return Ok(false);
    };
    let found = planner.calls(FUNCTION, MAKE_ONE);
    let [(call, old)] = found[..] else {
        planner.miss_table(FUNCTION, format!("calls {MAKE_ONE} {} times", found.len()));
        return Ok(false);
    };
    let around = [&BEFORE[..], &old, &BEHIND].concat();
    let start = call - BEFORE.len() as u64;
    if planner.image.read(start, around.len()) != Some(&around) {
        planner.miss_table(FUNCTION, format!("calls {MAKE_ONE} with other registers"));
        return Ok(false);
    }
    planner.unique_insn(FUNCTION, &END);
    for write in WRITES {
        planner.unique_insn(MAKE_ONE, write);
    }
    let Some(stub) = planner.stub(REASON, |stub| make_block(stub, make_one))? else {
        return Ok(false);
    };
    planner.replace(call, &old, &near_branch(0xe8, call, stub), REASON)?;
    Ok(true)
}

/// Makes one description, and all that follow it up to the end of its block or of the range, unless its
/// page is the first of a block: the caller notes the block's kind then. All get a count of zero. RBX becomes
/// the number of the last page that was made.
fn make_block(stub: u64, make_one: u64) -> Vec<u8> {
    let mut asm = Asm::at(stub);
    let (done, bounded) = (asm.forward(), asm.forward());
    asm.call(make_one)
        .raw(&[0x45, 0x85, 0xff]) // test r15d, r15d: at start?
        .short(0x75, done) // jnz
        .raw(&[0x48, 0x8b, 0x7c, 0x24, 0x08]) // mov rdi, [rsp+8]: the description
        .raw(&[0xc7, 0x47, 0x34, 0, 0, 0, 0]) // mov dword [rdi+0x34], 0
        .raw(&[0xf7, 0xc3, 0xff, 0x01, 0, 0]) // test ebx, 511: the first of a block?
        .short(0x74, done) // jz
        .raw(&[0x49, 0x89, 0xd9]) // mov r9, rbx
        .raw(&[0x49, 0x81, 0xc9, 0xff, 0x01, 0, 0]) // or r9, 511
        .raw(&[0x49, 0xff, 0xc1]) // inc r9: behind the block
        .raw(&[0x49, 0x39, 0xe9]) // cmp r9, rbp
        .short(0x76, bounded) // jbe
        .raw(&[0x49, 0x89, 0xe9]) // mov r9, rbp: behind the range
        .label(bounded)
        .raw(&[0x48, 0x8b, 0x17]) // mov rdx, [rdi]: flags
        .raw(&[0x4c, 0x8b, 0x47, 0x30]) // mov r8, [rdi+0x30]: counts
        .raw(&[0x31, 0xc9]); // xor ecx, ecx
    let another = asm.here();
    asm.raw(&[0x48, 0x8d, 0x43, 0x01]) // lea rax, [rbx+1]
        .raw(&[0x4c, 0x39, 0xc8]) // cmp rax, r9
        .short(0x73, done) // jae
        .raw(&[0x48, 0x89, 0xc3]) // mov rbx, rax
        .raw(&[0x48, 0x83, 0xc7, 0x40]) // add rdi, 0x40
        .raw(&[0x48, 0x8d, 0x47, 0x08]) // lea rax, [rdi+8]
        .raw(&[0x48, 0x89, 0x17]) // mov [rdi], rdx
        .raw(&[0x48, 0x89, 0x47, 0x08]) // mov [rdi+8], rax
        .raw(&[0x48, 0x89, 0x47, 0x10]) // mov [rdi+0x10], rax
        .raw(&[0x48, 0x89, 0x4f, 0x18]) // mov [rdi+0x18], rcx
        .raw(&[0x48, 0x89, 0x4f, 0x20]) // mov [rdi+0x20], rcx
        .raw(&[0x48, 0x89, 0x4f, 0x28]) // mov [rdi+0x28], rcx
        .raw(&[0x4c, 0x89, 0x47, 0x30]) // mov [rdi+0x30], r8
        .raw(&[0x48, 0x89, 0x4f, 0x38]) // mov [rdi+0x38], rcx
        .short(0xeb, another) // jmp
        .label(done)
        .raw(&[0xc3]); // ret
    asm.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::asm::listing;

    #[test]
    fn stub_decodes_to_its_listing() {
        const STUB: u64 = 0xffff_ffff_8101_0000;
        let code = make_block(STUB, 0xffff_ffff_8120_0000);
        assert_eq!(
            listing(&code, STUB),
            "call 0FFFFFFFF81200000h\n\
             test r15d,r15d\n\
             jne short 0FFFFFFFF81010071h\n\
             mov rdi,[rsp+8]\n\
             mov dword ptr [rdi+34h],0\n\
             test ebx,1FFh\n\
             je short 0FFFFFFFF81010071h\n\
             mov r9,rbx\n\
             or r9,1FFh\n\
             inc r9\n\
             cmp r9,rbp\n\
             jbe short 0FFFFFFFF81010033h\n\
             mov r9,rbp\n\
             mov rdx,[rdi]\n\
             mov r8,[rdi+30h]\n\
             xor ecx,ecx\n\
             lea rax,[rbx+1]\n\
             cmp rax,r9\n\
             jae short 0FFFFFFFF81010071h\n\
             mov rbx,rax\n\
             add rdi,40h\n\
             lea rax,[rdi+8]\n\
             mov [rdi],rdx\n\
             mov [rdi+8],rax\n\
             mov [rdi+10h],rax\n\
             mov [rdi+18h],rcx\n\
             mov [rdi+20h],rcx\n\
             mov [rdi+28h],rcx\n\
             mov [rdi+30h],r8\n\
             mov [rdi+38h],rcx\n\
             jmp short 0FFFFFFFF8101003Ch\n\
             ret\n"
        );
    }
}
