//! Boot layout: what lies where, and what is refused.

use std::collections::BTreeMap;

use super::*;
use crate::load::LoadedSegment;
use crate::patch::PlanId;

const MIB: u64 = 1 << 20;

fn kernel(header: Option<Vec<u8>>) -> LoadedKernel {
    LoadedKernel {
        entry: 16 * MIB,
        segments: vec![LoadedSegment {
            gpa: 16 * MIB,
            bytes: vec![0x90; 64],
            mem_size: 46 * MIB,
        }],
        plan: PlanId([0; 32]),
        setup_header: header,
    }
}

fn config(memory_bytes: u64, initrd: &[u8]) -> BootConfig<'_> {
    BootConfig {
        memory_bytes,
        command_line: "console=ttyS0",
        initrd,
        rng_seed: [7; 32],
    }
}

fn boot(
    kernel: &LoadedKernel,
    config: &BootConfig<'_>,
) -> Result<(EntryRegisters, BTreeMap<u64, Vec<u8>>), BootError> {
    let mut written = BTreeMap::new();
    let registers = write_boot(kernel, config, &mut |gpa, bytes| {
        written.insert(gpa, bytes.to_vec());
        Ok(())
    })?;
    Ok((registers, written))
}

fn u32_in(page: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(page[at..at + 4].try_into().unwrap())
}

fn e820(page: &[u8]) -> Vec<(u64, u64, u32)> {
    let u64_in = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap());
    (0..usize::from(page[0x1e8]))
        .map(|i| 0x2d0 + 20 * i)
        .map(|at| (u64_in(at), u64_in(at + 8), u32_in(page, at + 16)))
        .collect()
}

#[test]
fn writes_are_disjoint_and_within_memory() {
    let initrd = vec![1; 5000];
    let (_, written) = boot(&kernel(None), &config(128 * MIB, &initrd)).unwrap();
    let mut end = 0;
    for (gpa, bytes) in &written {
        assert!(*gpa >= end, "write at {gpa:#x} overlaps the one before");
        end = gpa + bytes.len() as u64;
    }
    assert!(end <= 128 * MIB);
}

#[test]
fn memory_above_four_gib_is_in_the_map() {
    let (_, written) = boot(&kernel(None), &config(5 << 30, &[])).unwrap();
    assert_eq!(
        e820(&written[&BOOT_PARAMS]),
        [
            (0, 0x9_fc00, 1),
            (MIB, PCI_HOLE_START - MIB, 1),
            (HIGH_MEMORY_START, (5 << 30) - PCI_HOLE_START, 1)
        ]
    );
}

#[test]
fn memory_that_fits_below_the_hole_has_no_high_range() {
    assert_eq!(
        memory_ranges(PCI_HOLE_START),
        [MemoryRange {
            start: 0,
            len: PCI_HOLE_START
        }]
    );
}

#[test]
fn zero_page_points_at_everything() {
    let initrd = vec![1; 5000];
    let mut header = vec![0u8; 0x11 + 0x6c];
    header[0x11..0x15].copy_from_slice(b"HdrS");
    header[0x15] = 0x0e;
    header[0x16] = 0x02;
    let (registers, written) = boot(&kernel(Some(header)), &config(128 * MIB, &initrd)).unwrap();
    let page = &written[&BOOT_PARAMS];
    assert_eq!(registers.rsi, BOOT_PARAMS);
    assert_eq!(&page[0x202..0x206], b"HdrS");
    assert_eq!(
        &page[0x206..0x208],
        [0x0e, 0x02],
        "the file's own protocol version"
    );
    assert_eq!(page[0x210], 0xff);
    assert_eq!(u32_in(page, 0x21c), 5000);
    let start = u64::from(u32_in(page, 0x218));
    assert_eq!(start, 128 * MIB - 8192);
    assert_eq!(written[&start], initrd);
    let line = &written[&u64::from(u32_in(page, 0x228))];
    assert_eq!(line, b"console=ttyS0\0");
    let seed = &written[&u64::from(u32_in(page, 0x250))];
    assert_eq!(seed[8..16], [9, 0, 0, 0, 32, 0, 0, 0]);
    assert_eq!(seed[16..], [7; 32]);
}

#[test]
fn initrd_ends_at_or_below_two_gib() {
    let (_, written) = boot(&kernel(None), &config(4 << 30, &[1; 100])).unwrap();
    assert_eq!(u32_in(&written[&BOOT_PARAMS], 0x218), 0x8000_0000 - 4096);
}

#[test]
fn page_tables_map_the_first_gib_one_to_one() {
    let (registers, written) = boot(&kernel(None), &config(128 * MIB, &[])).unwrap();
    let tables = &written[&registers.cr3];
    let entry = |page: usize, index: usize| {
        let at = page * 4096 + index * 8;
        u64::from_le_bytes(tables[at..at + 8].try_into().unwrap())
    };
    assert_eq!(entry(0, 0), registers.cr3 + 0x1003);
    assert_eq!(entry(1, 0), registers.cr3 + 0x2003);
    assert_eq!(entry(2, 0), 0x83);
    assert_eq!(entry(2, 511), (511 << 21) | 0x83);
}

#[test]
fn too_little_memory_says_how_much_is_needed() {
    let error = boot(&kernel(None), &config(64 * MIB, &[1; 5000])).unwrap_err();
    assert_eq!(
        error.to_string(),
        "too little guest memory: 64 MiB, kernel and initial RAM disk need 95 MiB"
    );
    assert!(boot(&kernel(None), &config(95 * MIB, &[1; 5000])).is_ok());
}

#[test]
fn odd_or_huge_memory_is_refused() {
    for bytes in [128 * MIB + 1, MAX_MEMORY_BYTES + 4096] {
        let error = boot(&kernel(None), &config(bytes, &[])).unwrap_err();
        assert!(matches!(error, BootError::BadMemorySize { .. }), "{error}");
    }
}

#[test]
fn command_line_is_bounded_and_of_one_line() {
    let long = "x".repeat(MAX_COMMAND_LINE_BYTES + 1);
    let with = |command_line| BootConfig {
        command_line,
        ..config(128 * MIB, &[])
    };
    let error = boot(&kernel(None), &with(&long)).unwrap_err();
    assert!(
        matches!(error, BootError::CommandLineTooLong { length: 2048, .. }),
        "{error}"
    );
    assert!(boot(&kernel(None), &with(&long[1..])).is_ok());
    let error = boot(&kernel(None), &with("a\nb")).unwrap_err();
    assert!(
        matches!(error, BootError::CommandLineControl { at: 1 }),
        "{error}"
    );
}

#[test]
fn failed_write_names_what_and_where() {
    let error = write_boot(&kernel(None), &config(128 * MIB, &[]), &mut |gpa, _| {
        if gpa == GDT {
            Err("no memory there".into())
        } else {
            Ok(())
        }
    })
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot write 32 bytes of GDT at guest address 0x500"
    );
}
