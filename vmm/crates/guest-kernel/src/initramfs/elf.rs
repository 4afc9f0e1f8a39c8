//! The code of an ELF file: where it lies, and where its functions are.
//!
//! Code is taken from the sections that are executable; a file without section headers gives its
//! executable segments. Functions come from symbols and from the unwind table (`.eh_frame`), which a
//! stripped file still has. What always holds: all code lies within the file, and no byte of the
//! file is code twice. Whatever is damaged so that Linux could not load it either is refused.

use std::ops::Range;

use object::LittleEndian;
use object::elf::{
    EM_X86_64, ET_DYN, ET_EXEC, ET_REL, FileHeader64, PF_X, PT_LOAD, SHF_EXECINSTR, SHT_DYNSYM,
    SHT_NOBITS, SHT_SYMTAB, STT_FUNC, STT_GNU_IFUNC, STT_NOTYPE, STT_OBJECT,
};
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader, SectionTable, Sym};

use super::eh_frame;

type Header = FileHeader64<LittleEndian>;
type Sections<'a> = SectionTable<'a, Header>;
const LE: LittleEndian = LittleEndian;

/// What a file is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// No ELF file.
    NotElf,
    /// An executable or shared object.
    Program,
    /// A kernel module.
    Module,
    /// Another relocatable object: nobody can run it.
    Object,
    /// It may run, but is not of 64 bits or not for this processor.
    Foreign(&'static str),
}

/// A piece of code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Region {
    /// Address of the first byte.
    pub(super) addr: u64,
    /// Where its bytes lie in the file.
    pub(super) file: Range<usize>,
}

impl Region {
    fn end(&self) -> u64 {
        self.addr + self.file.len() as u64
    }
}

/// All code of a file.
#[derive(Debug, Default)]
pub(super) struct Code {
    /// Pieces of code, by place in the file.
    pub(super) regions: Vec<Region>,
    /// Ranges of addresses that are functions, sorted.
    pub(super) functions: Vec<Range<u64>>,
    /// Ranges of addresses within code that are data, sorted.
    pub(super) data: Vec<Range<u64>>,
    /// Other addresses at which an instruction starts, sorted.
    pub(super) starts: Vec<u64>,
}

pub(super) fn classify(file: &[u8]) -> Kind {
    if !file.starts_with(b"\x7fELF") {
        return Kind::NotElf;
    }
    if file.get(4..6) != Some(&[2, 1]) {
        return Kind::Foreign("a program of 32 bits, or big-endian");
    }
    let Ok(header) = Header::parse(file) else {
        return Kind::Foreign("the ELF header is damaged");
    };
    if header.e_machine(LE) != EM_X86_64 {
        return Kind::Foreign("a program for another processor");
    }
    match header.e_type(LE) {
        ET_EXEC | ET_DYN => Kind::Program,
        ET_REL if is_module(header, file) => Kind::Module,
        ET_REL => Kind::Object,
        _ => Kind::Foreign("an ELF file of an unknown type"),
    }
}

fn is_module(header: &Header, file: &[u8]) -> bool {
    let Ok(sections) = header.sections(LE, file) else {
        return false;
    };
    [&b".modinfo"[..], b".gnu.linkonce.this_module"]
        .iter()
        .any(|name| sections.section_by_name(LE, name).is_some())
}

impl Code {
    /// Finds the code of a program; `Err` says what is damaged.
    pub(super) fn read(file: &[u8]) -> Result<Code, String> {
        let damaged = |error: object::read::Error| format!("damaged ELF file: {error}");
        let header = Header::parse(file).map_err(damaged)?;
        // Linux does not look at section headers: damaged ones are as good as none.
        let sections = header.sections(LE, file).unwrap_or_default();
        let mut code = Code {
            regions: regions_of_sections(&sections, file.len()).unwrap_or_default(),
            ..Code::default()
        };
        if code.regions.is_empty() {
            code.regions = regions_of_segments(header, file).map_err(damaged)?;
        }
        code.regions.sort_by_key(|region| region.file.start);
        let twice = |pair: &[Region]| pair[0].file.end > pair[1].file.start;
        if code.regions.windows(2).any(twice) {
            return Err(String::from(
                "damaged ELF file: two parts of its code overlap",
            ));
        }
        code.starts.push(header.e_entry(LE));
        code.read_symbols(&sections, file);
        code.read_unwind_table(&sections, file);
        code.functions.sort_by_key(|range| range.start);
        code.data.sort_by_key(|range| range.start);
        code.starts.sort_unstable();
        Ok(code)
    }

    /// Bytes of code.
    pub(super) fn bytes(&self) -> u64 {
        self.regions
            .iter()
            .map(|region| region.file.len() as u64)
            .sum()
    }

    /// Whether the whole range lies in one piece of code.
    fn holds(&self, range: &Range<u64>) -> bool {
        self.regions
            .iter()
            .any(|region| region.addr <= range.start && range.end <= region.end())
    }

    fn read_symbols(&mut self, sections: &Sections<'_>, file: &[u8]) {
        for kind in [SHT_SYMTAB, SHT_DYNSYM] {
            let Ok(table) = sections.symbols(LE, file, kind) else {
                continue;
            };
            for symbol in table.symbols() {
                let addr = symbol.st_value(LE);
                let range = addr..addr.saturating_add(symbol.st_size(LE));
                if symbol.is_undefined(LE) || !self.holds(&range) {
                    continue;
                }
                match symbol.st_type() {
                    STT_FUNC | STT_GNU_IFUNC if !range.is_empty() => self.functions.push(range),
                    STT_OBJECT if !range.is_empty() => self.data.push(range),
                    STT_FUNC | STT_GNU_IFUNC | STT_NOTYPE => self.starts.push(addr),
                    _ => {}
                }
            }
        }
    }

    fn read_unwind_table(&mut self, sections: &Sections<'_>, file: &[u8]) {
        let Some((_, section)) = sections.section_by_name(LE, b".eh_frame") else {
            return;
        };
        let Ok(table) = section.data(LE, file) else {
            return;
        };
        let found = eh_frame::functions(table, section.sh_addr(LE));
        let found: Vec<_> = found
            .into_iter()
            .filter(|range| self.holds(range))
            .collect();
        self.functions.extend(found);
    }
}

/// `None` if a section with code does not lie in the file.
fn regions_of_sections(sections: &Sections<'_>, file_len: usize) -> Option<Vec<Region>> {
    let is_code = |section: &&object::elf::SectionHeader64<LittleEndian>| {
        section.sh_flags(LE) & SHF_EXECINSTR == SHF_EXECINSTR
            && section.sh_type(LE) != SHT_NOBITS
            && section.sh_size(LE) > 0
    };
    sections
        .iter()
        .filter(is_code)
        .map(|section| {
            region(
                section.sh_addr(LE),
                section.sh_offset(LE),
                section.sh_size(LE),
                file_len,
            )
        })
        .collect()
}

fn regions_of_segments(header: &Header, file: &[u8]) -> Result<Vec<Region>, object::read::Error> {
    let found = header
        .program_headers(LE, file)?
        .iter()
        .filter(|segment| segment.p_type(LE) == PT_LOAD && segment.p_flags(LE) & PF_X == PF_X)
        .filter_map(|segment| {
            region(
                segment.p_vaddr(LE),
                segment.p_offset(LE),
                segment.p_filesz(LE),
                file.len(),
            )
        });
    Ok(found.collect())
}

fn region(addr: u64, offset: u64, len: u64, file_len: usize) -> Option<Region> {
    addr.checked_add(len)?;
    let start = usize::try_from(offset).ok()?;
    let end = start.checked_add(usize::try_from(len).ok()?)?;
    (end <= file_len).then_some(Region {
        addr,
        file: start..end,
    })
}
