//! Collects patches and what was missed on the way.
//!
//! What always holds: the patches do not overlap, and the old bytes of each are those of the image.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use iced_x86::{Code, Decoder, DecoderOptions, Instruction};

use super::prelink::NOP5;
use super::{KNOWN_SERIES, PlanReport, alternatives};
use crate::asm::near_branch;
use crate::bytes::offset_by;
use crate::error::{Missed, PlanError};
use crate::image::{KernelImage, Section};
use crate::patch::{Patch, PatchPlan, PatchSet};

/// Where stubs go first: the exception entries of paravirtual Xen guests, which never run here. They lie one
/// after the other, 496 bytes in 6.1, and no table of the kernel (ftrace, returns, alternatives, jump
/// labels) has an entry in them, so that nothing is written over a stub later.
const STUB_ROOM: &str = "xen_asm_exc_divide_error";
/// The functions that follow [`STUB_ROOM`] and belong to it start with one of these.
const STUB_ROOM_PREFIXES: &[&str] = &[
    "xen_asm_",
    "xen_iret",
    "xenpv_restore_regs",
    "xen_entry_SYS",
];
/// Stubs start at multiples of this.
const STUB_ALIGN: u64 = 16;

/// Why a patch is made.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reason {
    pub(super) set: PatchSet,
    pub(super) why: &'static str,
}

/// Whether an instruction is a near call of `target`.
pub(super) fn is_call(insn: &Instruction, target: u64) -> bool {
    insn.code() == Code::Call_rel32_64 && insn.near_branch64() == target
}

impl Reason {
    /// A shorter start.
    pub(super) const fn fast_boot(why: &'static str) -> Self {
        Reason {
            set: PatchSet::FastBoot,
            why,
        }
    }
}

/// The growing plan.
pub(super) struct Planner<'a> {
    pub(super) image: &'a KernelImage,
    pub(super) report: PlanReport,
    patches: BTreeMap<u64, Patch>,
    missed: BTreeSet<Missed>,
    /// Where stubs may go: from the next free byte to the end of each place.
    rooms: Vec<Range<u64>>,
}

impl<'a> Planner<'a> {
    pub(super) fn new(image: &'a KernelImage) -> Self {
        Planner {
            image,
            report: PlanReport::default(),
            patches: BTreeMap::new(),
            missed: BTreeSet::new(),
            rooms: Vec::new(),
        }
    }

    /// Address of a symbol; a miss is written down.
    pub(super) fn symbol(&mut self, name: &str) -> Option<u64> {
        let found = self.image.symbols().unique(name);
        if found.is_none() {
            self.missed.insert(Missed::Symbol(String::from(name)));
        }
        found
    }

    /// A section by its header; a miss is written down.
    pub(super) fn section(&mut self, name: &str) -> Option<Section> {
        let found = self.image.section(name).cloned();
        if found.is_none() {
            self.missed.insert(Missed::Section(String::from(name)));
        }
        found
    }

    /// Start and end of a table: by symbols, else by section header; a miss is written down.
    pub(super) fn table(&mut self, section: &str, start: &str, stop: &str) -> Option<(u64, u64)> {
        let symbols = self.image.symbols();
        if let (Some(start), Some(stop)) = (symbols.unique(start), symbols.unique(stop)) {
            return Some((start, stop));
        }
        if let Some(section) = self.image.section(section) {
            return Some((section.addr, section.end()));
        }
        self.missed.insert(Missed::Section(format!(
            "{section} (symbols {start}, {stop})"
        )));
        None
    }

    /// Writes down that a table has another form than the one that is known.
    pub(super) fn miss_table(&mut self, name: &str, why: String) {
        self.missed.insert(Missed::Table {
            name: String::from(name),
            why,
        });
    }

    /// The bytes of a range; a miss is written down under `name`.
    pub(super) fn bytes(&mut self, name: &str, start: u64, end: u64) -> Option<&'a [u8]> {
        let len = end
            .checked_sub(start)
            .and_then(|len| usize::try_from(len).ok());
        let bytes = len.and_then(|len| self.image.read(start, len));
        if bytes.is_none() {
            self.miss_table(name, format!("{start:#x}..{end:#x} is not in the file"));
        }
        bytes
    }

    /// Whether a patch touches the range.
    pub(super) fn covered(&self, addr: u64, len: usize) -> bool {
        self.overlapping(addr, len).is_some()
    }

    fn overlapping(&self, addr: u64, len: usize) -> Option<&Patch> {
        let end = addr + len as u64;
        self.patches
            .range(..end)
            .next_back()
            .map(|(_, patch)| patch)
            .filter(|patch| patch.end() > addr)
    }

    /// Replaces `old` at `addr`, which must be there, by `new`.
    pub(super) fn replace(
        &mut self,
        addr: u64,
        old: &[u8],
        new: &[u8],
        reason: Reason,
    ) -> Result<(), PlanError> {
        assert_eq!(old.len(), new.len(), "a patch keeps its length");
        if let Some(first) = self.overlapping(addr, old.len()) {
            return Err(PlanError::Overlap {
                symbol: self.image.symbols().describe(addr),
                addr,
                first: first.why,
                second: reason.why,
            });
        }
        let found = self.image.read(addr, old.len());
        if found != Some(old) {
            return Err(PlanError::OldBytes {
                set: reason.set,
                symbol: self.image.symbols().describe(addr),
                addr,
                expected: old.to_vec(),
                found: found.unwrap_or_default().to_vec(),
                why: reason.why,
            });
        }
        let Reason { set, why } = reason;
        self.patches.insert(
            addr,
            Patch {
                addr,
                old: old.into(),
                new: new.into(),
                set,
                why,
            },
        );
        Ok(())
    }

    /// [`Self::replace`] for one place of many; one within another patch is counted and left out.
    pub(super) fn replace_site(
        &mut self,
        kind: &'static str,
        addr: u64,
        old: &[u8],
        new: &[u8],
        reason: Reason,
    ) -> Result<(), PlanError> {
        if self.covered(addr, old.len()) {
            self.report.sites.entry(kind).or_default().covered += 1;
            return Ok(());
        }
        self.replace(addr, old, new, reason)?;
        self.report.sites.entry(kind).or_default().patched += 1;
        Ok(())
    }

    /// Counts a place that is left as it is.
    pub(super) fn leave_site(&mut self, kind: &'static str) {
        self.report.sites.entry(kind).or_default().left += 1;
    }

    /// Puts a stub into the first room with enough space; `build` gets its address. `None` without the first
    /// of them.
    pub(super) fn stub(
        &mut self,
        reason: Reason,
        build: impl Fn(u64) -> Vec<u8>,
    ) -> Result<Option<u64>, PlanError> {
        if self.rooms.is_empty() {
            let Some(start) = self.symbol(STUB_ROOM) else {
                return Ok(None);
            };
            self.rooms.push(start..self.stub_room_end(start));
        }
        let left = |room: &Range<u64>| room.end.saturating_sub(room.start);
        let fits = self.rooms.iter_mut().find_map(|room| {
            let code = build(room.start);
            (code.len() as u64 <= left(room)).then_some((room, code))
        });
        let Some((room, code)) = fits else {
            return Err(PlanError::NoRoom {
                need: build(self.rooms[0].start).len(),
                place: STUB_ROOM,
                left: self.rooms.iter().map(left).max().unwrap_or(0),
            });
        };
        let addr = room.start;
        room.start += (code.len() as u64).next_multiple_of(STUB_ALIGN);
        let old = self
            .image
            .read(addr, code.len())
            .unwrap_or_default()
            .to_vec();
        self.replace(addr, &old, &code, reason)?;
        Ok(Some(addr))
    }

    /// Lets stubs go where the code of a function lies that is left out, behind what returns at once. The
    /// function must have no alternatives: the kernel would write them over a stub.
    pub(super) fn stubs_in(&mut self, function: &str) {
        let Some((addr, code)) = self.function(function) else {
            return;
        };
        let room = (addr + 1).next_multiple_of(STUB_ALIGN)..addr + code.len() as u64;
        let taken = alternatives::entries(self)
            .iter()
            .any(|alternative| room.contains(&alternative.code));
        if taken {
            self.miss_table(function, String::from("alternatives are in it"));
        } else {
            self.rooms.push(room);
        }
    }

    /// Puts a stub in front of `function`, in place of its `call __fentry__`: `build` gets its address and
    /// that of the rest of the function.
    pub(super) fn in_front(
        &mut self,
        function: &str,
        reason: Reason,
        build: impl Fn(u64, u64) -> Vec<u8>,
    ) -> Result<(), PlanError> {
        let Some((addr, old)) = self.fentry_site(function) else {
            return Ok(());
        };
        let rest = addr + old.len() as u64;
        match self.stub(reason, |stub| build(stub, rest))? {
            Some(stub) => self.replace(addr, &old, &near_branch(0xe9, addr, stub), reason),
            None => Ok(()),
        }
    }

    /// The code of a function, from its symbol to the next one.
    pub(super) fn function(&mut self, name: &str) -> Option<(u64, &'a [u8])> {
        let addr = self.symbol(name)?;
        let room = self.image.symbols().room_at(addr).unwrap_or(0);
        Some((addr, self.bytes(name, addr, addr + room)?))
    }

    /// Address of the only place in `function` where an instruction starts with `code` (which may go
    /// on over the next ones); none or several are a miss.
    pub(super) fn unique_insn(&mut self, function: &str, code: &[u8]) -> Option<u64> {
        let (addr, bytes) = self.function(function)?;
        let mut found = Decoder::with_ip(64, bytes, addr, DecoderOptions::NONE)
            .into_iter()
            .map(|insn| insn.ip())
            .filter(|ip| {
                let offset = usize::try_from(ip - addr).expect("within the function");
                bytes[offset..].starts_with(code)
            });
        let (first, second) = (found.next(), found.next());
        if first.is_none() || second.is_some() {
            let what = if first.is_none() {
                "nowhere"
            } else {
                "more than once"
            };
            self.miss_table(function, format!("{code:02x?} is {what} in it"));
            return None;
        }
        first
    }

    /// Instructions of `function` that `wanted` accepts.
    pub(super) fn insns(
        &mut self,
        function: &str,
        wanted: impl Fn(&Instruction) -> bool,
    ) -> Vec<Instruction> {
        let Some((addr, code)) = self.function(function) else {
            return Vec::new();
        };
        Decoder::with_ip(64, code, addr, DecoderOptions::NONE)
            .into_iter()
            .filter(|insn| wanted(insn))
            .collect()
    }

    /// Writes a miss down unless `function` has an instruction that shows `what`.
    pub(super) fn has_insn(
        &mut self,
        function: &str,
        what: &str,
        shows: impl Fn(&Instruction) -> bool,
    ) {
        if self.insns(function, shows).is_empty() {
            self.miss_table(function, format!("nothing in it shows {what}"));
        }
    }

    /// Address and bytes of each call of `callee` in `function`; none is a miss.
    pub(super) fn calls(&mut self, function: &str, callee: &str) -> Vec<(u64, [u8; 5])> {
        let Some(target) = self.symbol(callee) else {
            return Vec::new();
        };
        let calls = self.insns(function, |insn| is_call(insn, target));
        if calls.is_empty() {
            self.miss_table(function, format!("no call of {callee} in it"));
        }
        calls
            .iter()
            .map(|call| (call.ip(), near_branch(0xe8, call.ip(), target)))
            .collect()
    }

    /// Puts the answer in place of each call of `callee` in `function`: `mov eax, answer`.
    pub(super) fn answer_calls(
        &mut self,
        function: &str,
        callee: &str,
        answer: u32,
        reason: Reason,
    ) -> Result<(), PlanError> {
        let [a, b, c, d] = answer.to_le_bytes();
        self.replace_calls(function, callee, reason, |_| [0xb8, a, b, c, d])
    }

    /// Puts a NOP in place of each call of `callee` in `function`.
    pub(super) fn take_out_calls(
        &mut self,
        function: &str,
        callee: &str,
        reason: Reason,
    ) -> Result<(), PlanError> {
        self.replace_calls(function, callee, reason, |_| NOP5)
    }

    /// Has each call of `callee` in `function` call what lies at `target`.
    pub(super) fn redirect_calls(
        &mut self,
        function: &str,
        callee: &str,
        target: u64,
        reason: Reason,
    ) -> Result<(), PlanError> {
        self.replace_calls(function, callee, reason, |call| {
            near_branch(0xe8, call, target)
        })
    }

    fn replace_calls(
        &mut self,
        function: &str,
        callee: &str,
        reason: Reason,
        new: impl Fn(u64) -> [u8; 5],
    ) -> Result<(), PlanError> {
        for (call, old) in self.calls(function, callee) {
            self.replace(call, &old, &new(call), reason)?;
        }
        Ok(())
    }

    /// Replaces the only place in `function` where an instruction starts with `old`.
    pub(super) fn replace_insn(
        &mut self,
        function: &str,
        old: &[u8],
        new: &[u8],
        reason: Reason,
    ) -> Result<(), PlanError> {
        match self.unique_insn(function, old) {
            Some(addr) => self.replace(addr, old, new, reason),
            None => Ok(()),
        }
    }

    /// The `call __fentry__` that a function starts with: five bytes that nothing needs while ftrace
    /// is off.
    pub(super) fn fentry_site(&mut self, function: &str) -> Option<(u64, [u8; 5])> {
        let (addr, fentry) = self.symbol(function).zip(self.symbol("__fentry__"))?;
        let call = near_branch(0xe8, addr, fentry);
        if self.image.read(addr, call.len()) != Some(&call) {
            self.miss_table(
                function,
                String::from("does not start with call __fentry__"),
            );
            return None;
        }
        Some((addr, call))
    }

    /// The first symbol behind the functions that give their room.
    fn stub_room_end(&self, start: u64) -> u64 {
        let symbols = self.image.symbols().all();
        let from = symbols.partition_point(|symbol| symbol.addr < start);
        symbols[from..]
            .iter()
            .find(|symbol| {
                !STUB_ROOM_PREFIXES
                    .iter()
                    .any(|prefix| symbol.name.starts_with(prefix))
            })
            .map_or(start, |symbol| symbol.addr)
    }

    /// Target of the near branch (`E8`, `E9`) whose distance lies at `at`.
    pub(super) fn branch_target(&self, at: u64) -> Option<u64> {
        let distance = self
            .image
            .read(at, 4)?
            .try_into()
            .ok()
            .map(i32::from_le_bytes)?;
        Some(offset_by(at + 4, distance))
    }

    /// The plan, if nothing was missed and the series is known.
    pub(super) fn finish(self, allow_unknown_series: bool) -> Result<PatchPlan, PlanError> {
        let release = self.image.release();
        let known = KNOWN_SERIES
            .iter()
            .any(|series| release.starts_with(series));
        if !self.missed.is_empty() || !(known || allow_unknown_series) {
            return Err(PlanError::UnknownKernel {
                release: String::from(release),
                missed: self.missed.into_iter().collect(),
                known: KNOWN_SERIES.to_vec(),
            });
        }
        let patches = self.patches.into_values().collect();
        Ok(PatchPlan::new(self.image.hash(), patches, self.report))
    }
}
