//! CRC-32C (Castagnoli's polynomial; RFC 3720, appendix B.4), by carry-less multiplication where the
//! processor has it (PCLMULQDQ, VPCLMULQDQ), else by tables.

use crc_fast::{CrcAlgorithm, Digest};

/// The checksum of some bytes.
#[inline]
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// The checksum of bytes that come behind those of which `crc` is the checksum; 0 of none.
#[inline]
#[must_use]
pub fn crc32c_append(crc: u32, bytes: &[u8]) -> u32 {
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, u64::from(!crc));
    digest.update(bytes);
    digest.finalize() as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn checksums_are_those_of_the_specification() {
        assert_eq!(crc32c(&[]), 0);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    /// Bit by bit, as the polynomial says.
    fn reference(crc: u32, bytes: &[u8]) -> u32 {
        const REFLECTED: u32 = 0x82f6_3b78;
        !bytes.iter().fold(!crc, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
                (crc >> 1) ^ if crc & 1 == 1 { REFLECTED } else { 0 }
            })
        })
    }

    proptest! {
        /// Lengths of all ways to compute it, of which processors have different ones.
        #[test]
        fn every_way_to_compute_it_gives_the_same(
            bytes in prop::collection::vec(any::<u8>(), 0..3000),
            skipped in 0usize..64,
            before in any::<u32>(),
        ) {
            let bytes = &bytes[skipped.min(bytes.len())..];
            prop_assert_eq!(crc32c(bytes), reference(0, bytes));
            prop_assert_eq!(crc32c_append(before, bytes), reference(before, bytes));
        }
    }

    #[test]
    fn parts_make_the_checksum_of_the_whole() {
        let whole: Vec<u8> = (0..70_000u32).map(|n| (n * 7 + n / 251) as u8).collect();
        for cut in [0, 1, 7, 63, 64, 255, 4096, 65_535, 70_000] {
            let (first, rest) = whole.split_at(cut);
            let appended = crc32c_append(crc32c(first), rest);
            assert_eq!(appended, crc32c(&whole), "cut at {cut}");
        }
    }
}
