//! A kernel in memory: its segments, sections and symbols.
//!
//! Bytes are addressed as the kernel sees them, by virtual address. What always holds: an image is of
//! x86-64, every segment lies within the file it came from and within [`MAX_PHYSICAL`], and segments
//! do not overlap in physical memory. An image never changes; patches go into what is loaded from it.

use object::LittleEndian;
use object::elf::{EM_X86_64, FileHeader64, PT_LOAD, SHF_ALLOC, SHF_EXECINSTR, SHT_NOBITS};
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader};
use sha2::{Digest, Sha256};

use crate::error::ImageError;
use crate::kallsyms::{self, SymbolTable};
use crate::payload;

/// A kernel's segments end below this guest-physical address.
const MAX_PHYSICAL: u64 = 1 << 30;
/// Most program headers that are accepted.
const MAX_SEGMENTS: usize = 64;

/// A range of the image with a name, from the section headers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// Its name, `.text`.
    pub name: String,
    /// Virtual address of its first byte.
    pub addr: u64,
    /// Its length in bytes.
    pub size: u64,
    /// Whether it holds code.
    pub executable: bool,
    /// Whether the file holds its bytes (`.bss` has none).
    pub in_file: bool,
}

impl Section {
    /// Virtual address behind the last byte.
    pub fn end(&self) -> u64 {
        self.addr + self.size
    }
}

/// A part of the image that is loaded as one.
#[derive(Debug, Clone)]
pub(crate) struct Segment {
    /// Virtual address; per-CPU data has zero.
    pub(crate) vaddr: u64,
    /// Guest-physical address.
    pub(crate) paddr: u64,
    /// Length in memory, in bytes; what is behind `data` is zero.
    pub(crate) mem_size: u64,
    /// The bytes of the file.
    pub(crate) data: Vec<u8>,
}

/// A kernel image: segments, sections, symbols.
#[derive(Debug)]
pub struct KernelImage {
    hash: [u8; 32],
    release: String,
    entry: u64,
    setup_header: Option<Vec<u8>>,
    segments: Vec<Segment>,
    sections: Vec<Section>,
    symbols: SymbolTable,
}

impl KernelImage {
    /// Reads a kernel from the bytes of a `vmlinuz` (bzImage) or `vmlinux` (ELF) file.
    ///
    /// # Errors
    /// [`ImageError`] says what the file is instead, or which part of it is damaged or missing.
    pub fn parse(file: &[u8]) -> Result<Self, ImageError> {
        let unpacked = payload::unpack(file)?;
        let elf = &unpacked.vmlinux[..];
        let header = FileHeader64::<LittleEndian>::parse(elf).map_err(bad_elf)?;
        let endian = header.endian().map_err(bad_elf)?;
        check_machine(header)?;
        let segments = read_segments(header, endian, elf)?;
        let sections = read_sections(header, endian, elf)?;
        let symbols = read_symbols(&segments, &sections)?;
        let mut image = KernelImage {
            hash: Sha256::digest(file).into(),
            release: String::new(),
            entry: header.e_entry.get(endian),
            setup_header: unpacked.setup_header,
            segments,
            sections,
            symbols,
        };
        image.release = image.read_release().ok_or_else(|| ImageError::BadElf {
            what: String::from("no `Linux version` at the symbol linux_banner"),
        })?;
        Ok(image)
    }

    /// SHA-256 of the file that the image was read from.
    pub fn hash(&self) -> [u8; 32] {
        self.hash
    }

    /// The kernel's release, as `uname -r` shows it: `6.1.0-56-cloud-amd64`.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Guest-physical address of the 64-bit entry point.
    pub fn entry(&self) -> u64 {
        self.entry
    }

    /// The sections that are part of the kernel's memory.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// The section of that name.
    pub fn section(&self, name: &str) -> Option<&Section> {
        self.sections.iter().find(|section| section.name == name)
    }

    /// The kernel's symbols.
    pub fn symbols(&self) -> &SymbolTable {
        &self.symbols
    }

    /// The `len` bytes at virtual address `addr`, if the file holds all of them.
    pub fn read(&self, addr: u64, len: usize) -> Option<&[u8]> {
        self.segments.iter().find_map(|segment| {
            let offset = usize::try_from(addr.checked_sub(segment.vaddr)?).ok()?;
            segment.data.get(offset..offset.checked_add(len)?)
        })
    }

    pub(crate) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    pub(crate) fn setup_header(&self) -> Option<&[u8]> {
        self.setup_header.as_deref()
    }

    fn read_release(&self) -> Option<String> {
        const PREFIX: &[u8] = b"Linux version ";
        let banner = self.read(self.symbols.unique("linux_banner")?, 128)?;
        let rest = banner.strip_prefix(PREFIX)?;
        let end = rest.iter().position(|byte| *byte == b' ')?;
        String::from_utf8(rest[..end].to_vec()).ok()
    }
}

fn bad_elf(error: object::read::Error) -> ImageError {
    ImageError::BadElf {
        what: error.to_string(),
    }
}

fn check_machine(header: &FileHeader64<LittleEndian>) -> Result<(), ImageError> {
    let machine = header.e_machine.get(LittleEndian);
    if machine == EM_X86_64 {
        return Ok(());
    }
    let name = match machine {
        object::elf::EM_AARCH64 => String::from("arm64"),
        object::elf::EM_386 => String::from("32-bit x86"),
        object::elf::EM_RISCV => String::from("riscv"),
        object::elf::EM_PPC64 => String::from("ppc64"),
        object::elf::EM_S390 => String::from("s390x"),
        other => format!("ELF machine {}", other.0),
    };
    Err(ImageError::WrongMachine { machine: name })
}

fn read_segments(
    header: &FileHeader64<LittleEndian>,
    endian: LittleEndian,
    elf: &[u8],
) -> Result<Vec<Segment>, ImageError> {
    let headers = header.program_headers(endian, elf).map_err(bad_elf)?;
    if headers.len() > MAX_SEGMENTS {
        return Err(ImageError::BadElf {
            what: format!("{} program headers", headers.len()),
        });
    }
    let mut segments = Vec::new();
    for program in headers
        .iter()
        .filter(|program| program.p_type(endian) == PT_LOAD)
    {
        let data = program
            .data(endian, elf)
            .map_err(|()| ImageError::Truncated {
                what: "an ELF segment",
                need: program
                    .p_offset(endian)
                    .saturating_add(program.p_filesz(endian)),
                have: elf.len() as u64,
            })?;
        let segment = Segment {
            vaddr: program.p_vaddr(endian),
            paddr: program.p_paddr(endian),
            mem_size: program.p_memsz(endian),
            data: data.to_vec(),
        };
        let end = segment.paddr.checked_add(segment.mem_size);
        if segment.mem_size < data.len() as u64
            || end.is_none_or(|end| end > MAX_PHYSICAL)
            || segment.vaddr.checked_add(segment.mem_size).is_none()
        {
            return Err(ImageError::BadElf {
                what: format!(
                    "segment at {:#x} of {:#x} bytes",
                    segment.paddr, segment.mem_size
                ),
            });
        }
        segments.push(segment);
    }
    segments.sort_by_key(|segment| segment.paddr);
    let overlap = segments
        .windows(2)
        .any(|pair| pair[0].paddr + pair[0].mem_size > pair[1].paddr);
    if segments.is_empty() || overlap {
        return Err(ImageError::BadElf {
            what: String::from("no segments, or overlapping ones"),
        });
    }
    Ok(segments)
}

fn read_sections(
    header: &FileHeader64<LittleEndian>,
    endian: LittleEndian,
    elf: &[u8],
) -> Result<Vec<Section>, ImageError> {
    let table = header.sections(endian, elf).map_err(bad_elf)?;
    let mut sections = Vec::new();
    for section in table.iter() {
        let flags = section.sh_flags(endian);
        if flags & SHF_ALLOC != SHF_ALLOC {
            continue;
        }
        let name = table.section_name(endian, section).map_err(bad_elf)?;
        let (addr, size) = (section.sh_addr(endian), section.sh_size(endian));
        if addr.checked_add(size).is_none() {
            return Err(ImageError::BadElf {
                what: format!("section at {addr:#x} of {size:#x} bytes"),
            });
        }
        sections.push(Section {
            name: String::from_utf8_lossy(name).into_owned(),
            addr,
            size,
            executable: flags & SHF_EXECINSTR == SHF_EXECINSTR,
            in_file: section.sh_type(endian) != SHT_NOBITS,
        });
    }
    Ok(sections)
}

/// kallsyms lies in `.rodata`; a kernel without section headers is searched whole.
fn read_symbols(segments: &[Segment], sections: &[Section]) -> Result<SymbolTable, ImageError> {
    let text = sections
        .iter()
        .find(|section| section.name == ".text")
        .map_or(segments[0].vaddr, |section| section.addr);
    let rodata = sections.iter().find(|section| section.name == ".rodata");
    let range = rodata.and_then(|section| {
        let segment = segments
            .iter()
            .find(|s| s.vaddr <= section.addr && section.addr - s.vaddr < s.mem_size)?;
        let from = usize::try_from(section.addr - segment.vaddr).ok()?;
        let until = from.checked_add(usize::try_from(section.size).ok()?)?;
        Some((segment.data.get(from..until)?, section.addr))
    });
    let (data, base) = range.unwrap_or((&segments[0].data, segments[0].vaddr));
    Ok(kallsyms::read(data, base, text)?)
}
