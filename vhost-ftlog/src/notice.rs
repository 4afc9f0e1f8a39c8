//! Notices: what the daemon tells the VMM through the event queue.
//!
//! A notice is 64 bytes: kind (4), reason (4), number (8), identity (16), the rest zero.

use format::Seq;
use serde::{Deserialize, Serialize};

use crate::config_space::BulkId;

/// Bytes of a notice.
pub const NOTICE_LEN: usize = 64;

/// Why a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LostReason {
    /// The peer closed it, or its process went away.
    PeerClosed,
    /// The network failed: reset, timeout, unreachable.
    Network,
    /// The peer sent what no correct peer sends: checksum, sequence, session.
    Protocol,
    /// A new connection of the same session took its place.
    Replaced,
    /// The VMM or the operator asked for it.
    Closed,
    /// The peer refused the session: it knows another one, or has lost its state.
    Refused,
}

/// What the daemon tells the VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    /// A connection is up; the log goes on from this append.
    Connected {
        /// The next append that the replica expects.
        resume: Seq,
    },
    /// The connection is gone; the daemon tries again until the session is closed.
    Lost(LostReason),
    /// The peer's VMM is dead. On the backup: all that it published is delivered, up to this append.
    PeerVmmDead {
        /// The append after the last one.
        next: Seq,
    },
    /// The daemon is about to end, and all that was published before is acknowledged.
    Drained,
    /// A bulk stream's socket can be fetched.
    BulkReady(BulkId),
    /// The VMM broke the rules of a ring; the session is stopped.
    Broken,
}

const KINDS: [LostReason; 6] = [
    LostReason::PeerClosed,
    LostReason::Network,
    LostReason::Protocol,
    LostReason::Replaced,
    LostReason::Closed,
    LostReason::Refused,
];

impl Notice {
    /// The notice's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; NOTICE_LEN] {
        let mut out = [0; NOTICE_LEN];
        let (kind, number) = match self {
            Self::Connected { resume } => (1, resume.0),
            Self::Lost(reason) => {
                let index = KINDS.iter().position(|kind| kind == reason);
                let code = index.expect("every reason is in the table") as u32;
                out[4..8].copy_from_slice(&code.to_le_bytes());
                (2, 0)
            }
            Self::PeerVmmDead { next } => (3, next.0),
            Self::Drained => (4, 0),
            Self::BulkReady(id) => {
                out[16..32].copy_from_slice(&id.0);
                (5, 0)
            }
            Self::Broken => (6, 0),
        };
        out[0..4].copy_from_slice(&u32::to_le_bytes(kind));
        out[8..16].copy_from_slice(&number.to_le_bytes());
        out
    }

    /// Reads a notice; `None` for one that this version does not know.
    #[must_use]
    pub fn decode(bytes: &[u8; NOTICE_LEN]) -> Option<Self> {
        let word = |at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().expect("64 bytes"));
        let number = u64::from_le_bytes(*bytes[8..].first_chunk().expect("64 bytes"));
        Some(match word(0) {
            1 => Self::Connected {
                resume: Seq(number),
            },
            2 => Self::Lost(*KINDS.get(word(4) as usize)?),
            3 => Self::PeerVmmDead { next: Seq(number) },
            4 => Self::Drained,
            5 => Self::BulkReady(BulkId(*bytes[16..].first_chunk().expect("64 bytes"))),
            6 => Self::Broken,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notices_round_trip() {
        let mut notices = vec![
            Notice::Connected { resume: Seq(7) },
            Notice::PeerVmmDead { next: Seq(8) },
            Notice::Drained,
            Notice::BulkReady(BulkId([9; 16])),
            Notice::Broken,
        ];
        notices.extend(KINDS.map(Notice::Lost));
        for notice in notices {
            assert_eq!(Notice::decode(&notice.encode()), Some(notice));
        }
        assert_eq!(Notice::decode(&[0xff; NOTICE_LEN]), None);
    }
}
