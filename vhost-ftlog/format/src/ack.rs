//! Acknowledgement records: 32 bytes, fixed, alone on their direction of the connection.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic `PLXA` |
//! | 4 | 4 | first four bytes of the session |
//! | 8 | 8 | received: every append below this is published to the replica |
//! | 16 | 8 | replayed: every append below this has been replayed |
//! | 24 | 4 | zero |
//! | 28 | 4 | CRC32C of the 28 bytes before |

use crate::frame::{check, u32_at, u64_at};
use crate::{Error, Seq, SessionId};

/// Bytes of an acknowledgement record.
pub const ACK_LEN: usize = 32;

const MAGIC: u32 = u32::from_le_bytes(*b"PLXA");

/// How far the backup is. Both numbers only grow, and `replayed` is never above `received`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AckRecord {
    /// Every append below this is published to the replica.
    pub received: Seq,
    /// Every append below this has been replayed.
    pub replayed: Seq,
}

impl AckRecord {
    /// The record's bytes.
    #[must_use]
    pub fn encode(&self, session: SessionId) -> [u8; ACK_LEN] {
        let mut out = [0; ACK_LEN];
        out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[4..8].copy_from_slice(&session.0[..4]);
        out[8..16].copy_from_slice(&self.received.0.to_le_bytes());
        out[16..24].copy_from_slice(&self.replayed.0.to_le_bytes());
        let crc = crate::crc32c(&out[..28]);
        out[28..32].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads and validates a record of `session`.
    ///
    /// # Errors
    /// Damage, or a record of another session.
    pub fn decode(bytes: &[u8; ACK_LEN], session: SessionId) -> Result<Self, Error> {
        let magic = u32_at(bytes, 0);
        if magic != MAGIC {
            return Err(Error::Magic(magic));
        }
        check("acknowledgement", u32_at(bytes, 28), &bytes[..28])?;
        if bytes[4..8] != session.0[..4] {
            return Err(Error::Field("acknowledgement: session"));
        }
        let record = Self {
            received: Seq(u64_at(bytes, 8)),
            replayed: Seq(u64_at(bytes, 16)),
        };
        if record.replayed > record.received || u32_at(bytes, 24) != 0 {
            return Err(Error::Field("acknowledgement: replayed beyond received"));
        }
        Ok(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SESSION: SessionId = SessionId(*b"abcdefghijklmnop");

    #[test]
    fn round_trips_and_every_flipped_bit_is_noticed() {
        let record = AckRecord {
            received: Seq(300),
            replayed: Seq(2),
        };
        let bytes = record.encode(SESSION);
        assert_eq!(AckRecord::decode(&bytes, SESSION), Ok(record));
        for bit in 0..ACK_LEN * 8 {
            let mut bad = bytes;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(AckRecord::decode(&bad, SESSION).is_err(), "bit {bit}");
        }
        assert!(AckRecord::decode(&bytes, SessionId([0; 16])).is_err());
    }

    /// Golden bytes of version 1. A change here is a new version of the format.
    #[test]
    fn golden_bytes_of_version_1() {
        let bytes = AckRecord {
            received: Seq(0x0102),
            replayed: Seq(1),
        }
        .encode(SESSION);
        let mut golden = *b"PLXAabcd\x02\x01\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0????";
        golden[28..].copy_from_slice(&GOLDEN_CRC);
        assert_eq!(bytes, golden);
    }

    const GOLDEN_CRC: [u8; 4] = [214, 32, 32, 56];
}
