//! What an arbiter is asked and answers. The arbiter itself does I/O and lives elsewhere; the steps
//! of the one that uses a directory are pure and stand in [`directory`](crate::directory).

use format::Epoch;
use serde::{Deserialize, Serialize};

use crate::names::Nonce;
use crate::record::EpochRecord;

/// Names one question to the arbiter; its answer carries it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct CallId(pub u64);

/// The record that a claim builds on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// Its epoch.
    pub epoch: Epoch,
    /// The attempt that made it.
    pub nonce: Nonce,
}

/// A question to the arbiter.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "made once in an epoch")]
pub enum ArbiterRequest {
    /// Which record is the newest?
    Newest,
    /// Make this record unless its epoch has one. The record before it is `base`: an arbiter that
    /// does not find that one there is not the one it should be, and answers
    /// [`ArbiterReply::Unreachable`]. Asked again with the same record after a lost answer, the
    /// answer is the same.
    TryWin {
        /// The record before; none for the first.
        base: Option<Base>,
        /// The record to make.
        record: EpochRecord,
    },
}

/// The arbiter's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ArbiterReply {
    /// The newest record, if there is one.
    Newest(Option<EpochRecord>),
    /// The record stands, durably.
    Won,
    /// The epoch's record is another one.
    Taken(EpochRecord),
    /// Unknown. It may have happened, may yet happen, or not: ask again.
    Unreachable(String),
}
