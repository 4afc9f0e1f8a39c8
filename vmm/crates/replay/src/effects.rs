//! What the log says of what a machine makes happen: of output length and CRC, of requests the digest.

use devices::Effect;

use crate::Digest;

/// Length and CRC32C of the output that an exit made, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OutputSum {
    /// Bytes, each effect's own header included.
    pub bytes: u32,
    /// CRC32C of them.
    pub crc: u32,
}

impl OutputSum {
    /// Whether nothing was put out.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Takes in one effect, if it acts on the world outside.
    pub fn add(&mut self, effect: &Effect) {
        match effect {
            Effect::NetTx(frame) => self.put(1, 0, 0, frame),
            Effect::ConsoleTx(byte) => self.put(2, 0, 0, &[*byte]),
            Effect::DiskWrite { id, sector, data } => self.put(3, id.0, *sector, data),
            Effect::DiskFlush { id } => self.put(4, id.0, 0, &[]),
            Effect::PowerOff => self.put(5, 0, 0, &[]),
            Effect::Reset => self.put(6, 0, 0, &[]),
            Effect::DiskRead { .. } | Effect::EntropyWanted { .. } | Effect::NetOffloads(_) => {}
        }
    }

    fn put(&mut self, kind: u8, id: u64, sector: u64, data: &[u8]) {
        let mut header = [kind; 17];
        header[1..9].copy_from_slice(&id.to_le_bytes());
        header[9..17].copy_from_slice(&sector.to_le_bytes());
        self.crc = format::crc32c_append(self.crc, &header);
        self.crc = format::crc32c_append(self.crc, data);
        let len = u32::try_from(header.len() + data.len()).unwrap_or(u32::MAX);
        self.bytes = self.bytes.saturating_add(len);
    }
}

/// Takes a request into the digest that is no output, so that no [`OutputSum`] covers it.
pub(crate) fn fold_request(digest: &mut Digest, effect: &Effect) {
    let words = match effect {
        Effect::DiskRead { id, sector, len } => [1, id.0, *sector, u64::from(*len)],
        Effect::EntropyWanted { id, len } => [2, id.0, 0, u64::from(*len)],
        Effect::NetOffloads(offloads) => {
            let bits = [
                offloads.checksum,
                offloads.tso4,
                offloads.tso6,
                offloads.ecn,
            ];
            let bits = bits.iter().fold(0, |all, bit| all << 1 | u64::from(*bit));
            [3, 0, 0, bits]
        }
        Effect::NetTx(_)
        | Effect::ConsoleTx(_)
        | Effect::DiskWrite { .. }
        | Effect::DiskFlush { .. }
        | Effect::PowerOff
        | Effect::Reset => return,
    };
    words.into_iter().for_each(|word| digest.fold(word));
}

/// Whether `effect` acts on the world outside, so that it waits for the backup's acknowledgement.
#[must_use]
pub(crate) fn is_output(effect: &Effect) -> bool {
    !matches!(
        effect,
        Effect::DiskRead { .. } | Effect::EntropyWanted { .. } | Effect::NetOffloads(_)
    )
}

#[cfg(test)]
mod tests {
    use devices::{NetOffloads, RequestId};

    use super::*;

    fn digest_after(effect: &Effect) -> Digest {
        let mut digest = Digest::default();
        fold_request(&mut digest, effect);
        digest
    }

    #[test]
    fn every_effect_is_in_the_sum_of_outputs_or_in_the_digest() {
        let id = RequestId(7);
        let effects = [
            Effect::NetTx(vec![1]),
            Effect::ConsoleTx(1),
            Effect::DiskWrite {
                id,
                sector: 2,
                data: vec![3; 512].into(),
            },
            Effect::DiskFlush { id },
            Effect::PowerOff,
            Effect::Reset,
            Effect::DiskRead {
                id,
                sector: 2,
                len: 512,
            },
            Effect::EntropyWanted { id, len: 8 },
            Effect::NetOffloads(NetOffloads::default()),
        ];
        for effect in &effects {
            let mut sum = OutputSum::default();
            sum.add(effect);
            let in_digest = digest_after(effect) != Digest::default();
            assert_eq!(sum.is_empty(), in_digest, "{effect:?}");
            assert_eq!(is_output(effect), !in_digest, "{effect:?}");
        }
    }

    #[test]
    fn requests_that_differ_give_other_digests() {
        let read = |id, sector, len| {
            digest_after(&Effect::DiskRead {
                id: RequestId(id),
                sector,
                len,
            })
        };
        assert_ne!(read(1, 2, 512), read(1, 3, 512));
        assert_ne!(read(1, 2, 512), read(1, 2, 1024));
        assert_ne!(read(1, 2, 512), read(2, 2, 512));
        let entropy = |len| {
            digest_after(&Effect::EntropyWanted {
                id: RequestId(1),
                len,
            })
        };
        assert_ne!(entropy(8), entropy(16));
        let offloads = |tso4, tso6| {
            digest_after(&Effect::NetOffloads(NetOffloads {
                tso4,
                tso6,
                ..NetOffloads::default()
            }))
        };
        assert_ne!(offloads(true, false), offloads(false, true));
    }
}
