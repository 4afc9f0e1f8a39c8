//! Finds the instructions that matter in the code of a program.
//!
//! Code is cut at every place where an instruction is known to start or a function ends. What lies in a
//! function is decoded from its start and believed. What lies outside (padding, functions without
//! symbol and unwind entry, tables that assembler programmers put among code) is decoded the same
//! way, but believed only in a run of plausible instructions: in tables the two bytes of CPUID come by
//! chance once in every 64 KiB (libcrypto of OpenSSL 3.0 has such tables among its code).
//!
//! What always holds: sites are sorted and do not overlap; no byte is looked at more than 15 times, the length
//! of the longest instruction.

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    Register,
};
use std::ops::Range;

use super::elf::{Code, Region};
use crate::insn::{SensitiveInsn, classify, may_start_one};

/// CPUID's leaf is loaded at most this many instructions before it. Something that no program executes
/// among as many instructions before tells data.
const BEFORE: usize = 16;
/// The same for instructions that follow, up to the first jump or return.
const AFTER: usize = 8;

/// An instruction whose result is not a function of the guest's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Site {
    /// Its offset in the file.
    pub(super) offset: usize,
    /// Its length in bytes.
    pub(super) len: usize,
    /// Its address.
    pub(super) addr: u64,
    pub(super) insn: SensitiveInsn,
    pub(super) certainty: Certainty,
}

/// Whether bytes that decode as an instruction are one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Certainty {
    /// In a function, or in a plausible run of instructions that loads CPUID's leaf.
    Code,
    /// In a plausible run of instructions that does not.
    Doubtful,
    /// Among bytes that are no program's instructions.
    Data,
}

/// All sites in the code of `file`.
pub(super) fn sites(file: &[u8], code: &Code) -> Vec<Site> {
    let mut found = Vec::new();
    let mut info = InstructionInfoFactory::new();
    for region in &code.regions {
        for (range, in_function) in pieces(code, region) {
            let start = region.file.start + offset(region, range.start);
            let bytes = &file[start..region.file.start + offset(region, range.end)];
            if bytes.windows(2).any(may_start_one) {
                scan(
                    bytes,
                    start,
                    range.start,
                    in_function,
                    &mut info,
                    &mut found,
                );
            }
        }
    }
    found
}

fn offset(region: &Region, addr: u64) -> usize {
    usize::try_from(addr - region.addr).expect("within the region, which is within the file")
}

/// Cuts a region where instructions start and functions end; tells which pieces lie in functions, and
/// leaves data out.
fn pieces(code: &Code, region: &Region) -> Vec<(Range<u64>, bool)> {
    let end = region.addr + region.file.len() as u64;
    let within = |addr: &u64| *addr > region.addr && *addr < end;
    let ranges = code.functions.iter().chain(&code.data);
    let mut cuts: Vec<u64> = ranges
        .flat_map(|range| [range.start, range.end])
        .chain(code.starts.iter().copied())
        .filter(within)
        .chain([region.addr, end])
        .collect();
    cuts.sort_unstable();
    cuts.dedup();
    let mut functions = Cover::over(&code.functions);
    let mut data = Cover::over(&code.data);
    cuts.windows(2)
        .map(|pair| pair[0]..pair[1])
        .filter(|piece| !data.covers(piece.start))
        .map(|piece| (piece.clone(), functions.covers(piece.start)))
        .collect()
}

/// Answers for rising addresses whether one of the sorted ranges holds them.
struct Cover<'a> {
    ranges: &'a [Range<u64>],
    /// The farthest end of the ranges that start at or before the last address.
    reach: u64,
}

impl<'a> Cover<'a> {
    fn over(ranges: &'a [Range<u64>]) -> Self {
        Cover { ranges, reach: 0 }
    }

    fn covers(&mut self, addr: u64) -> bool {
        while let [first, rest @ ..] = self.ranges
            && first.start <= addr
        {
            self.reach = self.reach.max(first.end);
            self.ranges = rest;
        }
        addr < self.reach
    }
}

fn scan(
    bytes: &[u8],
    file_offset: usize,
    addr: u64,
    in_function: bool,
    info: &mut InstructionInfoFactory,
    found: &mut Vec<Site>,
) {
    let mut decoder = Decoder::with_ip(64, bytes, addr, DecoderOptions::NONE);
    let mut run = Run {
        believed: in_function,
        ..Run::default()
    };
    let mut insn = Instruction::default();
    while decoder.can_decode() {
        let at = decoder.position();
        decoder.decode_out(&mut insn);
        if let Some(kind) = classify(insn.mnemonic()) {
            found.push(Site {
                offset: file_offset + at,
                len: insn.len(),
                addr: insn.ip(),
                insn: kind,
                certainty: run.certainty(kind, &bytes[decoder.position()..]),
            });
        }
        run.step(&insn, info);
        if insn.is_invalid() {
            // The decoder has taken as many bytes as it looked at: only the first is known to be bad.
            decoder
                .set_position(at + 1)
                .expect("it was at a byte before");
            decoder.set_ip(addr + at as u64 + 1);
        }
    }
}

/// What came before an instruction.
#[derive(Default)]
struct Run {
    /// Within a function, and no byte of it was anything but an instruction.
    believed: bool,
    /// Plausible instructions in a row.
    plausible: usize,
    /// Something implausible came before them.
    broken: bool,
    /// How many of them came after EAX was loaded, if it was.
    since_eax: Option<usize>,
}

impl Run {
    fn step(&mut self, insn: &Instruction, info: &mut InstructionInfoFactory) {
        if !is_plausible(insn) {
            *self = Run {
                broken: true,
                ..Run::default()
            };
            return;
        }
        self.plausible += 1;
        self.since_eax = if writes_eax(insn, info) {
            Some(0)
        } else {
            self.since_eax.map(|count| count + 1)
        };
    }

    /// What an instruction of that kind is here, with these bytes behind it.
    fn certainty(&self, kind: SensitiveInsn, behind: &[u8]) -> Certainty {
        if self.believed {
            return Certainty::Code;
        }
        let leaf_loaded = self.since_eax.is_some_and(|count| count < BEFORE);
        let among_data = self.broken && self.plausible < BEFORE;
        match kind {
            _ if !is_plausible_run(behind) => Certainty::Data,
            SensitiveInsn::Cpuid if leaf_loaded => Certainty::Code,
            _ if among_data => Certainty::Data,
            SensitiveInsn::Cpuid => Certainty::Doubtful,
            _ => Certainty::Code,
        }
    }
}

fn is_plausible_run(bytes: &[u8]) -> bool {
    for insn in Decoder::new(64, bytes, DecoderOptions::NONE)
        .into_iter()
        .take(AFTER)
    {
        if !is_plausible(&insn) {
            return false;
        }
        let flow = insn.flow_control();
        if matches!(flow, FlowControl::Return | FlowControl::UnconditionalBranch) {
            break;
        }
    }
    true
}

/// Whether a program would execute it.
fn is_plausible(insn: &Instruction) -> bool {
    use Mnemonic::{Int1, Iret, Iretd, Iretq, Retf};
    let odd = matches!(insn.mnemonic(), Int1 | Iret | Iretd | Iretq | Retf);
    !insn.is_invalid() && !insn.is_privileged() && !odd
}

/// Whether EAX has a new value behind it; a function that was called may have put one there.
fn writes_eax(insn: &Instruction, info: &mut InstructionInfoFactory) -> bool {
    if matches!(
        insn.flow_control(),
        FlowControl::Call | FlowControl::IndirectCall
    ) {
        return true;
    }
    let writes = |access| {
        matches!(
            access,
            OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
        )
    };
    info.info(insn)
        .used_registers()
        .iter()
        .any(|used| used.register().full_register() == Register::RAX && writes(used.access()))
}
