//! Messages between the VMMs of two hosts, outside the log.
//!
//! The driver carries them over an authenticated stream, in order within one connection; the stream
//! may break at any time and what was on its way is lost. So every message that matters is sent
//! again until its effect is seen, every handler bears repetition, and each message names the
//! session or the question that it belongs to.

use format::{Epoch, ExitNumber, Seq, SessionId};
use serde::{Deserialize, Serialize};

use crate::detector::Cause;
use crate::fingerprint::{Difference, Fingerprint};
use crate::names::Nonce;
use crate::wire::{Envelope, WireError};

/// The longest message, in bytes, without its envelope.
pub const MAX_MESSAGE_LEN: usize = 128 * 1024;
/// The longest text in a report of a divergence, in bytes.
pub const MAX_REPORT_LEN: usize = 16 * 1024;
/// The version of the messages that this build speaks.
pub const PEER_VERSION: u16 = 1;

const ENVELOPE: Envelope = Envelope {
    magic: *b"PLXP",
    version: PEER_VERSION,
    max_len: MAX_MESSAGE_LEN,
};

/// What one VMM says to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PeerMessage {
    /// Primary: be my backup in this session. Sent again until answered.
    Join {
        /// The new session.
        session: SessionId,
        /// The primary's epoch.
        epoch: Epoch,
        /// What must match.
        fingerprint: Fingerprint,
    },
    /// Standby: ready to load the state.
    Accepted {
        /// The session.
        session: SessionId,
    },
    /// Standby: no.
    Refused {
        /// The session.
        session: SessionId,
        /// Why.
        why: Refusal,
    },
    /// Standby: how far it is. Sent again and again until protection is committed.
    Synced {
        /// The session.
        session: SessionId,
        /// Bytes of state received.
        bytes: u64,
        /// Replayed up to here, once the state is complete.
        replayed: Option<Seq>,
    },
    /// Primary: my outputs are held from here on; confirm that you have everything below. Sent again
    /// until confirmed.
    Confirm {
        /// The session.
        session: SessionId,
        /// Every append below this.
        upto: Seq,
    },
    /// Standby: my state is complete and I have replayed everything below.
    Confirmed {
        /// The session.
        session: SessionId,
        /// Every append below this.
        upto: Seq,
    },
    /// Primary, now and then: where it is.
    Progress {
        /// The session.
        session: SessionId,
        /// Its newest epoch.
        epoch: Epoch,
        /// Whether that epoch's record names the backup.
        named: bool,
        /// The effects of everything below are out in the world.
        released: Seq,
    },
    /// Primary: compete for my role. Sent again until answered by deeds.
    TakeOver {
        /// The session.
        session: SessionId,
        /// Why.
        why: Relief,
    },
    /// Primary: the session is over, and you are not in the newest record.
    Dropped {
        /// The session.
        session: SessionId,
        /// The primary's epoch.
        epoch: Epoch,
        /// The VM is powered off and that epoch's record closed.
        closed: bool,
    },
    /// Backup: the session is over; I have nothing and compete for nothing.
    GaveUp {
        /// The session.
        session: SessionId,
        /// Why.
        cause: Cause,
        /// Where it diverged, if it did.
        report: Option<DivergenceReport>,
    },
    /// Anybody: what do you hold of this VM?
    StateQuery {
        /// Names the question.
        nonce: Nonce,
        /// The asker's epoch, where it is the primary.
        epoch: Option<Epoch>,
    },
    /// The answer.
    StateReply {
        /// The question.
        nonce: Nonce,
        /// What is held.
        holds: Holds,
    },
}

/// What a host holds of the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holds {
    /// It has state of the VM, or may yet compete.
    pub state: bool,
    /// It has the world open, or I/O of an earlier role not yet drained.
    pub writes: bool,
}

impl Holds {
    /// Nothing at all.
    pub const NOTHING: Self = Self {
        state: false,
        writes: false,
    };
}

/// Why a standby refuses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// It is otherwise engaged.
    Busy,
    /// It could not replay this primary.
    Fingerprint(Vec<Difference>),
}

/// Why a primary wants to be relieved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Relief {
    /// A planned switch-over: the log ends with `SwitchOver`, below `end`, and all disk I/O is done.
    SwitchOver {
        /// The end of the log.
        end: Seq,
    },
    /// The primary's host cannot reach the storage. Only a backup that can is to take over.
    StorageLost,
}

/// Where and how a replica diverged (R7).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DivergenceReport {
    /// The exit at which it was noticed.
    pub exit: ExitNumber,
    /// The digest or checksum in the log.
    pub expected: u64,
    /// The replica's own.
    pub actual: u64,
    /// The entries around it and whatever else helps, for people; cut to [`MAX_REPORT_LEN`].
    pub text: String,
}

impl DivergenceReport {
    /// Cuts the text to its limit.
    pub(crate) fn bounded(mut self) -> Self {
        let mut end = self.text.len().min(MAX_REPORT_LEN);
        while !self.text.is_char_boundary(end) {
            end -= 1;
        }
        self.text.truncate(end);
        self
    }
}

impl PeerMessage {
    /// The bytes to send.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        ENVELOPE.encode(self)
    }

    /// Takes one message off the front of what was received.
    ///
    /// # Errors
    /// [`WireError::Truncated`] where more bytes are needed; on anything else the connection is to be
    /// closed. `bytes` then stands where it stood.
    pub fn decode(bytes: &mut &[u8]) -> Result<Self, WireError> {
        ENVELOPE.decode(bytes)
    }

    /// Its name in logs and traces.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Join { .. } => "Join",
            Self::Accepted { .. } => "Accepted",
            Self::Refused { .. } => "Refused",
            Self::Synced { .. } => "Synced",
            Self::Confirm { .. } => "Confirm",
            Self::Confirmed { .. } => "Confirmed",
            Self::Progress { .. } => "Progress",
            Self::TakeOver { .. } => "TakeOver",
            Self::Dropped { .. } => "Dropped",
            Self::GaveUp { .. } => "GaveUp",
            Self::StateQuery { .. } => "StateQuery",
            Self::StateReply { .. } => "StateReply",
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_round_trip_and_leave_what_follows() {
        let message = PeerMessage::TakeOver {
            session: SessionId([4; 16]),
            why: Relief::SwitchOver { end: Seq(9) },
        };
        let mut bytes = message.encode();
        bytes.extend_from_slice(b"next");
        let mut rest = bytes.as_slice();
        assert_eq!(PeerMessage::decode(&mut rest), Ok(message));
        assert_eq!(rest, b"next");
    }

    /// Golden bytes of version 1. A change here is a new version of the messages.
    #[test]
    fn golden_bytes_of_version_1() {
        let message = PeerMessage::Confirm {
            session: SessionId([5; 16]),
            upto: Seq(300),
        };
        let mut golden = b"PLXP\x01\0\0\0\x13\0\0\0".to_vec();
        golden.extend_from_slice(&GOLDEN_CRC);
        golden.push(4);
        golden.extend_from_slice(&[5; 16]);
        golden.extend_from_slice(&[0xac, 2]);
        assert_eq!(message.encode(), golden);
    }

    const GOLDEN_CRC: [u8; 4] = [215, 112, 157, 34];

    #[test]
    fn the_text_of_a_report_is_cut_at_a_character() {
        let report = DivergenceReport {
            exit: ExitNumber(1),
            expected: 1,
            actual: 2,
            text: "é".repeat(MAX_REPORT_LEN),
        };
        assert_eq!(report.bounded().text.len(), MAX_REPORT_LEN);
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = PeerMessage::decode(&mut bytes.as_slice());
            let mut framed = b"PLXP\x01\0\0\0".to_vec();
            framed.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
            let crc = format::crc32c_append(format::crc32c(&framed), &bytes);
            framed.extend_from_slice(&crc.to_le_bytes());
            framed.extend_from_slice(&bytes);
            let _ = PeerMessage::decode(&mut framed.as_slice());
        }
    }
}
