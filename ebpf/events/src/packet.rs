//! The heartbeat packet: one fixed layout for requests and replies, signed with SipHash-2-4.
//!
//! A reply is as long as its request: it is made in place by the responder in the kernel, and nobody
//! can use it to amplify traffic. All integers are little-endian.
//!
//! | offset | bytes | field | in a request | in a reply |
//! |---|---|---|---|---|
//! | 0 | 4 | magic | `PLHB` | the same |
//! | 4 | 1 | version | 1 | the same |
//! | 5 | 1 | kind | 1 | 2 |
//! | 6 | 1 | key generation | the prober's newest | echoed |
//! | 7 | 1 | flags | 0 | [`ReplyFlags`] |
//! | 8 | 8 | session | | echoed |
//! | 16 | 8 | epoch | the prober's | the responder's |
//! | 24 | 8 | sequence | grows with each request of a session | echoed |
//! | 32 | 8 | nonce | random | echoed |
//! | 40 | 8 | time, ns | the prober's monotonic clock | the responder's |
//! | 48 | 8 | VMM progress | 0 | the counter as it stands |
//! | 56 | 8 | daemon progress | 0 | the counter as it stands |
//! | 64 | 8 | echoed time, ns | 0 | the request's time |
//! | 72 | 8 | tag | SipHash-2-4 of bytes 0 to 71 | the same |

use core::ops::BitOr;

use siphasher::sip::SipHasher24;
use thiserror::Error;

use crate::key::{Key, KeyGeneration};

/// Bytes of a heartbeat, request or reply (the UDP payload).
pub const HEARTBEAT_BYTES: usize = 80;
/// Bytes that the tag signs.
pub const SIGNED_BYTES: usize = 72;
/// First bytes of every heartbeat.
pub const MAGIC: [u8; 4] = *b"PLHB";
/// Version of this layout.
pub const VERSION: u8 = 1;
/// UDP port of the responder unless it is told another.
pub const DEFAULT_PORT: u16 = 7879;

/// A received packet that is not a heartbeat to act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PacketError {
    /// Not [`HEARTBEAT_BYTES`] long.
    #[error("heartbeat of {0} bytes, not {HEARTBEAT_BYTES}")]
    Length(usize),
    /// Does not begin with [`MAGIC`].
    #[error("not a heartbeat: wrong magic")]
    Magic,
    /// A version that this build does not speak.
    #[error("heartbeat of version {0}, this build speaks {VERSION}")]
    Version(u8),
    /// Neither request nor reply, or not the one that was expected.
    #[error("heartbeat of unexpected kind {0}")]
    Kind(u8),
    /// A request with a field set that belongs to replies.
    #[error("request with reply fields set")]
    ReplyFieldInRequest,
    /// The tag does not match: another key, or changed on the way.
    #[error("heartbeat with a wrong signature")]
    Forged,
}

/// Request or reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Asks for a reply.
    Request,
    /// Answers one request.
    Reply,
}

impl Kind {
    const fn code(self) -> u8 {
        match self {
            Self::Request => 1,
            Self::Reply => 2,
        }
    }
}

/// What a responder knows about the processes on its host; a byte of the reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReplyFlags(pub u8);

impl ReplyFlags {
    /// The VMM of the session has exited.
    pub const VMM_DEAD: Self = Self(1);
    /// The channel daemon of the session has exited.
    pub const DAEMON_DEAD: Self = Self(2);
    /// A VMM has registered for the session; without this its progress and death are unknown.
    pub const VMM_KNOWN: Self = Self(4);
    /// A channel daemon has registered for the session.
    pub const DAEMON_KNOWN: Self = Self(8);
    /// The reply comes from a userspace responder: its round trip includes the wait for a CPU.
    pub const USERSPACE: Self = Self(16);

    /// Whether all bits of `other` are set.
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for ReplyFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// What must be read before a signature can be checked: which session, which key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opening {
    /// Request or reply.
    pub kind: Kind,
    /// The session it claims.
    pub session: u64,
    /// The key generation it claims.
    pub generation: KeyGeneration,
}

impl Opening {
    /// Reads the unsigned claims of a packet.
    ///
    /// # Errors
    /// [`PacketError`] for all that is malformed; never [`PacketError::Forged`].
    pub fn read(packet: &[u8]) -> Result<Self, PacketError> {
        let packet = sized(packet)?;
        if packet[..4] != MAGIC {
            return Err(PacketError::Magic);
        }
        if packet[4] != VERSION {
            return Err(PacketError::Version(packet[4]));
        }
        let kind = match packet[5] {
            1 => Kind::Request,
            2 => Kind::Reply,
            other => return Err(PacketError::Kind(other)),
        };
        if kind == Kind::Request && (packet[7] != 0 || packet[48..72].iter().any(|b| *b != 0)) {
            return Err(PacketError::ReplyFieldInRequest);
        }
        Ok(Self {
            kind,
            session: word(packet, 8),
            generation: KeyGeneration(packet[6]),
        })
    }
}

/// A prober's question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// The channel's session.
    pub session: u64,
    /// Key that signs this.
    pub generation: KeyGeneration,
    /// Epoch of the prober.
    pub epoch: u64,
    /// Grows with each request; a responder answers a number once.
    pub sequence: u64,
    /// Random; the reply must echo it.
    pub nonce: u64,
    /// The prober's CLOCK_MONOTONIC, ns.
    pub time_ns: u64,
}

impl Request {
    /// The packet, signed.
    pub fn encode(&self, key: &Key) -> [u8; HEARTBEAT_BYTES] {
        let mut packet = [0; HEARTBEAT_BYTES];
        put_opening(&mut packet, Kind::Request, self.generation, self.session);
        put(&mut packet, 16, self.epoch);
        put(&mut packet, 24, self.sequence);
        put(&mut packet, 32, self.nonce);
        put(&mut packet, 40, self.time_ns);
        sign(packet, key)
    }

    /// Reads a request and checks its signature.
    ///
    /// # Errors
    /// [`PacketError`]: malformed, a reply, or signed with another key.
    pub fn decode(packet: &[u8], key: &Key) -> Result<Self, PacketError> {
        let packet = verified(packet, Kind::Request, key)?;
        Ok(Self {
            session: word(packet, 8),
            generation: KeyGeneration(packet[6]),
            epoch: word(packet, 16),
            sequence: word(packet, 24),
            nonce: word(packet, 32),
            time_ns: word(packet, 40),
        })
    }
}

/// A responder's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// The request's session.
    pub session: u64,
    /// The request's key generation.
    pub generation: KeyGeneration,
    /// What the responder knows about its processes.
    pub flags: ReplyFlags,
    /// Epoch of the responder.
    pub epoch: u64,
    /// The request's sequence.
    pub sequence: u64,
    /// The request's nonce.
    pub nonce: u64,
    /// The responder's CLOCK_MONOTONIC, ns.
    pub time_ns: u64,
    /// Progress counter of the VMM on the responder's host.
    pub vmm_progress: u64,
    /// Progress counter of the channel daemon there.
    pub daemon_progress: u64,
    /// The request's time, ns of the prober's clock.
    pub echo_time_ns: u64,
}

impl Reply {
    /// The answer to `request`, with its own fields still zero.
    pub const fn to(request: &Request) -> Self {
        Self {
            session: request.session,
            generation: request.generation,
            flags: ReplyFlags(0),
            epoch: 0,
            sequence: request.sequence,
            nonce: request.nonce,
            time_ns: 0,
            vmm_progress: 0,
            daemon_progress: 0,
            echo_time_ns: request.time_ns,
        }
    }

    /// The packet, signed.
    pub fn encode(&self, key: &Key) -> [u8; HEARTBEAT_BYTES] {
        let mut packet = [0; HEARTBEAT_BYTES];
        put_opening(&mut packet, Kind::Reply, self.generation, self.session);
        packet[7] = self.flags.0;
        put(&mut packet, 16, self.epoch);
        put(&mut packet, 24, self.sequence);
        put(&mut packet, 32, self.nonce);
        put(&mut packet, 40, self.time_ns);
        put(&mut packet, 48, self.vmm_progress);
        put(&mut packet, 56, self.daemon_progress);
        put(&mut packet, 64, self.echo_time_ns);
        sign(packet, key)
    }

    /// Reads a reply and checks its signature.
    ///
    /// # Errors
    /// [`PacketError`]: malformed, a request, or signed with another key.
    pub fn decode(packet: &[u8], key: &Key) -> Result<Self, PacketError> {
        let packet = verified(packet, Kind::Reply, key)?;
        Ok(Self {
            session: word(packet, 8),
            generation: KeyGeneration(packet[6]),
            flags: ReplyFlags(packet[7]),
            epoch: word(packet, 16),
            sequence: word(packet, 24),
            nonce: word(packet, 32),
            time_ns: word(packet, 40),
            vmm_progress: word(packet, 48),
            daemon_progress: word(packet, 56),
            echo_time_ns: word(packet, 64),
        })
    }
}

fn sized(packet: &[u8]) -> Result<&[u8; HEARTBEAT_BYTES], PacketError> {
    packet
        .try_into()
        .map_err(|_| PacketError::Length(packet.len()))
}

fn verified<'a>(
    packet: &'a [u8],
    kind: Kind,
    key: &Key,
) -> Result<&'a [u8; HEARTBEAT_BYTES], PacketError> {
    let opening = Opening::read(packet)?;
    let packet = sized(packet)?;
    if opening.kind != kind {
        return Err(PacketError::Kind(opening.kind.code()));
    }
    // One comparison of two words: its time does not depend on how many bytes agree.
    if word(packet, SIGNED_BYTES) != tag(&packet[..SIGNED_BYTES], key) {
        return Err(PacketError::Forged);
    }
    Ok(packet)
}

fn put_opening(
    packet: &mut [u8; HEARTBEAT_BYTES],
    kind: Kind,
    generation: KeyGeneration,
    session: u64,
) {
    packet[..4].copy_from_slice(&MAGIC);
    packet[4] = VERSION;
    packet[5] = kind.code();
    packet[6] = generation.0;
    put(packet, 8, session);
}

fn sign(mut packet: [u8; HEARTBEAT_BYTES], key: &Key) -> [u8; HEARTBEAT_BYTES] {
    let tag = tag(&packet[..SIGNED_BYTES], key);
    put(&mut packet, SIGNED_BYTES, tag);
    packet
}

fn tag(signed: &[u8], key: &Key) -> u64 {
    SipHasher24::new_with_key(key.bytes()).hash(signed)
}

fn put(packet: &mut [u8; HEARTBEAT_BYTES], at: usize, value: u64) {
    packet[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

fn word(packet: &[u8; HEARTBEAT_BYTES], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&packet[at..at + 8]);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests;
