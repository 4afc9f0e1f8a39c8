//! Epoch records (R14): who may act on the world, one record for each epoch, never deleted.
//!
//! A record is made by exactly one attempt, named by its nonce. The newest record says who may
//! compete for the next one; see [`crate::Standing`].

use format::{Epoch, SessionId};
use serde::{Deserialize, Serialize};

use crate::names::{HostId, Nonce};
use crate::quarantine::Quarantine;
use crate::wire::{Envelope, WireError};

/// The longest record, in bytes.
pub const MAX_RECORD_LEN: usize = 1 << 20;

const ENVELOPE: Envelope = Envelope {
    magic: *b"PLXE",
    version: 1,
    max_len: MAX_RECORD_LEN,
};

/// What a record allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Tenure {
    /// The owner acts, and has no backup.
    Alone,
    /// The owner acts; this backup may compete for the next epoch.
    Pair {
        /// The backup's host.
        backup: HostId,
        /// The session in which it follows.
        session: SessionId,
    },
    /// The VM is powered off. Nobody acts; anybody may start it.
    Closed,
}

/// The record of one epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// The epoch.
    pub epoch: Epoch,
    /// The attempt that made it.
    pub nonce: Nonce,
    /// Who won.
    pub owner: HostId,
    /// What it allows.
    pub tenure: Tenure,
    /// Sectors that are not in the image.
    pub quarantine: Quarantine,
}

impl EpochRecord {
    /// The bytes that an arbiter stores.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        ENVELOPE.encode(self)
    }

    /// Reads a stored record.
    ///
    /// # Errors
    /// What is wrong with it: a torn record is an error, never an older record.
    pub fn decode(mut bytes: &[u8]) -> Result<Self, WireError> {
        let record = ENVELOPE.decode(&mut bytes)?;
        if bytes.is_empty() {
            Ok(record)
        } else {
            Err(WireError::Damaged("bytes after the record"))
        }
    }

    /// Whether `host` may hold state of the VM by this record.
    #[must_use]
    pub fn names(&self, host: HostId) -> bool {
        match self.tenure {
            Tenure::Alone => self.owner == host,
            Tenure::Pair { backup, .. } => self.owner == host || backup == host,
            Tenure::Closed => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quarantine::SectorRange;

    fn record() -> EpochRecord {
        let mut quarantine = Quarantine::default();
        quarantine.put(SectorRange { first: 8, count: 2 }, Epoch(7));
        quarantine.suspect("castor".parse().unwrap());
        EpochRecord {
            epoch: Epoch(7),
            nonce: Nonce([9; 16]),
            owner: "pollux".parse().unwrap(),
            tenure: Tenure::Pair {
                backup: "helen".parse().unwrap(),
                session: SessionId([3; 16]),
            },
            quarantine,
        }
    }

    /// Golden bytes of version 1. A change here is a new version of the record.
    #[test]
    fn golden_bytes_of_version_1() {
        let mut golden = Vec::new();
        golden.extend_from_slice(b"PLXE\x01\0\0\0\x42\0\0\0");
        golden.extend_from_slice(&GOLDEN_CRC);
        golden.push(7);
        golden.extend_from_slice(&[9; 16]);
        golden.extend_from_slice(b"\x06pollux\x01\x05helen");
        golden.extend_from_slice(&[3; 16]);
        golden.extend_from_slice(b"\x01\x08\x02\x07\x01\x06castor");
        golden[8] = (golden.len() - 16) as u8;
        assert_eq!(record().encode(), golden);
        assert_eq!(EpochRecord::decode(&golden), Ok(record()));
    }

    const GOLDEN_CRC: [u8; 4] = [54, 2, 20, 244];

    #[test]
    fn a_torn_or_flipped_record_is_refused() {
        let bytes = record().encode();
        for len in 0..bytes.len() {
            assert!(EpochRecord::decode(&bytes[..len]).is_err());
        }
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(EpochRecord::decode(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_record_names_those_who_may_hold_state() {
        let mut record = record();
        let host = |name: &str| name.parse().unwrap();
        assert!(record.names(host("pollux")) && record.names(host("helen")));
        assert!(!record.names(host("castor")));
        record.tenure = Tenure::Alone;
        assert!(record.names(host("pollux")) && !record.names(host("helen")));
        record.tenure = Tenure::Closed;
        assert!(!record.names(host("pollux")));
    }
}
