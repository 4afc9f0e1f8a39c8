//! Looks for nondeterministic instructions in a kernel module.
//!
//! Modules are not rewritten: the ones that go into the guest's initial RAM disk are scanned when it
//! is made, and must have none. Every executable section is decoded from each symbol that `.symtab`
//! has in it (from its start where there are none).

use object::elf::SHF_EXECINSTR;
use object::read::elf::ElfFile64;
use object::{LittleEndian, Object, ObjectSection, ObjectSymbol, SectionFlags, SectionKind};

use crate::error::ImageError;
use crate::insn::{Occurrence, scan};

/// What a module holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleScan {
    /// Bytes of code that were decoded.
    pub code_bytes: u64,
    /// The instructions that were found; should be empty.
    pub found: Vec<Occurrence>,
}

/// Scans a kernel module (`.ko`, not compressed).
///
/// # Errors
/// [`ImageError`] if the file is no ELF file of x86-64.
pub fn scan_module(file: &[u8]) -> Result<ModuleScan, ImageError> {
    let bad = |error: object::Error| ImageError::BadElf {
        what: error.to_string(),
    };
    if !file.starts_with(b"\x7fELF") {
        return Err(ImageError::NotAKernel {
            hint: String::from("not an ELF file"),
        });
    }
    let elf = ElfFile64::<LittleEndian>::parse(file).map_err(bad)?;
    if elf.architecture() != object::Architecture::X86_64 {
        return Err(ImageError::WrongMachine {
            machine: format!("{:?}", elf.architecture()),
        });
    }
    let mut out = ModuleScan {
        code_bytes: 0,
        found: Vec::new(),
    };
    for section in elf
        .sections()
        .filter(|section| is_code(section.kind(), section.flags()))
    {
        let data = section.data().map_err(bad)?;
        let name = section.name().map_err(bad)?;
        let mut starts: Vec<(usize, &str)> = elf
            .symbols()
            .filter(|symbol| symbol.section_index() == Some(section.index()))
            .filter_map(|symbol| {
                Some((usize::try_from(symbol.address()).ok()?, symbol.name().ok()?))
            })
            .filter(|(offset, _)| *offset < data.len())
            .collect();
        starts.push((0, name));
        starts.sort_by_key(|(offset, _)| *offset);
        starts.dedup_by_key(|(offset, _)| *offset);
        let ends = starts
            .iter()
            .skip(1)
            .map(|(offset, _)| *offset)
            .chain([data.len()]);
        for ((start, symbol), end) in starts.iter().zip(ends) {
            out.found
                .extend(
                    scan(&data[*start..end], *start as u64)
                        .into_iter()
                        .map(|(addr, insn)| Occurrence {
                            addr,
                            insn,
                            symbol: format!("{name}: {symbol}"),
                        }),
                );
        }
        out.code_bytes += data.len() as u64;
    }
    Ok(out)
}

fn is_code(kind: SectionKind, flags: SectionFlags) -> bool {
    let executable = match flags {
        SectionFlags::Elf { sh_flags, .. } => sh_flags & SHF_EXECINSTR == SHF_EXECINSTR,
        _ => false,
    };
    executable || kind == SectionKind::Text
}
