//! Session keys of the heartbeats: one for each direction of probing.
//!
//! A key signs the requests of one prober and the replies to them, never those of the other
//! direction, so that a request cannot be reflected to the host it came from. Keys are derived from
//! the secret of the channel's handshake and never go over the wire. `Debug` does not show them.

use core::fmt;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// Bytes of a SipHash key.
pub const KEY_BYTES: usize = 16;

/// A SipHash-2-4 key (Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012).
#[derive(Clone, PartialEq, Eq)]
pub struct Key([u8; KEY_BYTES]);

impl Key {
    /// A key of these bytes; the first eight are k0, the others k1, both little-endian.
    pub const fn new(bytes: [u8; KEY_BYTES]) -> Self {
        Self(bytes)
    }

    /// The bytes, as they go into the eBPF map or over the probe daemon's socket.
    pub const fn bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

/// Counts the keys of a session: the handshake after a broken connection makes the next one.
///
/// Packets name their generation, and the two newest are accepted, so a rotation drops none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KeyGeneration(pub u8);

impl KeyGeneration {
    /// The generation after this one; 255 is followed by 0.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }

    /// Which of the two key slots holds this generation.
    pub const fn slot(self) -> usize {
        (self.0 & 1) as usize
    }
}

/// Which end of the channel's connection this host is. It only tells the two directions apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The one that connected.
    Connector,
    /// The one that listened.
    Listener,
}

/// The keys of one session and generation, as one host sees them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionKeys {
    /// Signs the requests of this host's prober and the replies to them.
    pub ours: Key,
    /// Signs the requests of the peer's prober and this host's replies.
    pub theirs: Key,
}

impl SessionKeys {
    /// Derives both keys from a secret that both ends of a handshake hold: HMAC-SHA-256 (RFC 2104)
    /// of a label, the session, the generation and the direction, cut to [`KEY_BYTES`].
    ///
    /// The secret should be fresh for each handshake and have 128 bits of entropy or more.
    pub fn derive(secret: &[u8], session: u64, generation: KeyGeneration, side: Side) -> Self {
        let connector = directional(secret, session, generation, b"connector probes");
        let listener = directional(secret, session, generation, b"listener probes");
        match side {
            Side::Connector => Self {
                ours: connector,
                theirs: listener,
            },
            Side::Listener => Self {
                ours: listener,
                theirs: connector,
            },
        }
    }
}

fn directional(secret: &[u8], session: u64, generation: KeyGeneration, direction: &[u8]) -> Key {
    let mut mac =
        Hmac::<Sha256>::new_from_slice(secret).expect("HMAC takes a key of any length (RFC 2104)");
    mac.update(b"pollux heartbeat key 1\0");
    mac.update(&session.to_le_bytes());
    mac.update(&[generation.0]);
    mac.update(direction);
    let full = mac.finalize().into_bytes();
    let mut key = [0; KEY_BYTES];
    key.copy_from_slice(&full[..KEY_BYTES]);
    Key(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_side_probes_with_the_key_that_the_other_answers_with() {
        let a = SessionKeys::derive(b"secret", 7, KeyGeneration(1), Side::Connector);
        let b = SessionKeys::derive(b"secret", 7, KeyGeneration(1), Side::Listener);
        assert_eq!(a.ours, b.theirs);
        assert_eq!(a.theirs, b.ours);
        assert_ne!(a.ours, a.theirs);
    }

    #[test]
    fn session_generation_and_secret_each_change_the_keys() {
        let base = SessionKeys::derive(b"secret", 7, KeyGeneration(1), Side::Connector);
        for other in [
            SessionKeys::derive(b"secreT", 7, KeyGeneration(1), Side::Connector),
            SessionKeys::derive(b"secret", 8, KeyGeneration(1), Side::Connector),
            SessionKeys::derive(b"secret", 7, KeyGeneration(2), Side::Connector),
        ] {
            assert_ne!(base.ours, other.ours);
            assert_ne!(base.theirs, other.theirs);
        }
    }

    #[test]
    fn generations_alternate_between_the_two_slots() {
        let mut generation = KeyGeneration(254);
        for _ in 0..4 {
            assert_ne!(generation.slot(), generation.next().slot());
            generation = generation.next();
        }
    }

    #[test]
    fn debug_output_hides_the_key() {
        assert_eq!(format!("{:?}", Key::new([0xab; KEY_BYTES])), "Key(..)");
    }
}
