//! Names of hosts, and numbers that are used once.
//!
//! No randomness is drawn here: a process brings one random [`Incarnation`] and every nonce and
//! session of that process follows from it and a counter.

use std::fmt;
use std::str::FromStr;

use format::SessionId;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The longest name of a host, in bytes.
pub const MAX_HOST_LEN: usize = 32;

/// The name of a host, unique among those that may run one VM.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostId {
    len: u8,
    bytes: [u8; MAX_HOST_LEN],
}

/// Why a text is not a host's name.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[error("{0:?} is no host name: 1 to {MAX_HOST_LEN} of the characters a-z A-Z 0-9 . _ - are")]
pub struct BadHostName(String);

impl HostId {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.bytes[..usize::from(self.len)])
            .expect("only ASCII passes the constructor")
    }
}

impl FromStr for HostId {
    type Err = BadHostName;

    fn from_str(name: &str) -> Result<Self, BadHostName> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if name.is_empty() || name.len() > MAX_HOST_LEN || !name.bytes().all(plain) {
            return Err(BadHostName(name.chars().take(2 * MAX_HOST_LEN).collect()));
        }
        let mut bytes = [0; MAX_HOST_LEN];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        Ok(Self {
            len: name.len() as u8,
            bytes,
        })
    }
}

impl TryFrom<String> for HostId {
    type Error = BadHostName;

    fn try_from(name: String) -> Result<Self, BadHostName> {
        name.parse()
    }
}

impl From<HostId> for String {
    fn from(host: HostId) -> Self {
        host.as_str().to_owned()
    }
}

impl fmt::Display for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A number that names one attempt or one question: never used twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Nonce(pub [u8; 16]);

impl fmt::Display for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// 128 random bits that the driver draws when its process starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Incarnation(pub u128);

/// Makes the nonces of one process: different ones for ever, and different from other processes'
/// as surely as 128 random bits are.
#[derive(Debug, Clone)]
pub(crate) struct NonceSource {
    incarnation: u128,
    made: u128,
}

impl NonceSource {
    pub(crate) fn new(incarnation: Incarnation) -> Self {
        Self {
            incarnation: incarnation.0,
            made: 0,
        }
    }

    pub(crate) fn nonce(&mut self) -> Nonce {
        // An odd factor makes the step a bijection, and spreads it over all bytes: the channel
        // compares the first four only.
        const STEP: u128 = 0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835;
        self.made += 1;
        Nonce((self.incarnation ^ self.made.wrapping_mul(STEP)).to_le_bytes())
    }

    pub(crate) fn session(&mut self) -> SessionId {
        SessionId(self.nonce().0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_host_name_is_bounded_and_plain() {
        let host: HostId = "castor-1.example".parse().unwrap();
        assert_eq!(host.to_string(), "castor-1.example");
        for bad in ["", "two words", "é", "a/b", &"x".repeat(33)] {
            assert!(bad.parse::<HostId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn nonces_of_a_process_differ_in_their_first_four_bytes() {
        let mut source = NonceSource::new(Incarnation(7));
        let made: BTreeSet<_> = (0..1000).map(|_| source.nonce().0[..4].to_vec()).collect();
        assert_eq!(made.len(), 1000);
    }
}
