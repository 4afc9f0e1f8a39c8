//! Archives and ELF files for tests, made byte by byte.

use std::io::Write;

/// `mov eax, 1; cpuid; ret`.
pub(super) const ASKS_CPUID: [u8; 8] = [0xb8, 1, 0, 0, 0, 0x0f, 0xa2, 0xc3];
/// Address at which [`elf`] puts its code.
pub(super) const CODE_ADDR: u64 = 0x40_1000;
/// Offset in the file at which [`elf`] puts its code.
pub(super) const CODE_OFFSET: usize = 0x100;

/// A cpio archive of regular files, with trailer; `magic` is `070701` or `070702`.
pub(super) fn cpio(magic: &str, files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, data) in files.iter().chain(&[("TRAILER!!!", &[][..])]) {
        let mode = if *name == "TRAILER!!!" { 0 } else { 0o100_755 };
        let sum: u32 = match magic {
            "070702" => data.iter().map(|byte| u32::from(*byte)).sum(),
            _ => 0,
        };
        write!(out, "{magic}{:08X}{mode:08X}", 1).unwrap();
        write!(out, "{:08X}{:08X}{:08X}{:08X}", 0, 0, 1, 0).unwrap();
        write!(
            out,
            "{:08X}{:032X}{:08X}{sum:08X}",
            data.len(),
            0,
            name.len() + 1
        )
        .unwrap();
        out.extend(name.as_bytes());
        out.push(0);
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend(*data);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}

/// What to put into an ELF file besides code.
#[derive(Default)]
pub(super) struct Shape {
    /// `e_type`; 0 stands for an executable (2).
    pub(super) kind: u16,
    /// Leaves the section headers out.
    pub(super) no_sections: bool,
    /// Symbols in the code: type (1 data, 2 function), offset, length.
    pub(super) symbols: Vec<(u8, u64, u64)>,
    /// An empty section of that name.
    pub(super) extra_section: &'static str,
}

/// An ELF file for x86-64 with one executable section or segment.
pub(super) fn elf(code: &[u8], shape: &Shape) -> Vec<u8> {
    let kind = if shape.kind == 0 { 2 } else { shape.kind };
    let mut out = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    out.extend(kind.to_le_bytes());
    out.extend(62u16.to_le_bytes());
    out.extend(1u32.to_le_bytes());
    out.extend(CODE_ADDR.to_le_bytes()); // e_entry
    out.extend(64u64.to_le_bytes()); // e_phoff
    out.resize(64, 0);
    let words =
        |out: &mut Vec<u8>, words: &[u64]| out.extend(words.iter().flat_map(|w| w.to_le_bytes()));
    // PT_LOAD, readable and executable.
    let len = code.len() as u64;
    words(
        &mut out,
        &[
            5 << 32 | 1,
            CODE_OFFSET as u64,
            CODE_ADDR,
            CODE_ADDR,
            len,
            len,
            0x1000,
        ],
    );
    out.resize(CODE_OFFSET, 0);
    out.extend(code);
    out.resize(out.len().next_multiple_of(8), 0);
    set_header(&mut out, 54, &[56, 1]);
    if shape.no_sections {
        return out;
    }
    let symtab = out.len() as u64;
    words(&mut out, &[0; 3]);
    for (kind, offset, len) in &shape.symbols {
        words(
            &mut out,
            &[1 << 48 | u64::from(*kind) << 32, CODE_ADDR + offset, *len],
        );
    }
    let symtab_len = out.len() as u64 - symtab;
    let strtab = out.len() as u64;
    out.extend(b"\0.text\0.symtab\0.strtab\0");
    out.extend(shape.extra_section.as_bytes());
    out.push(0);
    let strtab_len = out.len() as u64 - strtab;
    out.resize(out.len().next_multiple_of(8), 0);
    let shoff = out.len() as u64;
    words(&mut out, &[0; 8]);
    let mut section = |name: u64, kind: u64, flags: u64, addr, offset, len, link: u64, entry| {
        words(
            &mut out,
            &[kind << 32 | name, flags, addr, offset, len, link, 1, entry],
        );
    };
    section(1, 1, 6, CODE_ADDR, CODE_OFFSET as u64, len, 0, 0);
    section(7, 2, 0, 0, symtab, symtab_len, 3, 24);
    section(15, 3, 0, 0, strtab, strtab_len, 0, 0);
    section(23, 1, 0, 0, 0, 0, 0, 0);
    out[40..48].copy_from_slice(&shoff.to_le_bytes());
    set_header(&mut out, 58, &[64, 5, 3]);
    out
}

fn set_header(out: &mut [u8], at: usize, fields: &[u16]) {
    for (index, field) in fields.iter().enumerate() {
        out[at + index * 2..at + index * 2 + 2].copy_from_slice(&field.to_le_bytes());
    }
}
