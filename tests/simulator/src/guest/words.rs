//! What passes between the guest and its world: requests, packets, disk requests, and their bytes.

/// What a sector holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sector {
    /// Grows with every write of the key, over all lives of the VM.
    pub version: u64,
    /// The value.
    pub value: u64,
}

/// What a client asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Who asks.
    pub client: u8,
    /// Its number: one more for each request of the client.
    pub number: u32,
    /// The key.
    pub key: u8,
    /// The value to write; none to read.
    pub put: Option<u64>,
}

/// What the guest sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Packet {
    /// The life of the VM: a cold start begins another one.
    pub life: u64,
    /// Its place among the packets of this life.
    pub index: u64,
    /// The client's request that it answers.
    pub answers: Option<(u8, u32)>,
    /// What the key holds.
    pub sector: Sector,
    /// Mixed from everything that the guest has been through.
    pub digest: u64,
}

/// A disk request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Io {
    /// Names it.
    pub id: u64,
    /// The sector.
    pub key: u8,
    /// The data to write, captured when it was submitted; none to read.
    pub write: Option<Sector>,
    /// Whom to answer when it is done.
    pub(super) answers: Option<(u8, u32)>,
    /// The buffer in memory that the data was taken from.
    pub(super) slot: u8,
}

/// What leaves the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// A packet.
    Net(Packet),
    /// A disk request.
    Disk(Io),
}

impl Sector {
    /// The bytes of a read.
    #[must_use]
    pub fn encode(self) -> [u8; 16] {
        let mut out = [0; 16];
        out[..8].copy_from_slice(&self.version.to_le_bytes());
        out[8..].copy_from_slice(&self.value.to_le_bytes());
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Self {
        let word = |at: usize| {
            let word = bytes
                .get(at..at + 8)
                .and_then(|bytes| bytes.first_chunk::<8>());
            word.map_or(0, |word| u64::from_le_bytes(*word))
        };
        Self {
            version: word(0),
            value: word(8),
        }
    }
}

impl Request {
    /// The bytes of its packet.
    #[must_use]
    pub fn encode(&self) -> [u8; 15] {
        let mut out = [0; 15];
        out[0] = self.client;
        out[1] = self.key;
        out[2] = u8::from(self.put.is_some());
        out[3..7].copy_from_slice(&self.number.to_le_bytes());
        out[7..].copy_from_slice(&self.put.unwrap_or(0).to_le_bytes());
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; 15] = bytes.try_into().ok()?;
        let number = u32::from_le_bytes(*bytes[3..].first_chunk()?);
        let value = u64::from_le_bytes(*bytes[7..].first_chunk()?);
        Some(Self {
            client: bytes[0],
            key: bytes[1],
            number,
            put: (bytes[2] == 1).then_some(value),
        })
    }
}

/// Appends the bytes of what left at one exit: what its `Output` entry counts and sums.
pub fn encode_effects(effects: &[Effect], out: &mut Vec<u8>) {
    for effect in effects {
        match effect {
            Effect::Net(packet) => {
                let (client, number) = packet.answers.unwrap_or((255, 0));
                out.push(client);
                out.extend_from_slice(&number.to_le_bytes());
                out.extend_from_slice(&packet.index.to_le_bytes());
                out.extend_from_slice(&packet.sector.encode());
                out.extend_from_slice(&packet.digest.to_le_bytes());
            }
            Effect::Disk(io) => {
                out.push(io.key);
                out.extend_from_slice(&io.id.to_le_bytes());
                out.extend_from_slice(&io.write.unwrap_or_default().encode());
            }
        }
    }
}
