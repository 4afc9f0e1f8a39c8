//! The envelope of what this crate stores and sends: magic, version, length and checksum first.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic |
//! | 4 | 2 | version |
//! | 6 | 2 | zero |
//! | 8 | 4 | length of the body in bytes |
//! | 12 | 4 | CRC32C of the 12 bytes before and of the body |
//!
//! The body is postcard. All numbers are little-endian.

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// Bytes before the body.
pub const ENVELOPE_LEN: usize = 16;

/// Why bytes are not what they should be.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum WireError {
    /// More bytes are needed.
    #[error("truncated: {needed} bytes needed, {got} there")]
    Truncated {
        /// Bytes needed.
        needed: usize,
        /// Bytes there.
        got: usize,
    },
    /// Something else altogether.
    #[error("bad magic {0:02x?}")]
    Magic([u8; 4]),
    /// Another version.
    #[error("version {found}, this build reads {expected}")]
    Version {
        /// The version found.
        found: u16,
        /// The version of this build.
        expected: u16,
    },
    /// Longer than allowed.
    #[error("{len} bytes, the limit is {limit}")]
    TooLong {
        /// The length claimed.
        len: usize,
        /// The limit.
        limit: usize,
    },
    /// Damaged, or of a shape that this version does not know.
    #[error("damaged: {0}")]
    Damaged(&'static str),
}

/// One kind of enveloped body.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Envelope {
    pub(crate) magic: [u8; 4],
    pub(crate) version: u16,
    pub(crate) max_len: usize,
}

impl Envelope {
    pub(crate) fn encode<T: Serialize>(&self, body: &T) -> Vec<u8> {
        let mut out = vec![0; ENVELOPE_LEN];
        out = postcard::to_extend(body, out).expect("a Vec takes every byte");
        let len = out.len() - ENVELOPE_LEN;
        assert!(len <= self.max_len, "a body is bounded by its fields");
        out[0..4].copy_from_slice(&self.magic);
        out[4..6].copy_from_slice(&self.version.to_le_bytes());
        out[8..12].copy_from_slice(&(len as u32).to_le_bytes());
        let crc = checksum(&out);
        out[12..16].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Takes one body off the front of `bytes`, which stand where they stood on an error.
    pub(crate) fn decode<T: DeserializeOwned>(&self, bytes: &mut &[u8]) -> Result<T, WireError> {
        let truncated = |needed| WireError::Truncated {
            needed,
            got: bytes.len(),
        };
        let head: &[u8; ENVELOPE_LEN] = bytes.first_chunk().ok_or(truncated(ENVELOPE_LEN))?;
        let magic = [head[0], head[1], head[2], head[3]];
        if magic != self.magic {
            return Err(WireError::Magic(magic));
        }
        let version = u16::from_le_bytes([head[4], head[5]]);
        if version != self.version {
            return Err(WireError::Version {
                found: version,
                expected: self.version,
            });
        }
        let len = u32::from_le_bytes([head[8], head[9], head[10], head[11]]) as usize;
        if len > self.max_len {
            return Err(WireError::TooLong {
                len,
                limit: self.max_len,
            });
        }
        let whole = ENVELOPE_LEN + len;
        let message = bytes.get(..whole).ok_or(truncated(whole))?;
        let crc = u32::from_le_bytes([head[12], head[13], head[14], head[15]]);
        if crc != checksum(message) {
            return Err(WireError::Damaged("checksum"));
        }
        let (body, rest) = postcard::take_from_bytes(&message[ENVELOPE_LEN..])
            .map_err(|_| WireError::Damaged("body"))?;
        if !rest.is_empty() {
            return Err(WireError::Damaged("bytes left over"));
        }
        *bytes = &bytes[whole..];
        Ok(body)
    }
}

fn checksum(message: &[u8]) -> u32 {
    format::crc32c_append(format::crc32c(&message[..12]), &message[ENVELOPE_LEN..])
}
