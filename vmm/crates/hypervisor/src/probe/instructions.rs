//! Which instructions ring 0 can execute.
#![allow(unsafe_code)] // The guest's code is assembled in and read as bytes.

use serde::{Deserialize, Serialize};

use super::lab::{Lab, Outcome};
use crate::bare::{DATA, Ring, exception_port};
use crate::{Error, Exit, guest_code};

/// An instruction that kernels use and that instruction emulators tend to lack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Instruction {
    /// INT3, the breakpoint: code patching and tests of it.
    Int3,
    /// UD2: the kernel's WARN and BUG.
    Ud2,
    /// POPCNT.
    Popcnt,
    /// FWAIT.
    Fwait,
    /// FXSAVE and FXRSTOR: switching between programs.
    Fxsave,
    /// CMPXCHG16B.
    Cmpxchg16b,
    /// Moves of SSE registers.
    SseMove,
    /// Arithmetic in SSE registers.
    SseArithmetic,
    /// CRC32 of SSE4.2: checksums of file systems.
    Crc32,
    /// Memory barriers, PAUSE.
    Barriers,
    /// REP MOVSB and REP STOSB.
    StringMove,
    /// LOCK XADD, BTS, CMPXCHG8B.
    Atomics,
}

/// What happened when ring 0 executed an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// It did what it should.
    Runs,
    /// KVM's emulator does not know it and hands the failure to the VMM.
    NotEmulated,
    /// It led to this exception.
    Faults(u8),
    /// It never ended.
    Endless,
    /// It led to something else.
    Other,
}

guest_code! { fn int3() { "int3" } }
guest_code! { fn ud2() { "ud2" } }
guest_code! {
    fn popcnt() { "mov eax, 0xf0f", "popcnt ecx, eax", "cmp ecx, 8", "jne 2f", "out 0x10, al", "2: hlt" }
}
guest_code! { fn fwait() { "fwait", "out 0x10, al" } }
guest_code! { fn fxsave() { "fxsave64 [rbx]", "fxrstor64 [rbx]", "out 0x10, al" } }
guest_code! { fn cmpxchg16b() { "lock cmpxchg16b [rbx]", "out 0x10, al" } }
guest_code! { fn sse_move() { "movups xmm0, [rbx]", "movups [rbx], xmm0", "out 0x10, al" } }
guest_code! { fn sse_arithmetic() { "addps xmm0, xmm1", "pxor xmm2, xmm3", "out 0x10, al" } }
guest_code! { fn crc32() { "crc32 eax, ecx", "out 0x10, al" } }
guest_code! { fn barriers() { "mfence", "lfence", "sfence", "pause", "out 0x10, al" } }
guest_code! {
    fn string_move() {
        "mov rdi, rbx", "mov al, 0x5a", "mov ecx, 64", "rep stosb",
        "mov rsi, rbx", "mov ecx, 64", "rep movsb",
        "cmp byte ptr [rbx + 127], 0x5a", "jne 2f", "out 0x10, al", "2: hlt",
    }
}
guest_code! {
    fn atomics() {
        "lock xadd [rbx], rcx", "lock bts qword ptr [rbx], 3", "lock cmpxchg8b [rbx]",
        "out 0x10, al",
    }
}

type Code = fn() -> &'static [u8];

/// Each instruction with its code and the port that the code writes to when all is well.
const PROBES: [(Instruction, Code, u16); 12] = [
    (Instruction::Int3, int3, 0x83),
    (Instruction::Ud2, ud2, 0x86),
    (Instruction::Popcnt, popcnt, 0x10),
    (Instruction::Fwait, fwait, 0x10),
    (Instruction::Fxsave, fxsave, 0x10),
    (Instruction::Cmpxchg16b, cmpxchg16b, 0x10),
    (Instruction::SseMove, sse_move, 0x10),
    (Instruction::SseArithmetic, sse_arithmetic, 0x10),
    (Instruction::Crc32, crc32, 0x10),
    (Instruction::Barriers, barriers, 0x10),
    (Instruction::StringMove, string_move, 0x10),
    (Instruction::Atomics, atomics, 0x10),
];

pub(super) fn probe(lab: &mut Lab) -> Result<Vec<(Instruction, Verdict)>, Error> {
    PROBES
        .into_iter()
        .map(|(instruction, code, good_port)| {
            lab.load(code(), Ring::Kernel, 0)?;
            lab.guest.update_regs(|regs| regs.rbx = DATA);
            Ok((instruction, verdict(lab.run().outcome, good_port)))
        })
        .collect()
}

fn verdict(outcome: Outcome, good_port: u16) -> Verdict {
    match outcome {
        Outcome::Exit(Exit::PortOut { port, .. }) if port == good_port => Verdict::Runs,
        Outcome::Exit(Exit::PortOut { port, .. }) => (0..32)
            .find(|vector| exception_port(*vector) == port)
            .map_or(Verdict::Other, Verdict::Faults),
        Outcome::Exit(Exit::EmulationFailed) => Verdict::NotEmulated,
        Outcome::Endless => Verdict::Endless,
        Outcome::Exit(_) | Outcome::Refused => Verdict::Other,
    }
}
