//! Leaves out what nobody sees before the first program runs.
//!
//! A stub in place of a function's `call __fentry__` looks at `system_state`, which says `SYSTEM_RUNNING` from
//! just before the first program on.

use iced_x86::{Code, OpKind};

use super::planner::{Planner, Reason};
use crate::asm::{Asm, near_branch};
use crate::bytes::low_half;
use crate::error::PlanError;

/// `SYSTEM_RUNNING`.
const RUNNING: u8 = 3;
/// `-ENOENT`.
const NO_ENTRY: i32 = -2;

pub(super) fn plan(planner: &mut Planner) -> Result<(), PlanError> {
    let Some(state) = planner.symbol("system_state") else {
        return Ok(());
    };
    planner.has_insn("kernel_init", "SYSTEM_RUNNING", |insn| {
        insn.code() == Code::Mov_rm32_imm32
            && insn.op0_kind() == OpKind::Memory
            && insn.memory_displacement64() == state
            && insn.immediate32() == u32::from(RUNNING)
    });
    events(planner, state)?;
    let why = "the kernel asks for no modules before the first program runs";
    planner.in_front("__request_module", Reason::fast_boot(why), |stub, rest| {
        answer(stub, state, NO_ENTRY, &[], rest)
    })?;
    messages(planner, state)
}

/// `kobject_uevent(kobj, action)` is no more than a jump to a function with a third argument, which is zero.
fn events(planner: &mut Planner, state: u64) -> Result<(), PlanError> {
    const FUNCTION: &str = "kobject_uevent";
    /// Under which name a kernel in which it is more is counted.
    const KIND: &str = "events of devices";
    /// `xor edx, edx`.
    const NONE: [u8; 2] = [0x31, 0xd2];
    let symbols = planner
        .symbol(FUNCTION)
        .zip(planner.symbol("kobject_uevent_env"));
    let Some((addr, target)) = symbols else {
        return Ok(());
    };
    let old = [&NONE[..], &near_branch(0xe9, addr + 2, target)].concat();
    if planner.image.read(addr, old.len()) != Some(&old) {
        planner.leave_site(KIND);
        return Ok(());
    }
    let reason =
        Reason::fast_boot("no events of devices before the first program runs: nobody listens");
    let Some(stub) = planner.stub(reason, |stub| answer(stub, state, 0, &NONE, target))? else {
        return Ok(());
    };
    let new = near_branch(0xe9, addr, stub);
    planner.replace_site(KIND, addr, &old[..new.len()], &new, reason)
}

/// A stub that returns `answer` before the first program runs, and else does `first` and goes on at `rest`.
fn answer(stub: u64, state: u64, answer: i32, first: &[u8], rest: u64) -> Vec<u8> {
    let mut asm = Asm::at(stub);
    let running = asm.forward();
    until_running(&mut asm, state)
        .short(0x73, running) // jae
        .raw(&[0xb8])
        .raw(&answer.to_le_bytes()) // mov eax, answer
        .raw(&[0xc3]) // ret
        .label(running)
        .raw(first)
        .jmp(rest);
    asm.finish()
}

/// Messages above `loglevel=` (with 4: notices and less) are not kept. With `loglevel=7` all are.
fn messages(planner: &mut Planner, state: u64) -> Result<(), PlanError> {
    let Some(level) = planner.symbol("console_printk") else {
        return Ok(());
    };
    let why = "messages above loglevel= are not kept before the first program runs";
    planner.in_front("_printk", Reason::fast_boot(why), |stub, rest| {
        message(stub, rest, state, level)
    })
}

/// RDI is the message's text: with a level, it begins with 1 and its digit, or `c` for one that goes on.
fn message(stub: u64, rest: u64, state: u64, level: u64) -> Vec<u8> {
    let mut asm = Asm::at(stub);
    let (keep, digit) = (asm.forward(), asm.forward());
    until_running(&mut asm, state)
        .short(0x73, keep) // jae
        .raw(&[0x80, 0x3f, 0x01]) // cmp byte [rdi], 1
        .short(0x75, keep) // jnz
        .raw(&[0x0f, 0xb6, 0x47, 0x01]) // movzx eax, byte [rdi+1]
        .raw(&[0x3c, b'c']) // cmp al, 'c'
        .short(0x75, digit) // jnz
        .raw(&[0xb0, b'6']) // mov al, '6': as information
        .label(digit)
        .raw(&[0x83, 0xe8, b'0']) // sub eax, '0'
        .raw(&[0x3b, 0x04, 0x25]) // cmp eax, [level]
        .raw(&low_half(level))
        .short(0x7e, keep) // jle
        .raw(&[0x31, 0xc0, 0xc3]) // xor eax, eax; ret
        .label(keep)
        .jmp(rest);
    asm.finish()
}

/// `cmp dword [system_state], SYSTEM_RUNNING`.
fn until_running(asm: &mut Asm, state: u64) -> &mut Asm {
    asm.raw(&[0x83, 0x3c, 0x25])
        .raw(&low_half(state))
        .raw(&[RUNNING])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::asm::listing;

    const STUB: u64 = 0xffff_ffff_8101_0000;
    const STATE: u64 = 0xffff_ffff_82c0_0004;
    const REST: u64 = 0xffff_ffff_8120_0005;

    #[test]
    fn answer_decodes_to_its_listing() {
        assert_eq!(
            listing(&answer(STUB, STATE, -2, &[0x31, 0xd2], REST), STUB),
            "cmp dword ptr [0FFFFFFFF82C00004h],3\n\
             jae short 0FFFFFFFF81010010h\n\
             mov eax,0FFFFFFFEh\n\
             ret\n\
             xor edx,edx\n\
             jmp 0FFFFFFFF81200005h\n"
        );
    }

    #[test]
    fn message_decodes_to_its_listing() {
        let level = 0xffff_ffff_82a0_0010;
        assert_eq!(
            listing(&message(STUB, REST, STATE, level), STUB),
            "cmp dword ptr [0FFFFFFFF82C00004h],3\n\
             jae short 0FFFFFFFF81010028h\n\
             cmp byte ptr [rdi],1\n\
             jne short 0FFFFFFFF81010028h\n\
             movzx eax,byte ptr [rdi+1]\n\
             cmp al,63h\n\
             jne short 0FFFFFFFF81010019h\n\
             mov al,36h\n\
             sub eax,30h\n\
             cmp eax,[0FFFFFFFF82A00010h]\n\
             jle short 0FFFFFFFF81010028h\n\
             xor eax,eax\n\
             ret\n\
             jmp 0FFFFFFFF81200005h\n"
        );
    }
}
