//! Finds the ELF file inside a kernel file and decompresses it.
//!
//! A bzImage is a boot sector with a setup header, a decompressor, and the compressed payload whose
//! place the header gives (Documentation/arch/x86/boot.rst, `payload_offset`, since protocol 2.08).
//! Running that decompressor in a guest whose ring 0 is emulated would take minutes; on the host it
//! takes a fraction of a second. All lengths are checked, and the output is bounded by
//! [`MAX_KERNEL_BYTES`].

use std::io::{Error, ErrorKind, Read};

use crate::bytes::{u16_at, u32_at};
use crate::error::ImageError;

/// Largest decompressed kernel that is accepted, in bytes. Debian's are 53 MB.
pub const MAX_KERNEL_BYTES: usize = 256 << 20;

/// Memory that the xz and lzma decoders may use, in bytes. Kernels use 32 to 128 MiB dictionaries.
const DECODER_MEMORY_BYTES: u64 = 512 << 20;

/// Offset of the setup header in a bzImage and in the boot parameters.
pub(crate) const SETUP_HEADER: usize = 0x1f1;

/// An uncompressed kernel and what came around it.
#[derive(Debug)]
pub struct Payload {
    /// The ELF file (it may be followed by relocation data, which is of no use here).
    pub vmlinux: Vec<u8>,
    /// The setup header of the bzImage (from offset 0x1f1), if the file was one.
    pub setup_header: Option<Vec<u8>>,
    /// How the payload was compressed.
    pub compression: Compression,
}

/// The compression formats of x86 kernels, and none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// A plain ELF file.
    None,
    /// gzip.
    Gzip,
    /// bzip2.
    Bzip2,
    /// Legacy lzma ("lzma alone").
    Lzma,
    /// xz.
    Xz,
    /// LZ4 legacy frames, as the kernel's build writes them, or the current frame format.
    Lz4,
    /// Zstandard.
    Zstd,
}

/// Unpacks a kernel file: a bzImage of any compression, or an ELF file as it is.
///
/// # Errors
/// [`ImageError`] if the file is something else, is cut off, or does not decompress.
pub fn unpack(file: &[u8]) -> Result<Payload, ImageError> {
    if file.starts_with(b"\x7fELF") {
        return Ok(Payload {
            vmlinux: file.to_vec(),
            setup_header: None,
            compression: Compression::None,
        });
    }
    if file.get(0x38..0x3c) == Some(b"ARM\x64") {
        return Err(ImageError::WrongMachine {
            machine: String::from("arm64"),
        });
    }
    if file.get(0x30..0x38) == Some(b"RISCV\0\0\0") {
        return Err(ImageError::WrongMachine {
            machine: String::from("riscv"),
        });
    }
    if file.get(0x202..0x206) != Some(b"HdrS") {
        return Err(ImageError::NotAKernel {
            hint: describe(file),
        });
    }
    unpack_bzimage(file)
}

fn unpack_bzimage(file: &[u8]) -> Result<Payload, ImageError> {
    let truncated = |what, need: u64| ImageError::Truncated {
        what,
        need,
        have: file.len() as u64,
    };
    let header_end = 0x202 + usize::from(file[0x201]);
    let header = file
        .get(SETUP_HEADER..header_end)
        .ok_or_else(|| truncated("the setup header", header_end as u64))?;
    let version = u16_at(file, 0x206).unwrap_or(0);
    let (Some(offset), Some(length)) = (u32_at(header, 0x57), u32_at(header, 0x5b)) else {
        return Err(truncated("the setup header", 0x250));
    };
    if version < 0x208 {
        let [minor, major] = version.to_le_bytes();
        return Err(ImageError::OldBootProtocol { major, minor });
    }
    // Zero means four sectors, for the sake of boot loaders from 1991.
    let setup_sectors = if header[0] == 0 {
        4
    } else {
        u64::from(header[0])
    };
    let start = (setup_sectors + 1) * 512 + u64::from(offset);
    let end = start + u64::from(length);
    let payload = usize::try_from(start)
        .ok()
        .zip(usize::try_from(end).ok())
        .and_then(|(start, end)| file.get(start..end))
        .ok_or_else(|| truncated("the compressed payload", end))?;
    let (vmlinux, compression) = decompress(payload)?;
    Ok(Payload {
        vmlinux,
        setup_header: Some(header.to_vec()),
        compression,
    })
}

fn describe(file: &[u8]) -> String {
    let known: [(&[u8], &str); 8] = [
        (b"\x1f\x8b", "a gzip file"),
        (b"\xfd7zXZ\0", "an xz file"),
        (b"BZh", "a bzip2 file"),
        (b"\x28\xb5\x2f\xfd", "a zstd file"),
        (b"!<arch>", "a Debian package or an archive"),
        (b"070701", "a cpio archive (an initial RAM disk?)"),
        (b"\xeb\x63\x90", "a boot sector"),
        (b"#!", "a script"),
    ];
    if file.is_empty() {
        return String::from("the file is empty");
    }
    known
        .iter()
        .find(|(magic, _)| file.starts_with(magic))
        .map_or_else(
            || {
                format!(
                    "neither bzImage nor ELF, it starts with {:02x?}",
                    &file[..file.len().min(8)]
                )
            },
            |(_, name)| format!("the file is {name}"),
        )
}

/// Decompresses a payload; its format is told by the first bytes.
fn decompress(payload: &[u8]) -> Result<(Vec<u8>, Compression), ImageError> {
    let (format, name) = detect(payload)?;
    let failed = |source| ImageError::Decompress {
        format: name,
        source,
    };
    let vmlinux = match format {
        Compression::None => payload.to_vec(),
        Compression::Gzip => read_bounded(flate2::read::GzDecoder::new(payload), failed)?,
        Compression::Bzip2 => read_bounded(bzip2::read::BzDecoder::new(payload), failed)?,
        Compression::Lzma => {
            let stream = liblzma::stream::Stream::new_lzma_decoder(DECODER_MEMORY_BYTES)
                .map_err(|e| failed(e.into()))?;
            read_bounded(
                liblzma::bufread::XzDecoder::new_stream(payload, stream),
                failed,
            )?
        }
        Compression::Xz => {
            let stream = liblzma::stream::Stream::new_stream_decoder(DECODER_MEMORY_BYTES, 0)
                .map_err(|e| failed(e.into()))?;
            read_bounded(
                liblzma::bufread::XzDecoder::new_stream(payload, stream),
                failed,
            )?
        }
        Compression::Lz4 if payload.starts_with(&LZ4_LEGACY) => lz4_legacy(payload)?,
        Compression::Lz4 => read_bounded(lz4_flex::frame::FrameDecoder::new(payload), failed)?,
        Compression::Zstd => {
            let decoder = zstd::stream::read::Decoder::new(payload)
                .map_err(failed)?
                .single_frame();
            read_bounded(decoder, failed)?
        }
    };
    if !vmlinux.starts_with(b"\x7fELF") {
        return Err(ImageError::NotAKernel {
            hint: String::from("the payload is no ELF file"),
        });
    }
    Ok((vmlinux, format))
}

const LZ4_LEGACY: [u8; 4] = 0x184c_2102u32.to_le_bytes();
const LZ4_FRAME: [u8; 4] = 0x184d_2204u32.to_le_bytes();
/// Every block of an LZ4 legacy frame but the last one unpacks to this many bytes.
const LZ4_LEGACY_BLOCK_BYTES: usize = 8 << 20;

fn detect(payload: &[u8]) -> Result<(Compression, &'static str), ImageError> {
    let known: [(&[u8], Compression, &str); 8] = [
        (b"\x7fELF", Compression::None, "plain"),
        (b"\x1f\x8b", Compression::Gzip, "gzip"),
        (b"BZh", Compression::Bzip2, "bzip2"),
        (b"\x5d\x00\x00", Compression::Lzma, "lzma"),
        (b"\xfd7zXZ\0", Compression::Xz, "xz"),
        (&LZ4_LEGACY, Compression::Lz4, "lz4"),
        (&LZ4_FRAME, Compression::Lz4, "lz4"),
        (b"\x28\xb5\x2f\xfd", Compression::Zstd, "zstd"),
    ];
    known
        .iter()
        .find(|(magic, _, _)| payload.starts_with(magic))
        .map(|(_, format, name)| (*format, *name))
        .ok_or_else(|| ImageError::UnknownCompression {
            magic: payload[..payload.len().min(8)].to_vec(),
        })
}

/// Reads to the end of the compressed stream. The kernel's build appends the unpacked size behind
/// most formats; the decoders here stop at the end of their stream and do not see it.
fn read_bounded(
    decoder: impl Read,
    failed: impl Fn(Error) -> ImageError,
) -> Result<Vec<u8>, ImageError> {
    let mut out = Vec::new();
    decoder
        .take(MAX_KERNEL_BYTES as u64 + 1)
        .read_to_end(&mut out)
        .map_err(failed)?;
    if out.len() > MAX_KERNEL_BYTES {
        return Err(ImageError::TooLarge {
            limit: MAX_KERNEL_BYTES,
        });
    }
    Ok(out)
}

/// LZ4 legacy frames: magic, then blocks of (compressed length, data), then the unpacked size that
/// the kernel's build appends. A magic number may come again between blocks.
fn lz4_legacy(payload: &[u8]) -> Result<Vec<u8>, ImageError> {
    let failed = |what: &'static str| ImageError::Decompress {
        format: "lz4",
        source: Error::new(ErrorKind::InvalidData, what),
    };
    let size = payload
        .len()
        .checked_sub(4)
        .and_then(|at| u32_at(payload, at))
        .and_then(|size| usize::try_from(size).ok())
        .ok_or_else(|| failed("no size at the end"))?;
    if size > MAX_KERNEL_BYTES {
        return Err(ImageError::TooLarge {
            limit: MAX_KERNEL_BYTES,
        });
    }
    let mut out = vec![0; size];
    let (mut from, mut to) = (LZ4_LEGACY.len(), 0);
    while to < size {
        let length = u32_at(payload, from).ok_or_else(|| failed("ends between blocks"))?;
        from += 4;
        if length.to_le_bytes() == LZ4_LEGACY {
            continue;
        }
        let end = from.saturating_add(length as usize);
        let block = payload
            .get(from..end)
            .ok_or_else(|| failed("ends within a block"))?;
        let room = size.min(to + LZ4_LEGACY_BLOCK_BYTES);
        let written = lz4_flex::block::decompress_into(block, &mut out[to..room]).map_err(|e| {
            ImageError::Decompress {
                format: "lz4",
                source: Error::new(ErrorKind::InvalidData, e),
            }
        })?;
        if written == 0 {
            return Err(failed("an empty block"));
        }
        (from, to) = (end, to + written);
    }
    Ok(out)
}

#[cfg(test)]
#[path = "payload_tests.rs"]
mod tests;
