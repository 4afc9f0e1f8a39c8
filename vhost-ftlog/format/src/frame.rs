//! Frames: a checksummed header, a body of whole appends back to back, the body's checksum.
//!
//! The header is 64 bytes, little-endian:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic `PLXL` |
//! | 4 | 2 | version |
//! | 6 | 2 | flags |
//! | 8 | 16 | session |
//! | 24 | 8 | epoch |
//! | 32 | 8 | sequence number of the first append |
//! | 40 | 4 | number of appends |
//! | 44 | 4 | length of the body in bytes |
//! | 48 | 8 | sender's monotonic clock when the frame was made, in ns; 0 where it has none |
//! | 56 | 4 | zero |
//! | 60 | 4 | CRC32C of the 60 bytes before |
//!
//! The body follows, then 4 bytes: the CRC32C of the body.

use crate::{Epoch, Error, MAX_BODY_LEN, MAX_COUNT, Seq, SessionId};

/// Bytes of a frame's header.
pub const HEADER_LEN: usize = 64;
/// Bytes after a frame's body.
pub const TRAILER_LEN: usize = 4;
/// The version of the format that this build writes and reads.
pub const VERSION: u16 = 2;

const MAGIC: u32 = u32::from_le_bytes(*b"PLXL");

/// What is special about a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FrameFlags(u16);

impl FrameFlags {
    /// An ordinary frame of log entries.
    pub const NONE: Self = Self(0);
    /// The log ends here for good: everything that was published stands before this frame, which has
    /// no appends itself.
    pub const END: Self = Self(1);
    /// The body describes the recording and holds no entries: the first frame of a file.
    pub const META: Self = Self(2);

    const KNOWN: u16 = 3;

    /// Whether all of `other`'s flags are set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// The fixed part of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// What is special about it.
    pub flags: FrameFlags,
    /// The pairing that it belongs to.
    pub session: SessionId,
    /// The sender's epoch.
    pub epoch: Epoch,
    /// The first append in the body.
    pub first: Seq,
    /// How many appends the body holds.
    pub count: u32,
    /// Bytes of the body.
    pub body_len: u32,
    /// The sender's monotonic clock in ns, for latency by stage; 0 where it has none.
    pub stamp_ns: u64,
}

impl FrameHeader {
    /// The header's bytes, checksum included.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[4..6].copy_from_slice(&VERSION.to_le_bytes());
        out[6..8].copy_from_slice(&self.flags.0.to_le_bytes());
        out[8..24].copy_from_slice(&self.session.0);
        out[24..32].copy_from_slice(&self.epoch.0.to_le_bytes());
        out[32..40].copy_from_slice(&self.first.0.to_le_bytes());
        out[40..44].copy_from_slice(&self.count.to_le_bytes());
        out[44..48].copy_from_slice(&self.body_len.to_le_bytes());
        out[48..56].copy_from_slice(&self.stamp_ns.to_le_bytes());
        let crc = crate::crc32c(&out[..60]);
        out[60..64].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads and validates a header. The checksum is checked before anything but magic and version
    /// is believed.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let header: &[u8; HEADER_LEN] = bytes.first_chunk().ok_or(Error::Truncated {
            needed: HEADER_LEN,
            got: bytes.len(),
        })?;
        let magic = u32_at(header, 0);
        if magic != MAGIC {
            return Err(Error::Magic(magic));
        }
        let version = u16_at(header, 4);
        if version != VERSION {
            return Err(Error::Version(version));
        }
        check("frame header", u32_at(header, 60), &header[..60])?;
        let flags = u16_at(header, 6);
        if flags & !FrameFlags::KNOWN != 0 || u32_at(header, 56) != 0 {
            return Err(Error::Field("frame header: unknown flag"));
        }
        let header = Self {
            flags: FrameFlags(flags),
            session: SessionId(*header[8..].first_chunk().expect("the header has 64 bytes")),
            epoch: Epoch(u64_at(header, 24)),
            first: Seq(u64_at(header, 32)),
            count: u32_at(header, 40),
            body_len: u32_at(header, 44),
            stamp_ns: u64_at(header, 48),
        };
        limit(
            "length of a frame's body",
            header.body_len.into(),
            MAX_BODY_LEN as u64,
        )?;
        limit("appends in a frame", header.count.into(), MAX_COUNT.into())?;
        if header.first.0.checked_add(header.count.into()).is_none() {
            return Err(Error::Field("frame header: sequence number"));
        }
        let empty = header.count == 0 && header.body_len == 0;
        let plausible = match header.flags {
            FrameFlags::NONE => header.count > 0 && header.body_len > 0,
            FrameFlags::END => empty,
            FrameFlags::META => header.count == 0,
            _ => false,
        };
        if plausible {
            Ok(header)
        } else {
            Err(Error::Field("frame header: length for its flags"))
        }
    }

    /// Bytes of the whole frame.
    #[must_use]
    pub const fn frame_len(&self) -> usize {
        HEADER_LEN + self.body_len as usize + TRAILER_LEN
    }

    /// The sequence number after the last append of this frame.
    #[must_use]
    pub const fn next(&self) -> Seq {
        self.first.advance(self.count as u64)
    }
}

/// A whole frame, checked; the body is borrowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Its header.
    pub header: FrameHeader,
    /// Its appends, back to back.
    pub body: &'a [u8],
}

impl<'a> Frame<'a> {
    /// Takes one frame off the front of `bytes`.
    ///
    /// # Errors
    /// [`Error::Truncated`] where more bytes are needed; anything else is damage. `bytes` then stands
    /// where it stood.
    pub fn decode(bytes: &mut &'a [u8]) -> Result<Self, Error> {
        let header = FrameHeader::decode(bytes)?;
        let len = header.frame_len();
        if bytes.len() < len {
            return Err(Error::Truncated {
                needed: len,
                got: bytes.len(),
            });
        }
        let (frame, rest) = bytes.split_at(len);
        let (body, trailer) = frame[HEADER_LEN..].split_at(header.body_len as usize);
        check("frame body", u32_at(trailer, 0), body)?;
        *bytes = rest;
        Ok(Self { header, body })
    }
}

/// Appends the frame of `header` and `body` to `out`; the header's `body_len` is set from `body`.
pub fn encode_frame(mut header: FrameHeader, body: &[u8], out: &mut Vec<u8>) {
    assert!(
        body.len() <= MAX_BODY_LEN,
        "a frame's body is at most {MAX_BODY_LEN} bytes"
    );
    header.body_len = body.len() as u32;
    out.extend_from_slice(&header.encode());
    out.extend_from_slice(body);
    out.extend_from_slice(&crate::crc32c(body).to_le_bytes());
}

pub(crate) fn check(what: &'static str, expected: u32, bytes: &[u8]) -> Result<(), Error> {
    let found = crate::crc32c(bytes);
    if found == expected {
        Ok(())
    } else {
        Err(Error::Checksum {
            what,
            expected,
            found,
        })
    }
}

fn limit(what: &'static str, value: u64, limit: u64) -> Result<(), Error> {
    if value <= limit {
        Ok(())
    } else {
        Err(Error::Limit { what, value, limit })
    }
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(
        *bytes[at..]
            .first_chunk()
            .expect("the caller checked the length"),
    )
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(
        *bytes[at..]
            .first_chunk()
            .expect("the caller checked the length"),
    )
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(
        *bytes[at..]
            .first_chunk()
            .expect("the caller checked the length"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> FrameHeader {
        FrameHeader {
            flags: FrameFlags::NONE,
            session: SessionId(*b"0123456789abcdef"),
            epoch: Epoch(7),
            first: Seq(1000),
            count: 3,
            body_len: 0,
            stamp_ns: 5,
        }
    }

    /// Golden bytes of version 2. A change here is a new version of the format.
    #[test]
    fn golden_bytes_of_version_2() {
        let mut bytes = Vec::new();
        encode_frame(header(), b"body", &mut bytes);
        let mut golden = Vec::new();
        golden.extend_from_slice(b"PLXL\x02\0\0\x000123456789abcdef");
        golden.extend_from_slice(&[7, 0, 0, 0, 0, 0, 0, 0, 0xe8, 3, 0, 0, 0, 0, 0, 0]);
        golden.extend_from_slice(&[3, 0, 0, 0, 4, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        golden.extend_from_slice(&GOLDEN_HEADER_CRC);
        golden.extend_from_slice(b"body");
        golden.extend_from_slice(&GOLDEN_BODY_CRC);
        assert_eq!(bytes, golden);
    }

    const GOLDEN_HEADER_CRC: [u8; 4] = [234, 142, 216, 4];
    const GOLDEN_BODY_CRC: [u8; 4] = [80, 201, 63, 38];

    #[test]
    fn a_frame_round_trips_and_leaves_what_follows() {
        let mut bytes = Vec::new();
        encode_frame(header(), b"body", &mut bytes);
        bytes.extend_from_slice(b"rest");
        let mut rest = bytes.as_slice();
        let frame = Frame::decode(&mut rest).unwrap();
        assert_eq!((frame.body, rest), (&b"body"[..], &b"rest"[..]));
        assert_eq!(
            frame.header,
            FrameHeader {
                body_len: 4,
                ..header()
            }
        );
        assert_eq!(frame.header.next(), Seq(1003));
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let mut bytes = Vec::new();
        encode_frame(header(), b"body", &mut bytes);
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Frame::decode(&mut bad.as_slice()).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn lengths_over_the_limit_are_refused_before_the_body_is_looked_at() {
        let big = FrameHeader {
            body_len: MAX_BODY_LEN as u32 + 1,
            ..header()
        };
        assert!(matches!(
            FrameHeader::decode(&big.encode()),
            Err(Error::Limit { .. })
        ));
        let end = FrameHeader {
            flags: FrameFlags::END,
            ..header()
        };
        assert!(FrameHeader::decode(&end.encode()).is_err());
    }
}
