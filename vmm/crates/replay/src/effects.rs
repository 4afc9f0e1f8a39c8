//! What the log says of a machine's output: its length and its CRC.

use devices::Effect;

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
        self.crc = crc32c::crc32c_append(self.crc, &header);
        self.crc = crc32c::crc32c_append(self.crc, data);
        let len = u32::try_from(header.len() + data.len()).unwrap_or(u32::MAX);
        self.bytes = self.bytes.saturating_add(len);
    }
}

/// Whether `effect` acts on the world outside, so that it waits for the backup's acknowledgement.
#[must_use]
pub(crate) fn is_output(effect: &Effect) -> bool {
    !matches!(
        effect,
        Effect::DiskRead { .. } | Effect::EntropyWanted { .. } | Effect::NetOffloads(_)
    )
}
