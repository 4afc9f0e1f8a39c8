//! Rewrites CPUID in the programs of an initial RAM disk, for hosts on which it cannot be made to fault.
//!
//! There a program sees the real processor: features that the guest's kernel does not support (it
//! would not switch their registers), and which CPU it runs on (a replay on another one would differ).
//! So every CPUID instruction of the programs becomes [`CPUID_STAND_IN`], an opcode that raises #UD; a
//! stub in the kernel's #UD entry, part of the same [`PatchSet::HostQuirks`], asks the VMM instead.
//!
//! ```text
//! file ── streams: decompress, concatenate ── archive: entries ── elf: code and functions
//!      ── decode: sites ── patches (file, offset, old, new, why) ── applied to the archive
//! ```
//! What always holds: only what was decoded as an instruction from a known start, or in a plausible
//! run of instructions, is rewritten; whatever looks like CPUID and is not certain, or was not looked
//! at, is in the [`Report`]. A damaged archive is an error. What the module does not do: look into
//! archives, disk images or packed programs within the RAM disk, or follow what the guest loads later.

mod archive;
mod decode;
mod eh_frame;
mod elf;
mod error;
mod report;
mod streams;

use sha2::{Digest, Sha256};

use crate::insn::SensitiveInsn;
use crate::module::scan_module;
use crate::patch::PatchSet;
use crate::plan::QuirkSet;
use archive::Entry;
use decode::Certainty;
pub use error::Error;
pub use report::{FilePatch, InitramfsId, ModuleReport, ProgramReport, Report, Unexamined};
pub use streams::MAX_INITRAMFS_BYTES;

/// What stands in programs for `CPUID` (`0F A2`): an opcode of the same length that no processor
/// defines (AMD64 Architecture Programmer's Manual volume 3, table A-2; Intel SDM volume 2, table A-3)
/// and that compilers do not emit, unlike the official UD0, UD1 and UD2.
pub const CPUID_STAND_IN: [u8; 2] = [0x0f, 0x04];

const CPUID: [u8; 2] = [0x0f, 0xa2];
const NOP: u8 = 0x90;
const WHY: &str =
    "CPUID shows programs the real processor: raise #UD, which asks the VMM for its table";

/// Makes an initial RAM disk fit for a host with these quirks.
///
/// Returns what to put into guest memory and what was found. Where programs do not see the real
/// processor the archive is returned as it is, without being looked at. A compressed archive in which
/// something was rewritten comes back uncompressed: it takes more memory, and the guest unpacks it
/// sooner.
///
/// # Errors
/// [`Error`] if the archive is damaged, too large, or of a compression that is not known.
pub fn prepare(bytes: Vec<u8>, quirks: &QuirkSet) -> Result<(Vec<u8>, Report), Error> {
    if !quirks.cpuid_visible_in_ring3 {
        let report = Report::not_examined(&bytes);
        return Ok((bytes, report));
    }
    let unpacked = streams::unpack(&bytes)?;
    let flat = unpacked.as_deref().unwrap_or(&bytes);
    let (mut report, places) = examine_flat(flat)?;
    report.id = report::id(&Sha256::digest(&bytes).into(), &report.patches);
    if places.is_empty() {
        return Ok((bytes, report));
    }
    let mut out = unpacked.unwrap_or(bytes);
    for (place, patch) in places.iter().zip(&report.patches) {
        apply(&mut out, place, patch);
    }
    Ok((out, report))
}

/// Looks at every program and module of an initial RAM disk and changes nothing.
///
/// # Errors
/// As for [`prepare`].
pub fn examine(bytes: &[u8]) -> Result<Report, Error> {
    let unpacked = streams::unpack(bytes)?;
    let (mut report, _) = examine_flat(unpacked.as_deref().unwrap_or(bytes))?;
    report.id = report::id(&Sha256::digest(bytes).into(), &report.patches);
    Ok(report)
}

/// Where in the unpacked archive a patch goes: the entry, and the offset of the first byte.
struct Place {
    entry: Entry,
    at: usize,
}

fn examine_flat(flat: &[u8]) -> Result<(Report, Vec<Place>), Error> {
    let mut report = Report::empty();
    let mut places = Vec::new();
    for entry in archive::entries(flat)? {
        if !entry.is_file() {
            continue;
        }
        let data = &flat[entry.data.clone()];
        match elf::classify(data) {
            elf::Kind::NotElf if is_packed_module(&entry.name) => {
                examine_packed_module(&entry, data, &mut report);
            }
            elf::Kind::NotElf | elf::Kind::Object => {}
            elf::Kind::Foreign(why) => report.unexamined(&entry, why),
            elf::Kind::Module => examine_module(&entry, data, &mut report),
            elf::Kind::Program => examine_program(&entry, data, &mut report, &mut places),
        }
    }
    Ok((report, places))
}

fn examine_program(entry: &Entry, data: &[u8], report: &mut Report, places: &mut Vec<Place>) {
    let code = match elf::Code::read(data) {
        Ok(code) => code,
        Err(why) => return report.unexamined(entry, &why),
    };
    let mut found = ProgramReport::new(&entry.name, code.bytes());
    for site in decode::sites(data, &code) {
        match (site.insn, site.certainty) {
            (SensitiveInsn::Cpuid, Certainty::Code) => {
                let old = &data[site.offset..site.offset + site.len];
                let mut new = vec![NOP; site.len - CPUID_STAND_IN.len()];
                new.extend(CPUID_STAND_IN);
                assert!(old.ends_with(&CPUID), "it was decoded as CPUID");
                found.rewritten += 1;
                places.push(Place {
                    at: entry.data.start + site.offset,
                    entry: entry.clone(),
                });
                report.patches.push(FilePatch {
                    file: entry.name.clone(),
                    offset: site.offset as u64,
                    old: old.into(),
                    new: new.into(),
                    set: PatchSet::HostQuirks,
                    why: WHY,
                });
            }
            (SensitiveInsn::Cpuid, Certainty::Doubtful) => found.doubtful.push(site.addr),
            (SensitiveInsn::Cpuid, Certainty::Data) => found.among_data.push(site.addr),
            (insn, Certainty::Code) => *found.sites.entry(insn).or_default() += 1,
            (_, Certainty::Doubtful | Certainty::Data) => {}
        }
    }
    report.programs.push(found);
}

fn examine_module(entry: &Entry, data: &[u8], report: &mut Report) {
    match scan_module(data) {
        Ok(scan) => report.modules.push(ModuleReport {
            file: entry.name.clone(),
            found: scan.found,
        }),
        Err(error) => report.unexamined(entry, &error.to_string()),
    }
}

fn is_packed_module(name: &str) -> bool {
    [".ko.gz", ".ko.xz", ".ko.zst"]
        .iter()
        .any(|ending| name.ends_with(ending))
}

fn examine_packed_module(entry: &Entry, data: &[u8], report: &mut Report) {
    match streams::decompress(data, MAX_INITRAMFS_BYTES) {
        Ok((module, _)) => examine_module(entry, &module, report),
        Err(error) => report.unexamined(entry, &error.to_string()),
    }
}

/// Puts the new bytes in, and keeps the sum of a `070702` archive right.
fn apply(flat: &mut [u8], place: &Place, patch: &FilePatch) {
    let bytes = &mut flat[place.at..place.at + patch.old.len()];
    assert_eq!(*bytes, *patch.old, "sites of one file do not overlap");
    bytes.copy_from_slice(&patch.new);
    let sum = |bytes: &[u8]| bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
    let difference = sum(&patch.new).wrapping_sub(sum(&patch.old));
    archive::adjust_checksum(flat, &place.entry, difference);
}

#[cfg(test)]
mod samples;
#[cfg(test)]
mod tests;
