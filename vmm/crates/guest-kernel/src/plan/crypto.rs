//! Registers ciphers as a kernel without `CONFIG_CRYPTO_MANAGER` does: they count as tested.
//!
//! With it, also where `cryptomgr.notests` takes the tests out, a thread is made for each cipher to say so.
//! Instances of templates, such as `hmac(sha256)`, still have their threads: these tell who waits for them.

use iced_x86::{Code, Instruction, OpKind, Register};

use super::planner::{Planner, Reason};
use crate::asm::{Asm, near_branch};
use crate::bytes::low_half;
use crate::error::PlanError;

const REASON: Reason = Reason::fast_boot("ciphers count as tested: no thread for each");
/// Under which name a kernel that is left as it is is counted.
const KIND: &str = "tests of ciphers";
const FUNCTION: &str = "__crypto_register_alg";
/// What prepares a test: `mov esi, r12d`; `lea rdi, [rbp+0x38]` (the cipher's name).
const PREPARES: [u8; 7] = [0x44, 0x89, 0xe6, 0x48, 0x8d, 0x7d, 0x38];
/// Behind it: `xor edx, edx`; `or esi, CRYPTO_ALG_TESTED`; a call of `crypto_larval_alloc`.
const ALLOCATES: [u8; 9] = [0x31, 0xd2, 0x81, 0xce, 0, 4, 0, 0, 0xe8];

/// The function goes on where the cipher (in RBP) is put into the list, with no test (in RBX) to be put there
/// too. Builds in which other registers hold these are left alone.
pub(super) fn plan(planner: &mut Planner) -> Result<(), PlanError> {
    let Some(list) = planner.symbol("crypto_alg_list") else {
        return Ok(());
    };
    let insns = planner.insns(FUNCTION, |_| true);
    let known = [&PREPARES[..], &ALLOCATES].concat();
    let prepares = insns
        .iter()
        .position(|insn| planner.image.read(insn.ip(), known.len()) == Some(&known));
    let (Some(prepares), [(add, _), ..]) =
        (prepares, &planner.calls(FUNCTION, "__list_add_valid")[..])
    else {
        planner.leave_site(KIND);
        return Ok(());
    };
    // Between the two the arguments are made.
    let arguments: Vec<_> = insns[prepares..]
        .iter()
        .take_while(|insn| insn.ip() < *add)
        .collect();
    let moves = |insn: &Instruction, to, from| {
        insn.code() == Code::Mov_rm64_r64
            && insn.op0_kind() == OpKind::Register
            && (insn.op0_register(), insn.op1_register()) == (to, from)
    };
    let as_known = arguments
        .iter()
        .any(|insn| moves(insn, Register::RDX, Register::R12))
        && arguments
            .iter()
            .any(|insn| moves(insn, Register::RDI, Register::RBP))
        && arguments.iter().any(|insn| {
            insn.op0_register() == Register::R12
                && insn.is_ip_rel_memory_operand()
                && insn.memory_displacement64() == list
        });
    if !as_known {
        planner.leave_site(KIND);
        return Ok(());
    }
    let start = insns[prepares].ip();
    let Some(stub) = planner.stub(REASON, |stub| register(stub, list, *add, start))? else {
        return Ok(());
    };
    let mut new = near_branch(0xe9, start, stub).to_vec();
    new.resize(PREPARES.len(), 0xcc);
    planner.replace_site(KIND, start, &PREPARES, &new, REASON)
}

/// Goes on at `add` for a cipher, and for an instance behind [`PREPARES`], which lies at `start`.
fn register(stub: u64, list: u64, add: u64, start: u64) -> Vec<u8> {
    let mut asm = Asm::at(stub);
    let instance = asm.forward();
    asm.raw(&[0xf6, 0x45, 0x21, 0x08]) // test byte [rbp+0x21], 8: CRYPTO_ALG_INSTANCE?
        .short(0x75, instance) // jnz
        .raw(&[0x31, 0xdb]) // xor ebx, ebx
        .raw(&[0x48, 0xc7, 0xc6]) // mov rsi, list
        .raw(&low_half(list))
        .raw(&[0x48, 0x89, 0xef]) // mov rdi, rbp
        .raw(&[0x4c, 0x8b, 0x24, 0x25]) // mov r12, [list]
        .raw(&low_half(list))
        .raw(&[0x4c, 0x89, 0xe2]) // mov rdx, r12
        .jmp(add)
        .label(instance)
        .raw(&PREPARES)
        .jmp(start + PREPARES.len() as u64);
    asm.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::asm::listing;

    #[test]
    fn stub_decodes_to_its_listing() {
        const STUB: u64 = 0xffff_ffff_8101_0000;
        let list = 0xffff_ffff_82b0_0010;
        let code = register(STUB, list, 0xffff_ffff_8120_0040, 0xffff_ffff_8120_0000);
        assert_eq!(
            listing(&code, STUB),
            "test byte ptr [rbp+21h],8\n\
             jne short 0FFFFFFFF81010022h\n\
             xor ebx,ebx\n\
             mov rsi,0FFFFFFFF82B00010h\n\
             mov rdi,rbp\n\
             mov r12,[0FFFFFFFF82B00010h]\n\
             mov rdx,r12\n\
             jmp 0FFFFFFFF81200040h\n\
             mov esi,r12d\n\
             lea rdi,[rbp+38h]\n\
             jmp 0FFFFFFFF81200007h\n"
        );
    }
}
