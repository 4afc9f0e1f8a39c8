//! Every compression is unpacked; damaged, foreign and oversized files are told apart.

use std::io::Write;

use super::*;

fn elf() -> Vec<u8> {
    let mut elf = b"\x7fELF".to_vec();
    elf.extend((0..200_000u32).flat_map(|i| (i / 7).to_le_bytes()));
    elf
}

fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0u8; 1024];
    file[0x1f1] = 1;
    file[0x201] = 0x6a;
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    file[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
    file[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
    file.extend([0xcc; 16]);
    file.extend(payload);
    file
}

/// What the kernel's build appends to formats that do not end with their size.
fn with_size(mut payload: Vec<u8>) -> Vec<u8> {
    payload.extend(u32::try_from(elf().len()).unwrap().to_le_bytes());
    payload
}

fn lz4_legacy_file() -> Vec<u8> {
    let mut out = LZ4_LEGACY.to_vec();
    let block = lz4_flex::block::compress(&elf());
    out.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
    out.extend(block);
    with_size(out)
}

fn lzma_alone() -> Vec<u8> {
    let options = liblzma::stream::LzmaOptions::new_preset(6).unwrap();
    let stream = liblzma::stream::Stream::new_lzma_encoder(&options).unwrap();
    let mut out = Vec::new();
    liblzma::bufread::XzEncoder::new_stream(&elf()[..], stream)
        .read_to_end(&mut out)
        .unwrap();
    with_size(out)
}

#[test]
fn every_compression_is_unpacked() {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&elf()).unwrap();
    let mut bzip2 = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
    bzip2.write_all(&elf()).unwrap();
    let mut xz = Vec::new();
    liblzma::bufread::XzEncoder::new(&elf()[..], 1)
        .read_to_end(&mut xz)
        .unwrap();
    let mut lz4_frame = lz4_flex::frame::FrameEncoder::new(Vec::new());
    lz4_frame.write_all(&elf()).unwrap();
    let cases = [
        (Compression::None, elf()),
        (Compression::Gzip, gzip.finish().unwrap()),
        (Compression::Bzip2, with_size(bzip2.finish().unwrap())),
        (Compression::Lzma, lzma_alone()),
        (Compression::Xz, with_size(xz)),
        (Compression::Lz4, lz4_legacy_file()),
        (Compression::Lz4, lz4_frame.finish().unwrap()),
        (
            Compression::Zstd,
            with_size(zstd::encode_all(&elf()[..], 1).unwrap()),
        ),
    ];
    for (compression, payload) in cases {
        let unpacked =
            unpack(&bzimage(&payload)).unwrap_or_else(|e| panic!("{compression:?}: {e}"));
        assert_eq!(unpacked.compression, compression);
        assert!(unpacked.vmlinux == elf(), "{compression:?}: other bytes");
        assert_eq!(
            unpacked.setup_header.map(|header| header.len()),
            Some(0x11 + 0x6a)
        );
    }
}

#[test]
fn elf_file_is_taken_as_it_is() {
    let unpacked = unpack(&elf()).unwrap();
    assert!(unpacked.vmlinux == elf() && unpacked.setup_header.is_none());
}

#[test]
fn truncated_file_says_how_much_is_missing() {
    let file = bzimage(&lz4_legacy_file());
    let error = unpack(&file[..file.len() - 1]).unwrap_err();
    let expected = format!(
        "truncated kernel: the compressed payload needs {} bytes, the file has {}",
        file.len(),
        file.len() - 1
    );
    assert_eq!(error.to_string(), expected);
}

#[test]
fn every_short_prefix_is_an_error() {
    let file = bzimage(&lz4_legacy_file());
    for len in 0..1100 {
        assert!(
            unpack(&file[..len]).is_err(),
            "{len} bytes were taken for a kernel"
        );
    }
}

#[test]
fn damaged_payload_is_an_error() {
    let mut payload = lz4_legacy_file();
    payload[4] ^= 0x40;
    let error = unpack(&bzimage(&payload)).unwrap_err();
    assert!(
        matches!(error, ImageError::Decompress { format: "lz4", .. }),
        "{error}"
    );
}

#[test]
fn announced_size_is_bounded() {
    let mut payload = lz4_legacy_file();
    let at = payload.len() - 4;
    payload[at..].copy_from_slice(&u32::MAX.to_le_bytes());
    let error = unpack(&bzimage(&payload)).unwrap_err();
    assert!(matches!(error, ImageError::TooLarge { .. }), "{error}");
}

#[test]
fn foreign_files_are_named() {
    let mut arm64 = vec![0; 1024];
    arm64[0x38..0x3c].copy_from_slice(b"ARM\x64");
    let cases: [(&[u8], &str); 5] = [
        (&arm64, "a kernel for arm64, not for x86-64"),
        (b"", "not a Linux kernel for x86-64: the file is empty"),
        (
            b"070701000",
            "not a Linux kernel for x86-64: the file is a cpio archive (an initial RAM disk?)",
        ),
        (
            b"\x1f\x8b\x08",
            "not a Linux kernel for x86-64: the file is a gzip file",
        ),
        (
            b"hello",
            "not a Linux kernel for x86-64: neither bzImage nor ELF, it starts with [68, 65, 6c, 6c, 6f]",
        ),
    ];
    for (file, expected) in cases {
        assert_eq!(unpack(file).unwrap_err().to_string(), expected);
    }
}

#[test]
fn unknown_compression_shows_its_magic() {
    let error = unpack(&bzimage(b"LZO\x01\x02\x03\x04\x05\x06")).unwrap_err();
    assert!(
        matches!(error, ImageError::UnknownCompression { .. }),
        "{error}"
    );
}

#[test]
fn old_boot_protocol_is_refused() {
    let mut file = bzimage(&elf());
    file[0x206] = 7;
    let error = unpack(&file).unwrap_err();
    assert_eq!(
        error.to_string(),
        "boot protocol 2.07 is too old: 2.08 or newer is needed"
    );
}
