//! Layout of the eBPF maps: pages that processes map into memory, and values that only the probe
//! daemon writes.
//!
//! Every page has one writer, but for the words that say otherwise, so that no process can spoil
//! another's counter. All fields are 64-bit words in the host's byte order: the pages never leave the
//! host. Zero bytes are a valid page in which nothing has happened yet.

use core::sync::atomic::{AtomicU64, Ordering, fence};

use crate::key::{Key, KeyGeneration, SessionKeys};

/// Sessions that one probe daemon serves at a time.
pub const MAX_SESSIONS: usize = 16;
/// Requests that can wait for their reply: older ones are answered in vain.
pub const WINDOW_SLOTS: usize = 64;

/// Page written by the VMM: its progress, and the requests its prober has sent.
#[derive(Debug, Default)]
#[repr(C)]
pub struct VmmPage {
    /// Ticked by the VMM's event loop, whether the guest is busy or idle.
    pub progress: AtomicU64,
    unused: [u64; 7],
    /// The requests still of interest, each at its sequence modulo [`WINDOW_SLOTS`].
    pub window: Window,
}

/// Page written by the channel daemon.
#[derive(Debug, Default)]
#[repr(C)]
pub struct DaemonPage {
    /// Ticked by the daemon's event loop.
    pub progress: AtomicU64,
}

/// The requests that a prober has sent, for the kernel to match replies against.
#[derive(Debug)]
#[repr(C)]
pub struct Window {
    slots: [WindowSlot; WINDOW_SLOTS],
}

impl Default for Window {
    fn default() -> Self {
        Self {
            slots: core::array::from_fn(|_| WindowSlot::default()),
        }
    }
}

/// One request that was sent.
#[derive(Debug, Default)]
#[repr(C)]
pub struct WindowSlot {
    /// Its sequence; 0 while the slot is being written. No request has sequence 0.
    sequence: AtomicU64,
    nonce: AtomicU64,
    /// When it was handed to the kernel, ns of CLOCK_MONOTONIC.
    sent_ns: AtomicU64,
    /// When it passed the egress probe, ns; 0 while it has not. Written by the kernel.
    departed_ns: AtomicU64,
}

impl Window {
    /// Notes a request before it is sent. Only the prober may call this.
    ///
    /// # Panics
    /// If `sequence` is 0.
    pub fn note(&self, sequence: u64, nonce: u64, sent_ns: u64) {
        assert_ne!(sequence, 0, "heartbeat sequences begin at 1");
        let slot = self.slot(sequence);
        slot.sequence.store(0, Ordering::Release);
        fence(Ordering::SeqCst);
        slot.nonce.store(nonce, Ordering::Relaxed);
        slot.sent_ns.store(sent_ns, Ordering::Relaxed);
        slot.departed_ns.store(0, Ordering::Relaxed);
        slot.sequence.store(sequence, Ordering::Release);
    }

    /// When the request with this sequence and nonce was sent, ns; `None` if it is not in the window.
    pub fn sent_ns(&self, sequence: u64, nonce: u64) -> Option<u64> {
        let slot = self.slot(sequence);
        (sequence != 0
            && slot.sequence.load(Ordering::Acquire) == sequence
            && slot.nonce.load(Ordering::Relaxed) == nonce)
            .then(|| slot.sent_ns.load(Ordering::Relaxed))
    }

    fn slot(&self, sequence: u64) -> &WindowSlot {
        &self.slots[(sequence % WINDOW_SLOTS as u64) as usize]
    }
}

/// What the kernel has seen of the peer in one session. Written by the kernel (`local` by the probe
/// daemon too); read by the VMM.
#[derive(Debug, Default)]
#[repr(C)]
pub struct SeenPage {
    /// Odd while `words` are being written.
    version: AtomicU64,
    words: [AtomicU64; SEEN_WORDS],
    /// [`ReplyFlags`](crate::ReplyFlags) of this host's own processes, as the next reply will carry them.
    pub local: AtomicU64,
    /// Highest sequence among the peer's requests that were answered.
    pub highest_request: AtomicU64,
    /// When the last good request of the peer arrived, ns; 0 before the first.
    pub heard_ns: AtomicU64,
    /// Requests of the peer that were answered.
    pub answered: AtomicU64,
}

const SEEN_WORDS: usize = 11;
/// How often a reader tries again while a reply is being written: the write takes far less than 1 us
/// and cannot be interrupted on its CPU.
const SNAPSHOT_TRIES: usize = 1_000;

/// The newest reply, as the kernel saw it arrive. Times are ns of this host's CLOCK_MONOTONIC unless
/// said otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SeenReply {
    /// Replies accepted so far; 0 means that the other fields say nothing.
    pub count: u64,
    /// Sequence of the request that it answers.
    pub sequence: u64,
    /// Nonce of that request.
    pub nonce: u64,
    /// When the kernel took it from the interface.
    pub arrived_ns: u64,
    /// When its request passed the egress probe; 0 if there is none.
    pub departed_ns: u64,
    /// When its request was handed to the kernel.
    pub sent_ns: u64,
    /// The responder's clock when it answered (the peer's CLOCK_MONOTONIC).
    pub peer_time_ns: u64,
    /// The responder's epoch.
    pub peer_epoch: u64,
    /// Progress counter of the peer's VMM.
    pub vmm_progress: u64,
    /// Progress counter of the peer's channel daemon.
    pub daemon_progress: u64,
    /// [`ReplyFlags`](crate::ReplyFlags).
    pub flags: u64,
}

impl SeenPage {
    /// The newest reply, whole; `None` if it kept being replaced while it was read.
    pub fn reply(&self) -> Option<SeenReply> {
        for _ in 0..SNAPSHOT_TRIES {
            let before = self.version.load(Ordering::Acquire);
            if before & 1 == 1 {
                core::hint::spin_loop();
                continue;
            }
            let w: [u64; SEEN_WORDS] =
                core::array::from_fn(|i| self.words[i].load(Ordering::Relaxed));
            fence(Ordering::Acquire);
            if self.version.load(Ordering::Relaxed) == before {
                return Some(SeenReply::from_words(w));
            }
        }
        None
    }

    /// Writes a reply as the kernel would. For a userspace prober; there may be one writer only.
    pub fn record(&self, reply: &SeenReply) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version | 1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        for (word, value) in self.words.iter().zip(reply.to_words()) {
            word.store(value, Ordering::Relaxed);
        }
        self.version
            .store((version | 1).wrapping_add(1), Ordering::Release);
    }
}

impl SeenReply {
    const fn from_words(w: [u64; SEEN_WORDS]) -> Self {
        Self {
            count: w[0],
            sequence: w[1],
            nonce: w[2],
            arrived_ns: w[3],
            departed_ns: w[4],
            sent_ns: w[5],
            peer_time_ns: w[6],
            peer_epoch: w[7],
            vmm_progress: w[8],
            daemon_progress: w[9],
            flags: w[10],
        }
    }

    const fn to_words(self) -> [u64; SEEN_WORDS] {
        [
            self.count,
            self.sequence,
            self.nonce,
            self.arrived_ns,
            self.departed_ns,
            self.sent_ns,
            self.peer_time_ns,
            self.peer_epoch,
            self.vmm_progress,
            self.daemon_progress,
            self.flags,
        ]
    }

    /// The peer's clock minus this host's, ns, and how far off that can be: the reply was made somewhere
    /// within the round trip.
    pub const fn clock_offset_ns(&self) -> (i64, u64) {
        clock_offset_ns(self.peer_time_ns, self.arrived_ns, self.round_trip_ns())
    }

    /// Round trip, ns: from the egress probe where there is one, else from the hand-over.
    pub const fn round_trip_ns(&self) -> u64 {
        let from = if self.departed_ns == 0 {
            self.sent_ns
        } else {
            self.departed_ns
        };
        self.arrived_ns.saturating_sub(from)
    }
}

/// The peer's clock minus this host's, ns, from the peer's time in a reply, and how far off it can be.
pub const fn clock_offset_ns(peer_time_ns: u64, arrived_ns: u64, round_trip_ns: u64) -> (i64, u64) {
    let middle = arrived_ns.wrapping_sub(round_trip_ns / 2);
    (
        peer_time_ns.wrapping_sub(middle).cast_signed(),
        round_trip_ns.div_ceil(2),
    )
}

/// Value of the map `sessions` (key: the session id): what the responder needs to know of a session.
/// Written by the probe daemon alone.
#[derive(Debug, Clone, Default)]
pub struct SessionEntry {
    /// Index of the session's pages in the maps of pages.
    pub slot: u32,
    /// This host's epoch, sent in replies.
    pub epoch: u64,
    /// The two newest keys, each in its generation's slot.
    pub keys: [Option<(KeyGeneration, SessionKeys)>; 2],
}

/// Bytes of a [`SessionEntry`] in the map.
pub const SESSION_ENTRY_BYTES: usize = 96;
const KEY_SLOT_BYTES: usize = 40;

impl SessionEntry {
    /// Takes a new key; it replaces the one before the newest.
    pub fn install(&mut self, generation: KeyGeneration, keys: SessionKeys) {
        self.keys[generation.slot()] = Some((generation, keys));
    }

    /// The keys of a generation, if they are still accepted.
    pub fn keys_of(&self, generation: KeyGeneration) -> Option<&SessionKeys> {
        self.keys[generation.slot()]
            .as_ref()
            .filter(|(g, _)| *g == generation)
            .map(|(_, k)| k)
    }

    /// As `struct session_entry` of heartbeat.h: slot, 4 bytes unused, epoch, two key slots of
    /// (in use, generation, 6 bytes unused, theirs, ours).
    pub fn to_bytes(&self) -> [u8; SESSION_ENTRY_BYTES] {
        let mut bytes = [0; SESSION_ENTRY_BYTES];
        bytes[..4].copy_from_slice(&self.slot.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.epoch.to_ne_bytes());
        for (slot, at) in self.keys.iter().zip([16, 16 + KEY_SLOT_BYTES]) {
            if let Some((generation, keys)) = slot {
                bytes[at] = 1;
                bytes[at + 1] = generation.0;
                put_key(&mut bytes, at + 8, &keys.theirs);
                put_key(&mut bytes, at + 24, &keys.ours);
            }
        }
        bytes
    }
}

fn put_key(bytes: &mut [u8; SESSION_ENTRY_BYTES], at: usize, key: &Key) {
    bytes[at..at + key.bytes().len()].copy_from_slice(key.bytes());
}

/// What the heartbeat programs count; the index into the map `counters`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Counter {
    /// Requests answered.
    Answered,
    /// Replies accepted.
    Accepted,
    /// Wrong length, version, kind, or fields set that must be zero.
    Malformed,
    /// Wrong signature.
    Forged,
    /// A sequence that is not higher than the highest seen.
    Replayed,
    /// A session that no process of this host has opened; left to the network stack.
    UnknownSession,
    /// A key generation that is not among the two newest.
    UnknownKey,
    /// A reply whose sequence and nonce belong to no request in the window.
    Unmatched,
    /// Requests that passed the egress probe.
    Departed,
    /// Dropped because another CPU was writing the same page.
    Contended,
}

impl Counter {
    /// All of them, in the map's order.
    pub const ALL: [Self; 10] = [
        Self::Answered,
        Self::Accepted,
        Self::Malformed,
        Self::Forged,
        Self::Replayed,
        Self::UnknownSession,
        Self::UnknownKey,
        Self::Unmatched,
        Self::Departed,
        Self::Contended,
    ];

    /// Name in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Accepted => "accepted",
            Self::Malformed => "malformed",
            Self::Forged => "forged",
            Self::Replayed => "replayed",
            Self::UnknownSession => "unknown_session",
            Self::UnknownKey => "unknown_key",
            Self::Unmatched => "unmatched",
            Self::Departed => "departed",
            Self::Contended => "contended",
        }
    }
}

/// Value of the map `watched` (key: process id): in which sessions a process is what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Watched {
    /// Bit n: it is the VMM of slot n.
    pub vmm_of: u32,
    /// Bit n: it is the channel daemon of slot n.
    pub daemon_of: u32,
}

/// Bytes of a [`Watched`] in the map.
pub const WATCHED_BYTES: usize = 8;

impl Watched {
    /// As `struct watched` of heartbeat.h.
    pub fn to_bytes(self) -> [u8; WATCHED_BYTES] {
        let mut bytes = [0; WATCHED_BYTES];
        bytes[..4].copy_from_slice(&self.vmm_of.to_ne_bytes());
        bytes[4..].copy_from_slice(&self.daemon_of.to_ne_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests;
