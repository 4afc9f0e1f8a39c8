//! Stubs at exception entries: user-mode RDTSC and CPUID, and SYSCALL that keeps the user's level.
//!
//! Exceptions are entered with the error code, if they have one, on top of the stack, then RIP, CS,
//! RFLAGS, RSP, SS of the interrupted code, before `swapgs`: the stubs touch no per-CPU data and keep
//! every register. Interrupts are off. Their entries in 6.1 are `ASM_CLAC` (three NOPs as long as SMAP
//! is hidden), `cld`, `push -1` in place of an error code, `call error_entry`; a jump to the stub
//! takes that place and the stub ends with the same.
//! The stubs read user memory, so SMAP must be hidden from the guest, and lie outside the entry text,
//! so page-table isolation must be off (`nopti`).

use super::planner::{Planner, Reason};
use crate::asm::{Asm, near_branch};
use crate::error::PlanError;
use crate::patch::PatchSet;
use crate::ports;

/// `ASM_CLAC` as it is in the file.
const CLAC: [u8; 3] = [0x90; 3];

/// Whether the processor pushes an error code.
#[derive(Clone, Copy)]
pub(super) enum ErrorCode {
    Pushed,
    None,
}

impl ErrorCode {
    /// What the entry does between `ASM_CLAC` and `call error_entry`.
    fn prologue(self) -> &'static [u8] {
        match self {
            ErrorCode::Pushed => &[0xfc],           // cld
            ErrorCode::None => &[0xfc, 0x6a, 0xff], // cld; push -1
        }
    }
}

/// User-mode RDTSC (with CR4.TSD) and CPUID (with CPUID faulting) raise #GP; the stub executes the
/// port read of the kernel's own patch in their place and returns behind them.
pub(super) fn trap_user_instructions(planner: &mut Planner) -> Result<(), PlanError> {
    let reason = Reason {
        set: PatchSet::Determinism,
        why: "user-mode RDTSC and CPUID fault into #GP: turn them into port reads",
    };
    detour(
        planner,
        "asm_exc_general_protection",
        ErrorCode::Pushed,
        reason,
        general_protection,
    )
}

/// On some KVMs SYSCALL loads the kernel's RIP but stays at level 3, so that the first fetch
/// faults. The stub loads the user's stack again and enters the kernel where it should have been.
pub(super) fn enter_syscall(planner: &mut Planner) -> Result<(), PlanError> {
    let reason = Reason {
        set: PatchSet::HostQuirks,
        why: "SYSCALL keeps privilege level 3: continue at its entry from the page fault",
    };
    let Some(entry) = planner.symbol("entry_SYSCALL_64") else {
        return Ok(());
    };
    detour(
        planner,
        "asm_exc_page_fault",
        ErrorCode::Pushed,
        reason,
        |stub, original| page_fault(stub, original, entry),
    )
}

/// Where a stub goes on when the exception is not for it.
#[derive(Clone, Copy)]
pub(super) struct Original {
    pub(super) error_code: ErrorCode,
    /// `error_entry`.
    pub(super) error_entry: u64,
    /// Behind the replaced code.
    pub(super) rest: u64,
}

impl Original {
    pub(super) fn continue_in(self, asm: &mut Asm) {
        asm.raw(self.error_code.prologue())
            .call(self.error_entry)
            .jmp(self.rest);
    }
}

/// Makes the entry of an exception jump to the stub that `build` makes for an address.
pub(super) fn detour(
    planner: &mut Planner,
    entry_symbol: &str,
    error_code: ErrorCode,
    reason: Reason,
    build: impl Fn(u64, Original) -> Vec<u8>,
) -> Result<(), PlanError> {
    let symbols = (planner.symbol(entry_symbol), planner.symbol("error_entry"));
    let (Some(entry), Some(error_entry)) = symbols else {
        return Ok(());
    };
    let before_call = [&CLAC[..], error_code.prologue()].concat();
    let call_at = entry + before_call.len() as u64;
    let call = near_branch(0xe8, call_at, error_entry);
    let original = Original {
        error_code,
        error_entry,
        rest: call_at + call.len() as u64,
    };
    let Some(stub) = planner.stub(reason, |stub| build(stub, original))? else {
        return Ok(());
    };
    let old = [&before_call[..], &call].concat();
    let mut new = near_branch(0xe9, entry, stub).to_vec();
    new.resize(old.len(), 0xcc);
    planner.replace(entry, &old, &new, reason)
}

fn general_protection(stub: u64, original: Original) -> Vec<u8> {
    let mut asm = Asm::at(stub);
    let (not_ours, restore) = (asm.forward(), asm.forward());
    let (rdtsc, cpuid) = (asm.forward(), asm.forward());
    asm.raw(&[0xf6, 0x44, 0x24, 0x10, 0x03]) // test byte [rsp+0x10], 3: from ring 3?
        .short(0x74, not_ours) // jz
        .raw(&[0x50]) // push rax
        .raw(&[0x48, 0x8b, 0x44, 0x24, 0x10]) // mov rax, [rsp+0x10]: RIP
        .raw(&[0x48, 0xc1, 0xe8, 0x2f]) // shr rax, 47: a RIP that no user can have?
        .short(0x75, restore) // jnz
        .raw(&[0x48, 0x8b, 0x44, 0x24, 0x10]) // mov rax, [rsp+0x10]
        .raw(&[0x80, 0x38, 0x0f]) // cmp byte [rax], 0x0f
        .short(0x75, restore) // jnz: the next byte may be on a page that is not there
        .raw(&[0x80, 0x78, 0x01, 0x31]) // cmp byte [rax+1], 0x31
        .short(0x74, rdtsc) // jz
        .raw(&[0x80, 0x78, 0x01, 0xa2]) // cmp byte [rax+1], 0xa2
        .short(0x74, cpuid) // jz
        .label(restore)
        .raw(&[0x58]) // pop rax
        .label(not_ours);
    original.continue_in(&mut asm);
    for (label, port) in [(rdtsc, ports::RDTSC), (cpuid, ports::CPUID)] {
        asm.label(label)
            .raw(&[0x48, 0x83, 0x44, 0x24, 0x10, 0x02]) // add qword [rsp+0x10], 2: behind it
            .raw(&[0x58]) // pop rax
            .raw(&[0xe5, port.to_le_bytes()[0]]) // in eax, port
            .raw(&[0x48, 0x83, 0xc4, 0x08]) // add rsp, 8: the error code
            .raw(&[0x48, 0xcf]); // iretq
    }
    asm.finish()
}

fn page_fault(stub: u64, original: Original, syscall_entry: u64) -> Vec<u8> {
    // The entry lies in the top 2 GiB, so the comparison may extend the sign of 32 bits.
    let [a, b, c, d, ..] = syscall_entry.to_le_bytes();
    let mut asm = Asm::at(stub);
    let not_ours = asm.forward();
    asm.raw(&[0x48, 0x81, 0x7c, 0x24, 0x08, a, b, c, d]) // cmp qword [rsp+8], entry: RIP
        .short(0x75, not_ours) // jnz
        .raw(&[0xf6, 0x44, 0x24, 0x10, 0x03]) // test byte [rsp+0x10], 3: from ring 3?
        .short(0x74, not_ours) // jz
        .raw(&[0x48, 0x8b, 0x64, 0x24, 0x20]) // mov rsp, [rsp+0x20]: the user's stack
        .jmp(syscall_entry)
        .label(not_ours);
    original.continue_in(&mut asm);
    asm.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::asm::listing;

    const ORIGINAL: Original = Original {
        error_code: ErrorCode::Pushed,
        error_entry: 0xffff_ffff_8180_0000,
        rest: 0xffff_ffff_8170_0009,
    };
    const STUB: u64 = 0xffff_ffff_8101_0000;

    #[test]
    fn page_fault_stub_decodes_to_its_listing() {
        let code = page_fault(STUB, ORIGINAL, 0xffff_ffff_8160_0000);
        assert_eq!(
            listing(&code, STUB),
            "cmp qword ptr [rsp+8],0FFFFFFFF81600000h\n\
             jne short 0FFFFFFFF8101001Ch\n\
             test byte ptr [rsp+10h],3\n\
             je short 0FFFFFFFF8101001Ch\n\
             mov rsp,[rsp+20h]\n\
             jmp 0FFFFFFFF81600000h\n\
             cld\n\
             call 0FFFFFFFF81800000h\n\
             jmp 0FFFFFFFF81700009h\n"
        );
    }

    #[test]
    fn general_protection_stub_decodes_to_its_listing() {
        let code = general_protection(STUB, ORIGINAL);
        assert_eq!(
            listing(&code, STUB),
            "test byte ptr [rsp+10h],3\n\
             je short 0FFFFFFFF8101002Ah\n\
             push rax\n\
             mov rax,[rsp+10h]\n\
             shr rax,2Fh\n\
             jne short 0FFFFFFFF81010029h\n\
             mov rax,[rsp+10h]\n\
             cmp byte ptr [rax],0Fh\n\
             jne short 0FFFFFFFF81010029h\n\
             cmp byte ptr [rax+1],31h\n\
             je short 0FFFFFFFF81010035h\n\
             cmp byte ptr [rax+1],0A2h\n\
             je short 0FFFFFFFF81010044h\n\
             pop rax\n\
             cld\n\
             call 0FFFFFFFF81800000h\n\
             jmp 0FFFFFFFF81700009h\n\
             add qword ptr [rsp+10h],2\n\
             pop rax\n\
             in eax,0E8h\n\
             add rsp,8\n\
             iretq\n\
             add qword ptr [rsp+10h],2\n\
             pop rax\n\
             in eax,0E9h\n\
             add rsp,8\n\
             iretq\n"
        );
    }
}
