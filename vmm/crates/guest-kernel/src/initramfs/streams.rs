//! From the file of an initial RAM disk to one uncompressed archive.
//!
//! Linux takes any sequence of archives, compressed or not, with zeros between them (a microcode archive
//! in front of a compressed one is common). What always holds: the result has every part at a multiple
//! of four bytes, as the format wants it, and is at most [`MAX_INITRAMFS_BYTES`] long. Magic numbers:
//! lib/decompress.c of Linux.

use std::borrow::Cow;
use std::io::{BufRead, Error as IoError, ErrorKind, Read};

use super::archive;
use super::error::Error;
use crate::bytes::u32_at;

/// Largest unpacked initial RAM disk that is accepted, in bytes.
pub const MAX_INITRAMFS_BYTES: usize = 1 << 30;
/// Memory that the xz and lzma decoders may use, in bytes.
const DECODER_MEMORY_BYTES: u64 = 512 << 20;

const LZ4_LEGACY: [u8; 4] = 0x184c_2102u32.to_le_bytes();
/// A block of an LZ4 legacy stream unpacks to at most this many bytes.
const LZ4_BLOCK_BYTES: usize = 8 << 20;

#[derive(Debug, Clone, Copy)]
enum Format {
    Gzip,
    Bzip2,
    Lzma,
    Xz,
    Lz4,
    Zstd,
    Lzo,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Format::Gzip => "gzip",
            Format::Bzip2 => "bzip2",
            Format::Lzma => "lzma",
            Format::Xz => "xz",
            Format::Lz4 => "lz4",
            Format::Zstd => "zstd",
            Format::Lzo => "lzo",
        }
    }

    fn of(bytes: &[u8]) -> Option<Format> {
        let known: [(&[u8], Format); 8] = [
            (b"\x1f\x8b", Format::Gzip),
            (b"\x1f\x9e", Format::Gzip),
            (b"BZh", Format::Bzip2),
            (b"\x5d\x00\x00", Format::Lzma),
            (b"\xfd7zXZ\0", Format::Xz),
            (&LZ4_LEGACY, Format::Lz4),
            (b"\x28\xb5\x2f\xfd", Format::Zstd),
            (b"\x89LZO", Format::Lzo),
        ];
        known
            .iter()
            .find(|(magic, _)| bytes.starts_with(magic))
            .map(|(_, format)| *format)
    }
}

/// The parts of `file` as one archive; `None` if it is one already.
pub(super) fn unpack(file: &[u8]) -> Result<Option<Vec<u8>>, Error> {
    let too_large = Error::TooLarge {
        limit: MAX_INITRAMFS_BYTES,
    };
    let mut parts: Vec<Cow<'_, [u8]>> = Vec::new();
    let mut room = MAX_INITRAMFS_BYTES;
    let mut at = archive::skip_zeros(file, 0);
    while at < file.len() {
        let part = if archive::starts(&file[at..]) {
            let end = archive::end(file, at)?;
            let part = Cow::Borrowed(&file[at..end]);
            at = end;
            part
        } else {
            let (bytes, used) = decompress(&file[at..], room).map_err(|error| match error {
                Error::Unknown { found, .. } => Error::Unknown { at, found },
                other => other,
            })?;
            at += used;
            Cow::Owned(bytes)
        };
        match room.checked_sub(part.len().next_multiple_of(4)) {
            Some(left) => room = left,
            None => return Err(too_large),
        }
        parts.push(part);
        at = archive::skip_zeros(file, at);
    }
    if parts.iter().all(|part| matches!(part, Cow::Borrowed(_))) {
        return Ok(None);
    }
    let mut flat = Vec::with_capacity(MAX_INITRAMFS_BYTES - room);
    for part in parts {
        flat.extend_from_slice(&part);
        flat.resize(flat.len().next_multiple_of(4), 0);
    }
    Ok(Some(flat))
}

/// Decompresses the stream at the start of `bytes`: what it holds, and how long it is itself.
pub(super) fn decompress(bytes: &[u8], limit: usize) -> Result<(Vec<u8>, usize), Error> {
    let format = Format::of(bytes).ok_or_else(|| Error::Unknown {
        at: 0,
        found: bytes[..bytes.len().min(8)].to_vec(),
    })?;
    let failed = |source| Error::Decompress {
        format: format.name(),
        source,
    };
    let (unpacked, rest) = match format {
        Format::Gzip => {
            let mut decoder = flate2::bufread::GzDecoder::new(bytes);
            let unpacked = read(&mut decoder, limit).map_err(failed)?;
            (unpacked, decoder.into_inner())
        }
        Format::Bzip2 => {
            let mut decoder = bzip2::bufread::BzDecoder::new(bytes);
            let unpacked = read(&mut decoder, limit).map_err(failed)?;
            (unpacked, decoder.into_inner())
        }
        Format::Lzma | Format::Xz => {
            let stream = match format {
                Format::Xz => liblzma::stream::Stream::new_stream_decoder(DECODER_MEMORY_BYTES, 0),
                _ => liblzma::stream::Stream::new_lzma_decoder(DECODER_MEMORY_BYTES),
            };
            let stream = stream.map_err(|error| failed(error.into()))?;
            let mut decoder = liblzma::bufread::XzDecoder::new_stream(bytes, stream);
            let unpacked = read(&mut decoder, limit).map_err(failed)?;
            (unpacked, decoder.into_inner())
        }
        Format::Zstd => {
            let decoder = zstd::stream::read::Decoder::with_buffer(bytes).map_err(failed)?;
            let mut decoder = decoder.single_frame();
            let unpacked = read(&mut decoder, limit).map_err(failed)?;
            (unpacked, decoder.finish())
        }
        Format::Lz4 => lz4_legacy(bytes, limit).map_err(failed)?,
        Format::Lzo => {
            return Err(Error::Unsupported {
                name: format.name(),
            });
        }
    };
    if unpacked.len() > limit {
        return Err(Error::TooLarge {
            limit: MAX_INITRAMFS_BYTES,
        });
    }
    Ok((unpacked, bytes.len() - rest.len()))
}

/// Reads to the end of the stream, or one byte more than `limit`.
fn read(decoder: &mut impl Read, limit: usize) -> Result<Vec<u8>, IoError> {
    let mut out = Vec::new();
    decoder.take(limit as u64 + 1).read_to_end(&mut out)?;
    Ok(out)
}

/// LZ4 legacy stream, the only LZ4 format that Linux takes here: magic, then blocks of (length, data).
/// The magic may come again between blocks; a length of zero, or the end of the file, ends the stream.
fn lz4_legacy(mut bytes: &[u8], limit: usize) -> Result<(Vec<u8>, &[u8]), IoError> {
    let bad = |what: &'static str| IoError::new(ErrorKind::InvalidData, what);
    let mut out = Vec::new();
    let mut block = vec![0; LZ4_BLOCK_BYTES];
    while out.len() <= limit && !bytes.is_empty() {
        let length = u32_at(bytes, 0).ok_or_else(|| bad("ends within a block's length"))?;
        if length == 0 {
            break;
        }
        bytes.consume(4);
        if length.to_le_bytes() == LZ4_LEGACY {
            continue;
        }
        let packed = bytes
            .get(..length as usize)
            .ok_or_else(|| bad("ends within a block"))?;
        let written = lz4_flex::block::decompress_into(packed, &mut block)
            .map_err(|error| IoError::new(ErrorKind::InvalidData, error))?;
        if written == 0 {
            return Err(bad("an empty block"));
        }
        out.extend_from_slice(&block[..written]);
        bytes.consume(packed.len());
    }
    Ok((out, bytes))
}
