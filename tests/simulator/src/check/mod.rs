//! What must hold, judged apart from the world that runs: from what leaves it, not from what it intends.
//!
//! | promise | where |
//! |---|---|
//! | the world sees one machine: no packet contradicts another, no answer is older than one before | [`world`] |
//! | an epoch has one owner, the one that its record names; records follow from the one before | [`epochs`] |
//! | nothing is released before a live replica has it; a takeover has all of that, and the same state | [`log`] |
//! | the guest reads from its disk what it wrote, and the image ends up as it believes | `sim::heal`, the guest |
//! | a machine that is started anew finds on its disk what clients were told | [`world`] |
//! | virtual time neither jumps nor runs away; the backup stays close | [`log`] |
//! | the last copy of the VM is not thrown away, a drained session not resumed | [`epochs`] |

pub(crate) mod epochs;
pub(crate) mod log;
pub(crate) mod world;

use std::collections::BTreeMap;
use std::fmt::Arguments;

use format::{Epoch, SessionId};

use crate::guest::{KEYS, Packet};

/// A promise that was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Which one: a word.
    pub kind: &'static str,
    /// When, in simulated ns.
    pub at: u64,
    /// What was seen.
    pub what: String,
}

/// The judges.
#[derive(Debug)]
pub(crate) struct Checker {
    pub(crate) violation: Option<Violation>,
    /// A replica was made to diverge on purpose.
    pub(crate) corrupted: bool,
    /// Records that an operator allowed a cold start on.
    pub(crate) forced: Vec<Epoch>,
    sessions: BTreeMap<SessionId, log::Session>,
    owners: BTreeMap<Epoch, u32>,
    records: BTreeMap<Epoch, ft::EpochRecord>,
    claims: BTreeMap<ft::Nonce, (u32, ft::HostId)>,
    closed: Vec<(u32, SessionId)>,
    packets: Vec<Packet>,
    life: u64,
    released: Vec<(u32, u64)>,
    times: Vec<(u64, u64, u64)>,
    answers: [world::Key; KEYS],
    floors: [u64; crate::guest::CLIENTS],
}

impl Checker {
    pub(crate) fn new() -> Self {
        Self {
            violation: None,
            corrupted: false,
            forced: Vec::new(),
            sessions: BTreeMap::new(),
            owners: BTreeMap::new(),
            records: BTreeMap::new(),
            claims: BTreeMap::new(),
            closed: Vec::new(),
            packets: Vec::new(),
            life: 0,
            released: Vec::new(),
            times: Vec::new(),
            answers: Default::default(),
            floors: Default::default(),
        }
    }

    /// Keeps the first.
    pub(crate) fn violated(&mut self, kind: &'static str, at: u64, what: Arguments<'_>) {
        if self.violation.is_none() {
            let what = what.to_string();
            self.violation = Some(Violation { kind, at, what });
        }
    }
}
