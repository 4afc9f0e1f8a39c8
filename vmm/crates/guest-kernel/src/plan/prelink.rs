//! Does at load what the kernel does to its own code at each start, for a machine with one processor
//! and no mitigations: ftrace sites, return thunks, retpolines and LOCK prefixes.
//!
//! Needs `mitigations=off` on the command line. A site of another form is left to work through its
//! thunk and counted.

use std::collections::BTreeMap;

use iced_x86::{Code, Decoder, DecoderOptions};

use super::alternatives;
use super::planner::{Planner, Reason};
use crate::bytes::{i32_at, offset_by, u64_at};
use crate::error::PlanError;

/// The five-byte NOP that the kernel itself uses.
pub(super) const NOP5: [u8; 5] = [0x0f, 0x1f, 0x44, 0x00, 0x00];
/// NOPs of one to eight bytes (Intel SDM, volume 2, NOP).
const LONG_NOPS: [&[u8]; 8] = [
    &[0x90],
    &[0x66, 0x90],
    &[0x0f, 0x1f, 0x00],
    &[0x0f, 0x1f, 0x40, 0x00],
    &[0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00],
    &[0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
];
/// Addresses below are per-CPU offsets or entries that the linker cleared.
const KERNEL_BASE: u64 = 0xffff_ffff_8000_0000;

const FTRACE: &str = "ftrace sites";
const RETURNS: &str = "return sites";
const RETPOLINES: &str = "retpoline sites";
const LOCKS: &str = "LOCK prefixes";
const NOPS: &str = "NOPs of alternatives";

pub(super) fn plan(planner: &mut Planner) -> Result<(), PlanError> {
    ftrace(planner)?;
    returns(planner)?;
    retpolines(planner)?;
    locks(planner)?;
    nops(planner)
}

/// `call __fentry__` at the start of functions.
fn ftrace(planner: &mut Planner) -> Result<(), PlanError> {
    let table = planner.table("__mcount_loc", "__start_mcount_loc", "__stop_mcount_loc");
    let (Some((start, end)), Some(fentry)) = (table, planner.symbol("__fentry__")) else {
        return Ok(());
    };
    let Some(bytes) = planner.bytes(FTRACE, start, end) else {
        return Ok(());
    };
    for entry in bytes.chunks_exact(8) {
        let addr = u64_at(entry, 0).unwrap_or(0);
        let call = planner
            .image
            .read(addr, 5)
            .filter(|code| addr >= KERNEL_BASE && code[0] == 0xe8);
        match call {
            Some(old) if planner.branch_target(addr + 1) == Some(fentry) => {
                planner.replace_site(
                    FTRACE,
                    addr,
                    old,
                    &NOP5,
                    Reason::fast_boot("ftrace is off"),
                )?;
            }
            _ => planner.leave_site(FTRACE),
        }
    }
    Ok(())
}

/// `jmp __x86_return_thunk` becomes `ret`.
fn returns(planner: &mut Planner) -> Result<(), PlanError> {
    let table = planner.table(".return_sites", "__return_sites", "__return_sites_end");
    let (Some((start, end)), Some(thunk)) = (table, planner.symbol("__x86_return_thunk")) else {
        return Ok(());
    };
    for addr in relative_entries(planner, RETURNS, start, end) {
        let jump = planner.image.read(addr, 5).filter(|code| code[0] == 0xe9);
        match jump {
            Some(old) if planner.branch_target(addr + 1) == Some(thunk) => {
                let new = [0xc3, 0xcc, 0xcc, 0xcc, 0xcc];
                planner.replace_site(
                    RETURNS,
                    addr,
                    old,
                    &new,
                    Reason::fast_boot("return thunks are off"),
                )?;
            }
            _ => planner.leave_site(RETURNS),
        }
    }
    Ok(())
}

/// `call` or `jmp __x86_indirect_thunk_REG` becomes `call *REG` or `jmp *REG`.
fn retpolines(planner: &mut Planner) -> Result<(), PlanError> {
    const REGISTERS: [&str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12",
        "r13", "r14", "r15",
    ];
    let symbols = planner.image.symbols();
    let thunks: BTreeMap<u64, u8> = (0u8..)
        .zip(REGISTERS)
        .filter_map(|(number, name)| {
            Some((
                symbols.unique(&format!("__x86_indirect_thunk_{name}"))?,
                number,
            ))
        })
        .collect();
    if thunks.len() < REGISTERS.len() - 1 {
        // There may be none for RSP.
        planner.miss_table(
            "__x86_indirect_thunk_*",
            format!("only {} thunks", thunks.len()),
        );
    }
    let table = planner.table(
        ".retpoline_sites",
        "__retpoline_sites",
        "__retpoline_sites_end",
    );
    let Some((start, end)) = table else {
        return Ok(());
    };
    for addr in relative_entries(planner, RETPOLINES, start, end) {
        let prefix = usize::from(planner.image.read(addr, 1) == Some(&[0x2e]));
        let old = planner.image.read(addr, prefix + 5).unwrap_or_default();
        let target = planner.branch_target(addr + prefix as u64 + 1);
        let register = target.and_then(|target| thunks.get(&target)).copied();
        match (old.get(prefix), register) {
            (Some(opcode @ (0xe8 | 0xe9)), Some(register)) => {
                let new = indirect_branch(*opcode == 0xe8, register, old.len());
                planner.replace_site(
                    RETPOLINES,
                    addr,
                    old,
                    &new,
                    Reason::fast_boot("retpolines are off"),
                )?;
            }
            _ => planner.leave_site(RETPOLINES),
        }
    }
    Ok(())
}

/// `call *reg` followed by NOPs, or `jmp *reg` followed by INT3, `len` (5 or 6) bytes in all.
fn indirect_branch(call: bool, register: u8, len: usize) -> Vec<u8> {
    let mut code = Vec::with_capacity(len);
    if register >= 8 {
        code.push(0x41);
    }
    code.extend([0xff, if call { 0xd0 } else { 0xe0 } | register & 7]);
    if call {
        code.extend(LONG_NOPS[len - code.len() - 1]);
    }
    code.resize(len, 0xcc);
    code
}

/// LOCK prefixes (`F0`) become DS prefixes (`3E`), as the kernel does on one processor.
fn locks(planner: &mut Planner) -> Result<(), PlanError> {
    let Some((start, end)) = planner.table(".smp_locks", "__smp_locks", "__smp_locks_end") else {
        return Ok(());
    };
    for addr in relative_entries(planner, LOCKS, start, end) {
        if planner.image.read(addr, 1) == Some(&[0xf0]) {
            planner.replace_site(
                LOCKS,
                addr,
                &[0xf0],
                &[0x3e],
                Reason::fast_boot("one processor"),
            )?;
        } else {
            planner.leave_site(LOCKS);
        }
    }
    Ok(())
}

/// Runs of one-byte NOPs in the code of alternatives become long ones. Several entries may have the
/// same code.
fn nops(planner: &mut Planner) -> Result<(), PlanError> {
    let mut codes: Vec<(u64, usize)> = alternatives::entries(planner)
        .iter()
        .map(|alternative| (alternative.code, alternative.code_len))
        .collect();
    codes.sort_unstable();
    codes.dedup();
    for (addr, len) in codes {
        let code = planner.image.read(addr, len).unwrap_or_default();
        for (start, run) in nop_runs(code, addr) {
            for (at, length) in pieces(start, run) {
                let nop = LONG_NOPS[length - 1];
                if length > 1 && !planner.covered(at, length) {
                    planner.replace_site(
                        NOPS,
                        at,
                        &[0x90; 8][..length],
                        nop,
                        Reason::fast_boot("joined"),
                    )?;
                }
            }
        }
    }
    Ok(())
}

/// Start and length of each run of one-byte NOPs.
fn nop_runs(code: &[u8], addr: u64) -> Vec<(u64, usize)> {
    let mut runs: Vec<(u64, usize)> = Vec::new();
    for insn in Decoder::with_ip(64, code, addr, DecoderOptions::NONE) {
        if insn.code() != Code::Nopd || insn.len() != 1 {
            continue;
        }
        match runs.last_mut() {
            Some((start, run)) if *start + *run as u64 == insn.ip() => *run += 1,
            _ => runs.push((insn.ip(), 1)),
        }
    }
    runs
}

/// Cuts a run into pieces for which there is a NOP.
fn pieces(start: u64, run: usize) -> impl Iterator<Item = (u64, usize)> {
    (0..run)
        .step_by(LONG_NOPS.len())
        .map(move |done| (start + done as u64, (run - done).min(LONG_NOPS.len())))
}

/// A table of 32-bit distances, each from its own place. Zero is padding.
fn relative_entries(planner: &mut Planner, name: &str, start: u64, end: u64) -> Vec<u64> {
    let Some(bytes) = planner.bytes(name, start, end) else {
        return Vec::new();
    };
    (0..bytes.len() / 4)
        .filter_map(|index| {
            let distance = i32_at(bytes, 4 * index).filter(|distance| *distance != 0)?;
            Some(offset_by(start + 4 * index as u64, distance))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_nops_are_found_and_cut() {
        // nop; nop; mov eax, 0x90909090; ten nops
        let mut code = vec![0x90, 0x90, 0xb8, 0x90, 0x90, 0x90, 0x90];
        code.extend([0x90; 10]);
        assert_eq!(nop_runs(&code, 0x100), [(0x100, 2), (0x107, 10)]);
        assert_eq!(
            pieces(0x107, 10).collect::<Vec<_>>(),
            [(0x107, 8), (0x10f, 2)]
        );
    }

    #[test]
    fn long_nops_have_their_length() {
        for (index, nop) in LONG_NOPS.iter().enumerate() {
            let mut decoder = Decoder::with_ip(64, nop, 0, DecoderOptions::NONE);
            let insn = decoder.decode();
            assert_eq!(
                (insn.mnemonic(), insn.len()),
                (iced_x86::Mnemonic::Nop, index + 1)
            );
            assert_eq!(nop.len(), index + 1);
        }
    }

    #[test]
    fn indirect_branches_keep_their_length() {
        assert_eq!(indirect_branch(true, 0, 5), [0xff, 0xd0, 0x0f, 0x1f, 0x00]);
        assert_eq!(indirect_branch(true, 9, 5), [0x41, 0xff, 0xd1, 0x66, 0x90]);
        assert_eq!(
            indirect_branch(true, 2, 6),
            [0xff, 0xd2, 0x0f, 0x1f, 0x40, 0x00]
        );
        assert_eq!(
            indirect_branch(false, 11, 5),
            [0x41, 0xff, 0xe3, 0xcc, 0xcc]
        );
        assert_eq!(
            indirect_branch(false, 7, 6),
            [0xff, 0xe7, 0xcc, 0xcc, 0xcc, 0xcc]
        );
    }
}
