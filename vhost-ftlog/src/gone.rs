//! The record that takes the place of an acknowledgement when the backup's VMM is dead.
//!
//! 32 bytes: magic `PLXG`, the first four bytes of the session, zeros, CRC32C of the 28 bytes before.
//! Nothing follows it: what is received after it is not acknowledged.

use format::{ACK_LEN, SessionId};

const MAGIC: [u8; 4] = *b"PLXG";

/// The record's bytes.
#[must_use]
pub fn encode(session: SessionId) -> [u8; ACK_LEN] {
    let mut out = [0; ACK_LEN];
    out[0..4].copy_from_slice(&MAGIC);
    out[4..8].copy_from_slice(&session.0[..4]);
    let crc = format::crc32c(&out[..28]);
    out[28..].copy_from_slice(&crc.to_le_bytes());
    out
}

/// Whether these bytes are the record of this session.
#[must_use]
pub fn is(bytes: &[u8; ACK_LEN], session: SessionId) -> bool {
    *bytes == encode(session)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_is_known_by_every_bit() {
        let session = SessionId([5; 16]);
        let bytes = encode(session);
        assert!(is(&bytes, session));
        for bit in 0..ACK_LEN * 8 {
            let mut bad = bytes;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(!is(&bad, session), "bit {bit}");
        }
        assert!(!is(&bytes, SessionId([6; 16])));
    }
}
