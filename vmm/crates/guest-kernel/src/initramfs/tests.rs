//! From archives made byte by byte to what goes into guest memory.

use std::io::{Read, Write};

use super::samples::{ASKS_CPUID, CODE_ADDR, CODE_OFFSET, Shape, cpio, elf};
use super::*;

const QUIRK: QuirkSet = QuirkSet {
    syscall_keeps_cpl3: false,
    int3_not_emulated: false,
    x87_not_emulated: false,
    cpuid_visible_in_ring3: true,
};

fn program() -> Vec<u8> {
    elf(&ASKS_CPUID, &Shape::default())
}

fn one(program: &[u8]) -> (Vec<u8>, Report) {
    let archive = cpio("070701", &[("bin/a", program)]);
    let (out, report) = prepare(archive.clone(), &QUIRK).unwrap();
    assert_eq!(out.len(), archive.len());
    // The archive is changed in the patches and nowhere else.
    let mut expected = archive;
    let start = expected
        .windows(4)
        .position(|four| four == b"\x7fELF")
        .unwrap();
    for patch in &report.patches {
        let at = start + usize::try_from(patch.offset).unwrap();
        assert_eq!(expected[at..at + patch.old.len()], *patch.old);
        expected[at..at + patch.new.len()].copy_from_slice(&patch.new);
    }
    assert!(out == expected);
    (out, report)
}

fn offsets(report: &Report) -> Vec<usize> {
    let offset = |patch: &FilePatch| usize::try_from(patch.offset).unwrap() - CODE_OFFSET;
    report.patches.iter().map(offset).collect()
}

#[test]
fn without_the_quirk_the_archive_is_not_looked_at() {
    let damaged = b"not an archive".to_vec();
    let (out, report) = prepare(damaged.clone(), &QuirkSet::default()).unwrap();
    assert_eq!(out, damaged);
    assert!(!report.examined && report.patches.is_empty());
    assert!(prepare(damaged, &QUIRK).is_err());
}

#[test]
fn cpuid_becomes_the_stand_in() {
    let (_, report) = one(&program());
    let [patch] = &report.patches[..] else {
        panic!("{report:?}");
    };
    assert_eq!(
        (&*patch.file, patch.offset),
        ("bin/a", CODE_OFFSET as u64 + 5)
    );
    assert_eq!(
        (&*patch.old, &*patch.new),
        (&CPUID[..], &CPUID_STAND_IN[..])
    );
    assert_eq!(patch.set, PatchSet::HostQuirks);
    assert_eq!(report.programs[0].rewritten, 1);
    assert_eq!(report.to_string(), "1 CPUID rewritten in 1 of 1 programs");
    assert_eq!(report.obstacles(), [""; 0]);
}

#[test]
fn bytes_within_another_instruction_stay() {
    // mov eax, 0x90a20f90; cpuid; ret
    let code = [0xb8, 0x90, 0x0f, 0xa2, 0x90, 0x0f, 0xa2, 0xc3];
    assert_eq!(offsets(&one(&elf(&code, &Shape::default())).1), [5]);
}

#[test]
fn prefixes_become_nops() {
    // mov eax, 1; rex.w cpuid; ret
    let code = [0xb8, 1, 0, 0, 0, 0x48, 0x0f, 0xa2, 0xc3];
    let (_, report) = one(&elf(&code, &Shape::default()));
    assert_eq!(*report.patches[0].new, [0x90, 0x0f, 0x04]);
}

#[test]
fn shared_objects_and_files_without_sections_are_rewritten() {
    let shared = Shape {
        kind: 3,
        ..Shape::default()
    };
    let no_sections = Shape {
        no_sections: true,
        ..Shape::default()
    };
    for shape in [shared, no_sections] {
        assert_eq!(offsets(&one(&elf(&ASKS_CPUID, &shape)).1), [5]);
    }
}

#[test]
fn functions_bring_decoding_back_in_step() {
    // Data that look like the first byte of a long instruction swallow what follows ...
    let code = [&[0x48, 0xb8, 0, 0][..], &ASKS_CPUID].concat();
    assert_eq!(offsets(&one(&elf(&code, &Shape::default())).1), [0; 0]);
    // ... unless a symbol says where the function starts.
    let shape = Shape {
        symbols: vec![(2, 4, ASKS_CPUID.len() as u64)],
        ..Shape::default()
    };
    assert_eq!(offsets(&one(&elf(&code, &shape)).1), [9]);
}

#[test]
fn in_a_function_cpuid_is_believed_outside_it_must_be_plausible() {
    // nop; cpuid; ret: no leaf is loaded.
    let code = [0x90, 0x0f, 0xa2, 0xc3];
    let (_, report) = one(&elf(&code, &Shape::default()));
    assert_eq!(report.programs[0].doubtful, [CODE_ADDR + 1]);
    assert_eq!(report.patches, []);
    assert_eq!(
        report.obstacles(),
        ["bin/a may have CPUID at 0x401001, which was left"]
    );
    let function = Shape {
        symbols: vec![(2, 0, 4)],
        ..Shape::default()
    };
    assert_eq!(offsets(&one(&elf(&code, &function)).1), [1]);
}

#[test]
fn table_that_no_symbol_names_stays() {
    // mov eax, 1; an invalid opcode; cpuid; nop, or the invalid opcode behind it.
    for tail in [
        [0xb8, 1, 0, 0, 0, 0x06, 0x0f, 0xa2, 0x90],
        [0xb8, 1, 0, 0, 0, 0x90, 0x0f, 0xa2, 0x06],
    ] {
        let code = [&ASKS_CPUID[..], &tail].concat();
        let (_, report) = one(&elf(&code, &Shape::default()));
        assert_eq!(offsets(&report), [5]);
        assert_eq!(
            report.programs[0].among_data,
            [CODE_ADDR + 14],
            "{tail:02x?} {report:?}"
        );
        assert_eq!(report.obstacles(), [""; 0]);
    }
}

#[test]
fn data_among_code_stay() {
    let code = [&ASKS_CPUID[..], &ASKS_CPUID].concat();
    let shape = Shape {
        symbols: vec![(2, 0, 8), (1, 8, 8)],
        ..Shape::default()
    };
    let (_, report) = one(&elf(&code, &shape));
    assert_eq!(offsets(&report), [5]);
    assert_eq!(report.programs[0].doubtful, [0; 0]);
    assert_eq!(report.programs[0].among_data, [0; 0]);
}

#[test]
fn other_instructions_are_counted_and_stay() {
    // rdrand rax; rdseed rax; rdpid rax; rdtscp; xgetbv; rdtsc; ret
    let code = [
        &[0x48, 0x0f, 0xc7, 0xf0, 0x48, 0x0f, 0xc7, 0xf8][..],
        &[0xf3, 0x0f, 0xc7, 0xf8, 0x0f, 0x01, 0xf9, 0x0f, 0x01, 0xd0],
        &[0x0f, 0x31, 0xc3],
    ]
    .concat();
    let shape = Shape {
        symbols: vec![(2, 0, code.len() as u64)],
        ..Shape::default()
    };
    let (_, report) = one(&elf(&code, &shape));
    assert_eq!(report.patches, []);
    for insn in [
        SensitiveInsn::Rdrand,
        SensitiveInsn::Rdseed,
        SensitiveInsn::Rdpid,
        SensitiveInsn::Rdtscp,
        SensitiveInsn::Xgetbv,
        SensitiveInsn::Rdtsc,
    ] {
        assert_eq!(report.count(insn), 1, "{insn}");
    }
}

#[test]
fn modules_stay_and_their_cpuid_is_an_obstacle() {
    let module = Shape {
        kind: 1,
        extra_section: ".modinfo",
        ..Shape::default()
    };
    let module = elf(&ASKS_CPUID, &module);
    let mut packed = Vec::new();
    liblzma::bufread::XzEncoder::new(&module[..], 1)
        .read_to_end(&mut packed)
        .unwrap();
    let object = Shape {
        kind: 1,
        ..Shape::default()
    };
    let object = elf(&ASKS_CPUID, &object);
    let archive = cpio(
        "070701",
        &[("a.ko", &module), ("b.ko.xz", &packed), ("c.o", &object)],
    );
    let (out, report) = prepare(archive.clone(), &QUIRK).unwrap();
    assert!(out == archive);
    let obstacles = report.obstacles();
    assert_eq!(obstacles.len(), 2, "{obstacles:?}");
    assert!(
        obstacles[0].starts_with("module a.ko has CPUID at .text"),
        "{obstacles:?}"
    );
    assert!(
        obstacles[1].starts_with("module b.ko.xz has CPUID"),
        "{obstacles:?}"
    );
}

#[test]
fn what_is_not_looked_at_is_named() {
    let mut narrow = program();
    narrow[4] = 1;
    let mut overlapping = elf(&ASKS_CPUID, &Shape::default());
    // The last, empty section becomes executable and covers the code too.
    let last = overlapping.len() - 64;
    overlapping[last + 8] = 6;
    overlapping[last + 24..last + 32].copy_from_slice(&(CODE_OFFSET as u64).to_le_bytes());
    overlapping[last + 32] = 8;
    let archive = cpio(
        "070701",
        &[("a", &narrow), ("b", &overlapping), ("c", b"#!/bin/sh")],
    );
    let report = prepare(archive, &QUIRK).unwrap().1;
    let named: Vec<_> = report
        .unexamined
        .iter()
        .map(|u| (&*u.file, &*u.why))
        .collect();
    assert_eq!(
        named,
        [
            ("a", "a program of 32 bits, or big-endian"),
            ("b", "damaged ELF file: two parts of its code overlap"),
        ]
    );
}

#[test]
fn every_prefix_and_damage_of_an_elf_file_is_survived() {
    let good = elf(
        &ASKS_CPUID,
        &Shape {
            symbols: vec![(2, 0, 8), (1, 8, 8)],
            ..Shape::default()
        },
    );
    for len in 0..good.len() {
        examine(&cpio("070701", &[("a", &good[..len])])).unwrap();
    }
    for at in 0..good.len() {
        for value in [0, 0x7f, 0xff] {
            let mut bad = good.clone();
            bad[at] = value;
            examine(&cpio("070701", &[("a", &bad)])).unwrap();
        }
    }
}

#[test]
fn zeros_behind_a_name_are_no_part_of_it() {
    let archive = cpio("070701", &[("bin/a\0\0\0\0\0\0", &program())]);
    let entries = super::archive::entries(&archive).unwrap();
    assert_eq!(entries.len(), 1);
    assert_eq!(entries[0].name, "bin/a");
    assert_eq!(archive[entries[0].data.clone()], program());
}

#[test]
fn checksum_of_a_070702_archive_follows() {
    let archive = cpio("070702", &[("x", b"data"), ("bin/a", &program())]);
    let out = prepare(archive, &QUIRK).unwrap().0;
    let mut patched = program();
    patched[CODE_OFFSET + 5..CODE_OFFSET + 7].copy_from_slice(&CPUID_STAND_IN);
    assert!(out == cpio("070702", &[("x", b"data"), ("bin/a", &patched)]));
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn xz(bytes: &[u8], stream: liblzma::stream::Stream) -> Vec<u8> {
    let mut out = Vec::new();
    liblzma::bufread::XzEncoder::new_stream(bytes, stream)
        .read_to_end(&mut out)
        .unwrap();
    out
}

fn lz4_legacy(bytes: &[u8]) -> Vec<u8> {
    let mut out = 0x184c_2102u32.to_le_bytes().to_vec();
    let block = lz4_flex::block::compress(bytes);
    out.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
    out.extend(block);
    out
}

fn compressed(archive: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let mut bzip2 = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
    bzip2.write_all(archive).unwrap();
    let check = liblzma::stream::Check::Crc32;
    let xz_stream = liblzma::stream::Stream::new_easy_encoder(1, check).unwrap();
    let options = liblzma::stream::LzmaOptions::new_preset(1).unwrap();
    let lzma_stream = liblzma::stream::Stream::new_lzma_encoder(&options).unwrap();
    vec![
        ("gzip", gzip(archive)),
        ("bzip2", bzip2.finish().unwrap()),
        ("xz", xz(archive, xz_stream)),
        ("lzma", xz(archive, lzma_stream)),
        ("zstd", zstd::encode_all(archive, 1).unwrap()),
        ("lz4", lz4_legacy(archive)),
    ]
}

#[test]
fn every_compression_comes_back_unpacked_and_patched() {
    let archive = cpio("070701", &[("bin/a", &program())]);
    let expected = prepare(archive.clone(), &QUIRK).unwrap().0;
    assert!(expected != archive);
    for (name, file) in compressed(&archive) {
        let (out, report) = prepare(file, &QUIRK).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(out == expected, "{name}");
        assert_eq!(report.patches.len(), 1, "{name}");
    }
}

#[test]
fn compressed_archive_without_cpuid_stays_compressed() {
    for (name, file) in compressed(&cpio("070701", &[("etc/passwd", b"root")])) {
        let (out, report) = prepare(file.clone(), &QUIRK).unwrap();
        assert!(out == file && report.examined, "{name}");
    }
}

#[test]
fn archives_one_after_the_other_are_all_rewritten() {
    let archive = cpio("070701", &[("a", &program()), ("odd", b"12345")]);
    for (name, packed) in compressed(&archive) {
        // A plain one, zeros, a compressed one; all but lz4 say where they end, so that more may follow.
        let mut file = archive.clone();
        file.extend([0; 516]);
        file.extend(&packed);
        let mut parts = 2;
        if name != "lz4" {
            file.resize(file.len().next_multiple_of(4) + 8, 0);
            file.extend(&archive);
            file.extend(&packed);
            parts = 4;
        }
        let (out, report) = prepare(file, &QUIRK).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(report.patches.len(), parts, "{name}");
        let again = examine(&out).unwrap();
        assert_eq!(again.programs.len(), parts, "{name}");
        assert_eq!(again.patches, [], "{name}: nothing is left to rewrite");
    }
}

#[test]
fn damaged_archives_are_refused_with_the_place() {
    let good = cpio("070701", &[("bin/a", &program())]);
    for len in 1..good.len() - 130 {
        assert!(
            prepare(good[..len].to_vec(), &QUIRK).is_err(),
            "{len} bytes"
        );
    }
    let mut bad = good.clone();
    bad[54..62].copy_from_slice(b"FFFFFFFF");
    assert_eq!(
        prepare(bad, &QUIRK).unwrap_err().to_string(),
        "initial RAM disk: damaged cpio entry at byte 0: the data are cut off"
    );
    let mut bad = good.clone();
    bad[60] = b'x';
    assert_eq!(
        prepare(bad, &QUIRK).unwrap_err().to_string(),
        "initial RAM disk: damaged cpio entry at byte 0: a field of the header is no number"
    );
    let mut bad = good.clone();
    bad.extend(b"junk");
    assert_eq!(
        prepare(bad, &QUIRK).unwrap_err().to_string(),
        format!(
            "initial RAM disk: neither cpio nor a known compression at byte {}: [6a, 75, 6e, 6b]",
            good.len()
        )
    );
    let mut bad = gzip(&good);
    let last = bad.len() - 1;
    bad[last] ^= 1;
    assert!(matches!(
        prepare(bad, &QUIRK),
        Err(Error::Decompress { format: "gzip", .. })
    ));
    assert!(matches!(
        prepare(b"\x89LZO\0\r\n\x1a\n".to_vec(), &QUIRK),
        Err(Error::Unsupported { name: "lzo" })
    ));
}

#[test]
fn unpacked_size_is_bounded() {
    let bomb = zstd::encode_all(std::io::repeat(0).take(1 << 20), 1).unwrap();
    assert!(matches!(
        streams::decompress(&bomb, (1 << 20) - 1),
        Err(Error::TooLarge { .. })
    ));
    assert_eq!(
        streams::decompress(&bomb, 1 << 20).unwrap().0.len(),
        1 << 20
    );
}

#[test]
fn id_follows_archive_and_patches() {
    let archive = cpio("070701", &[("bin/a", &program())]);
    let other = cpio("070701", &[("bin/b", &program())]);
    let id = |archive: &[u8], quirks| prepare(archive.to_vec(), &quirks).unwrap().1.id;
    assert_eq!(id(&archive, QUIRK), id(&archive, QUIRK));
    assert_eq!(id(&archive, QUIRK), examine(&archive).unwrap().id);
    assert_ne!(id(&archive, QUIRK), id(&archive, QuirkSet::default()));
    assert_ne!(id(&archive, QUIRK), id(&other, QUIRK));
    let plan = crate::PlanId([7; 32]);
    let both = plan.with_initramfs(&id(&archive, QUIRK));
    assert_ne!(both, plan);
    assert_ne!(both, plan.with_initramfs(&id(&other, QUIRK)));
}
