//! The handshake of two daemons: version, mutual proof of a shared key, then session and resume point.
//!
//! ```text
//!   dialer                         listener
//!   Hello(nonce)        ------->
//!                       <-------   Hello(nonce)
//!   Request, MAC        ------->   nothing is believed or changed before the MAC is checked
//!                       <-------   Answer, MAC
//! ```
//!
//! The MAC is HMAC-SHA256 with the shared key over a label for the side, both hellos, the request
//! and, in the answer's, the answer. The nonces make each proof fresh, the labels keep one side's
//! proof from serving as the other's. A stranger learns a random number and the version. This module
//! holds no secrets beyond the call and does no I/O but on the stream that it is given; who calls it
//! sets the time limit of the stream.

use std::io::{self, Read, Write};

use format::{Epoch, Seq, SessionId};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use subtle::ConstantTimeEq;
use thiserror::Error;

use crate::config_space::{BulkId, Role};

const MAGIC: u32 = u32::from_le_bytes(*b"PLXH");
/// Version of the handshake and of what follows it on the connection.
pub const PROTOCOL_VERSION: u16 = 1;
const HELLO_LEN: usize = 40;
const REQUEST_LEN: usize = 64;
const ANSWER_LEN: usize = 16;
const MAC_LEN: usize = 32;
/// The shortest acceptable shared key, in bytes.
pub const MIN_KEY_LEN: usize = 16;

/// Why a handshake failed.
#[derive(Debug, Error)]
pub enum Error {
    /// The connection failed or was too slow.
    #[error("the connection failed in the handshake")]
    Io(#[from] io::Error),
    /// The other end is no daemon of ours.
    #[error("the other end is not a logging channel")]
    Stranger,
    /// The other end speaks another version.
    #[error("the other end speaks version {0}, this one {PROTOCOL_VERSION}")]
    Version(u16),
    /// The other end does not know the shared key.
    #[error("the other end does not know the shared key")]
    Proof,
    /// The other end is authentic but asks for what makes no sense.
    #[error("bad handshake: {0}")]
    Field(&'static str),
    /// The other end refused.
    #[error("refused by the peer: {0:?}")]
    Refused(Refusal),
    /// The shared key is too short.
    #[error("the shared key has less than {MIN_KEY_LEN} bytes")]
    Key,
}

/// Why an authentic request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// No such session is open here, or not in this epoch.
    NoSession,
    /// Both sides have the same role, or both dial.
    Role,
    /// The receiver has not what the sender already counts as acknowledged.
    StateLost,
    /// No such bulk stream is expected.
    NoBulk,
    /// The backup's VMM is dead.
    VmmDead,
}

const REFUSALS: [Refusal; 5] = [
    Refusal::NoSession,
    Refusal::Role,
    Refusal::StateLost,
    Refusal::NoBulk,
    Refusal::VmmDead,
];

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Log frames one way, acknowledgement records the other.
    Log {
        /// The dialer's role.
        role: Role,
        /// A receiver's resume point: the append that it expects next. Zero from a sender.
        next: Seq,
    },
    /// A byte stream between the two VMMs.
    Bulk(BulkId),
}

/// What the dialer asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// The pairing.
    pub session: SessionId,
    /// The sender's epoch.
    pub epoch: Epoch,
    /// What the connection is for.
    pub purpose: Purpose,
}

impl Request {
    fn encode(&self) -> [u8; REQUEST_LEN] {
        let mut out = [0; REQUEST_LEN];
        out[8..24].copy_from_slice(&self.session.0);
        out[24..32].copy_from_slice(&self.epoch.0.to_le_bytes());
        match self.purpose {
            Purpose::Log { role, next } => {
                out[0] = 1;
                out[1] = if role == Role::Sender { 1 } else { 2 };
                out[32..40].copy_from_slice(&next.0.to_le_bytes());
            }
            Purpose::Bulk(id) => {
                out[0] = 2;
                out[48..64].copy_from_slice(&id.0);
            }
        }
        out
    }

    fn decode(bytes: &[u8; REQUEST_LEN]) -> Result<Self, Error> {
        let purpose = match (bytes[0], bytes[1]) {
            (1, 1) => Purpose::Log {
                role: Role::Sender,
                next: Seq(0),
            },
            (1, 2) => Purpose::Log {
                role: Role::Receiver,
                next: Seq(u64::from_le_bytes(chunk(bytes, 32))),
            },
            (2, 0) => Purpose::Bulk(BulkId(chunk(bytes, 48))),
            _ => return Err(Error::Field("purpose")),
        };
        Ok(Self {
            session: SessionId(chunk(bytes, 8)),
            epoch: Epoch(u64::from_le_bytes(chunk(bytes, 24))),
            purpose,
        })
    }
}

/// The listener's answer: the receiver's resume point if the listener is the receiver, else zero.
pub type Verdict = Result<Seq, Refusal>;

fn encode_answer(verdict: Verdict) -> [u8; ANSWER_LEN] {
    let mut out = [0; ANSWER_LEN];
    match verdict {
        Ok(next) => out[8..16].copy_from_slice(&next.0.to_le_bytes()),
        Err(refusal) => {
            let index = REFUSALS.iter().position(|known| *known == refusal);
            out[0] = 1 + index.expect("every refusal is in the table") as u8;
        }
    }
    out
}

fn decode_answer(bytes: &[u8; ANSWER_LEN]) -> Result<Verdict, Error> {
    match bytes[0] {
        0 => Ok(Ok(Seq(u64::from_le_bytes(chunk(bytes, 8))))),
        code => REFUSALS
            .get(usize::from(code) - 1)
            .map(|refusal| Err(*refusal))
            .ok_or(Error::Field("answer")),
    }
}

/// The shared key.
#[derive(Clone)]
pub struct Key(Vec<u8>);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

impl Key {
    /// A key of these bytes.
    ///
    /// # Errors
    /// [`Error::Key`] for less than [`MIN_KEY_LEN`] bytes.
    pub fn new(bytes: Vec<u8>) -> Result<Self, Error> {
        if bytes.len() < MIN_KEY_LEN {
            return Err(Error::Key);
        }
        Ok(Self(bytes))
    }

    fn mac(&self, label: &str, parts: &[&[u8]]) -> [u8; MAC_LEN] {
        let mut mac =
            Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes a key of any length");
        mac.update(label.as_bytes());
        for part in parts {
            mac.update(part);
        }
        mac.finalize().into_bytes().into()
    }
}

const DIALER: &str = "pollux logging channel 1, dialer";
const LISTENER: &str = "pollux logging channel 1, listener";

/// A number that was never used before.
pub type Nonce = [u8; 32];

fn hello(nonce: &Nonce) -> [u8; HELLO_LEN] {
    let mut out = [0; HELLO_LEN];
    out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    out[4..6].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
    out[8..40].copy_from_slice(nonce);
    out
}

fn check_hello(bytes: &[u8; HELLO_LEN]) -> Result<(), Error> {
    if u32::from_le_bytes(chunk(bytes, 0)) != MAGIC {
        return Err(Error::Stranger);
    }
    match u16::from_le_bytes(chunk(bytes, 4)) {
        PROTOCOL_VERSION => Ok(()),
        version => Err(Error::Version(version)),
    }
}

/// The dialer's half. Returns the listener's resume point.
///
/// # Errors
/// See [`Error`]; the connection is then of no use.
pub fn dial(
    stream: &mut (impl Read + Write),
    key: &Key,
    nonce: &Nonce,
    request: &Request,
) -> Result<Seq, Error> {
    let mine = hello(nonce);
    stream.write_all(&mine)?;
    let theirs = read::<HELLO_LEN>(stream)?;
    check_hello(&theirs)?;
    let body = request.encode();
    let mut out = [0; REQUEST_LEN + MAC_LEN];
    out[..REQUEST_LEN].copy_from_slice(&body);
    out[REQUEST_LEN..].copy_from_slice(&key.mac(DIALER, &[&mine, &theirs, &body]));
    stream.write_all(&out)?;
    let answer = read::<ANSWER_LEN>(stream)?;
    let proof = read::<MAC_LEN>(stream)?;
    let expected = key.mac(LISTENER, &[&mine, &theirs, &body, &answer]);
    if !bool::from(proof.ct_eq(&expected)) {
        return Err(Error::Proof);
    }
    decode_answer(&answer)?.map_err(Error::Refused)
}

/// The listener's half. `decide` is called with an authentic request only.
///
/// # Errors
/// See [`Error`]; [`Error::Refused`] where `decide` refused, after the dialer was told.
pub fn listen(
    stream: &mut (impl Read + Write),
    key: &Key,
    nonce: &Nonce,
    decide: impl FnOnce(&Request) -> Verdict,
) -> Result<(Request, Seq), Error> {
    let theirs = read::<HELLO_LEN>(stream)?;
    check_hello(&theirs)?;
    let mine = hello(nonce);
    stream.write_all(&mine)?;
    let body = read::<REQUEST_LEN>(stream)?;
    let proof = read::<MAC_LEN>(stream)?;
    let expected = key.mac(DIALER, &[&theirs, &mine, &body]);
    if !bool::from(proof.ct_eq(&expected)) {
        return Err(Error::Proof);
    }
    let request = Request::decode(&body)?;
    let verdict = decide(&request);
    let answer = encode_answer(verdict);
    let mut out = [0; ANSWER_LEN + MAC_LEN];
    out[..ANSWER_LEN].copy_from_slice(&answer);
    out[ANSWER_LEN..].copy_from_slice(&key.mac(LISTENER, &[&theirs, &mine, &body, &answer]));
    stream.write_all(&out)?;
    match verdict {
        Ok(next) => Ok((request, next)),
        Err(refusal) => Err(Error::Refused(refusal)),
    }
}

fn read<const N: usize>(stream: &mut impl Read) -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn chunk<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    *bytes[at..]
        .first_chunk()
        .expect("the message is longer than its fields")
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn key(byte: u8) -> Key {
        Key::new(vec![byte; 32]).unwrap()
    }

    fn request() -> Request {
        Request {
            session: SessionId([1; 16]),
            epoch: Epoch(2),
            purpose: Purpose::Log {
                role: Role::Receiver,
                next: Seq(77),
            },
        }
    }

    type Outcome = (Result<Seq, Error>, Result<(Request, Seq), Error>, bool);

    fn run(dialer: Key, listener: Key, verdict: Verdict) -> Outcome {
        let (mut a, mut b) = UnixStream::pair().unwrap();
        let listening = std::thread::spawn(move || {
            let mut asked = false;
            let result = listen(&mut b, &listener, &[9; 32], |_| {
                asked = true;
                verdict
            });
            (result, asked)
        });
        let dialed = dial(&mut a, &dialer, &[8; 32], &request());
        drop(a);
        let (listened, asked) = listening.join().unwrap();
        (dialed, listened, asked)
    }

    #[test]
    fn two_holders_of_the_key_agree() {
        let (dialed, listened, _) = run(key(1), key(1), Ok(Seq(5)));
        assert_eq!(dialed.unwrap(), Seq(5));
        assert_eq!(listened.unwrap(), (request(), Seq(5)));
    }

    #[test]
    fn a_dialer_without_the_key_changes_nothing_and_is_told_nothing() {
        let (dialed, listened, asked) = run(key(1), key(2), Ok(Seq(5)));
        assert!(matches!(dialed, Err(Error::Io(_))));
        assert!(matches!(listened, Err(Error::Proof)));
        assert!(!asked);
    }

    #[test]
    fn a_refusal_reaches_the_dialer() {
        for refusal in REFUSALS {
            let (dialed, listened, _) = run(key(1), key(1), Err(refusal));
            assert!(matches!(dialed, Err(Error::Refused(r)) if r == refusal));
            assert!(matches!(listened, Err(Error::Refused(r)) if r == refusal));
        }
    }

    /// A listener that does not know the key cannot answer, not even by reflecting the dialer's proof.
    #[test]
    fn a_listener_without_the_key_is_noticed() {
        let (mut a, mut b) = UnixStream::pair().unwrap();
        let liar = std::thread::spawn(move || {
            read::<HELLO_LEN>(&mut b).unwrap();
            b.write_all(&hello(&[0; 32])).unwrap();
            let body = read::<REQUEST_LEN>(&mut b).unwrap();
            let proof = read::<MAC_LEN>(&mut b).unwrap();
            b.write_all(&body[..ANSWER_LEN]).unwrap();
            b.write_all(&proof).unwrap();
        });
        let dialed = dial(&mut a, &key(1), &[8; 32], &request());
        assert!(matches!(dialed, Err(Error::Proof)));
        liar.join().unwrap();
    }

    #[test]
    fn strangers_and_other_versions_are_named() {
        let mut other = hello(&[0; 32]);
        other[4] = 9;
        assert!(matches!(check_hello(&other), Err(Error::Version(9))));
        other[0] = 0;
        assert!(matches!(check_hello(&other), Err(Error::Stranger)));
    }

    #[test]
    fn requests_round_trip() {
        let bulk = Request {
            purpose: Purpose::Bulk(BulkId([4; 16])),
            ..request()
        };
        for request in [request(), bulk] {
            assert_eq!(Request::decode(&request.encode()).unwrap(), request);
        }
    }
}
