//! The toy instruction set.
//!
//! An instruction is 8 bytes: operation, two register numbers, one unused byte, 32 bits of
//! immediate value, little endian. Registers are RAX, RBX, RCX and RDX; RSP is the stack.

/// Bytes of one instruction.
pub(super) const OP_BYTES: u64 = 8;

/// A register of the toy machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Reg {
    /// RAX.
    A,
    /// RBX.
    B,
    /// RCX.
    C,
    /// RDX.
    D,
}

/// One instruction. Jumps name the instruction by its index in the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Halts until an interrupt.
    Halt,
    /// Sets a register.
    Set(Reg, u32),
    /// Adds the second register to the first.
    Add(Reg, Reg),
    /// Adds a number to a register.
    AddImm(Reg, u32),
    /// One step of a linear congruential generator.
    Mix(Reg),
    /// Loads 8 bytes from the address in the second register plus a number; outside RAM it is an
    /// MMIO read.
    Load(Reg, Reg, u32),
    /// Stores the first register likewise.
    Store(Reg, Reg, u32),
    /// Reads 4 bytes from a port into RAX.
    In(u16),
    /// Writes the low 4 bytes of RAX to a port.
    Out(u16),
    /// Jumps.
    Jump(u32),
    /// Takes one from a register and jumps unless that makes it zero.
    Loop(Reg, u32),
    /// Turns interrupts on.
    Sti,
    /// Turns interrupts off.
    Cli,
    /// Returns from an interrupt.
    Iret,
    /// Copies RSP from a register.
    SetStack(Reg),
}

/// Machine code of a program that starts at guest address `base`.
#[must_use]
pub fn assemble(base: u32, program: &[Op]) -> Vec<u8> {
    let at = |index: u32| base + index * OP_BYTES as u32;
    program.iter().flat_map(|op| encode(*op, at)).collect()
}

fn encode(op: Op, at: impl Fn(u32) -> u32) -> [u8; OP_BYTES as usize] {
    let (code, first, second, value) = match op {
        Op::Halt => (0, Reg::A, Reg::A, 0),
        Op::Set(reg, value) => (1, reg, Reg::A, value),
        Op::Add(to, from) => (2, to, from, 0),
        Op::AddImm(reg, value) => (3, reg, Reg::A, value),
        Op::Mix(reg) => (4, reg, Reg::A, 0),
        Op::Load(to, base, offset) => (5, to, base, offset),
        Op::Store(from, base, offset) => (6, from, base, offset),
        Op::In(port) => (7, Reg::A, Reg::A, u32::from(port)),
        Op::Out(port) => (8, Reg::A, Reg::A, u32::from(port)),
        Op::Jump(index) => (9, Reg::A, Reg::A, at(index)),
        Op::Loop(reg, index) => (10, reg, Reg::A, at(index)),
        Op::Sti => (11, Reg::A, Reg::A, 0),
        Op::Cli => (12, Reg::A, Reg::A, 0),
        Op::Iret => (13, Reg::A, Reg::A, 0),
        Op::SetStack(reg) => (14, reg, Reg::A, 0),
    };
    let mut bytes = [code, first as u8, second as u8, 0, 0, 0, 0, 0];
    bytes[4..].copy_from_slice(&value.to_le_bytes());
    bytes
}

/// A decoded instruction; jump targets are addresses.
pub(super) fn decode(bytes: [u8; OP_BYTES as usize]) -> Option<Op> {
    let reg = |byte| match byte {
        0 => Some(Reg::A),
        1 => Some(Reg::B),
        2 => Some(Reg::C),
        3 => Some(Reg::D),
        _ => None,
    };
    let [code, first, second, _, v0, v1, v2, v3] = bytes;
    let (first, second) = (reg(first)?, reg(second)?);
    let value = u32::from_le_bytes([v0, v1, v2, v3]);
    Some(match code {
        0 => Op::Halt,
        1 => Op::Set(first, value),
        2 => Op::Add(first, second),
        3 => Op::AddImm(first, value),
        4 => Op::Mix(first),
        5 => Op::Load(first, second, value),
        6 => Op::Store(first, second, value),
        7 => Op::In(u16::try_from(value).ok()?),
        8 => Op::Out(u16::try_from(value).ok()?),
        9 => Op::Jump(value),
        10 => Op::Loop(first, value),
        11 => Op::Sti,
        12 => Op::Cli,
        13 => Op::Iret,
        14 => Op::SetStack(first),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_survives_encoding() {
        let program = [
            Op::Halt,
            Op::Set(Reg::B, 7),
            Op::Add(Reg::C, Reg::D),
            Op::AddImm(Reg::D, u32::MAX),
            Op::Mix(Reg::A),
            Op::Load(Reg::A, Reg::B, 8),
            Op::Store(Reg::D, Reg::C, 16),
            Op::In(0x40),
            Op::Out(0x3f8),
            Op::Jump(3),
            Op::Loop(Reg::C, 1),
            Op::Sti,
            Op::Cli,
            Op::Iret,
            Op::SetStack(Reg::B),
        ];
        let code = assemble(0, &program);
        for (bytes, op) in code.chunks_exact(8).zip(program) {
            let expected = match op {
                Op::Jump(index) => Op::Jump(index * 8),
                Op::Loop(reg, index) => Op::Loop(reg, index * 8),
                other => other,
            };
            assert_eq!(decode(bytes.try_into().unwrap()), Some(expected));
        }
        assert_eq!(decode([99; 8]), None);
    }
}
