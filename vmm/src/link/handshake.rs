//! The handshake of the control link: both sides prove the shared key and learn each other's names.
//!
//! ```text
//!   dialer                                  listener
//!   Noise 1: e, Hello{from, to, purpose} ──►  opens only with the key
//!                                        ◄──  Noise 2: e, ee, Answer   the dialer knows: it is live
//!   empty record                         ──►  the listener knows: it is live; only now it acts
//! ```
//! Noise_NNpsk0_25519_ChaChaPoly_SHA256 (noiseprotocol.org, revision 34) with a key derived from the
//! shared one. The first message could be a recording of an earlier one: that is why the listener acts
//! only after a record that takes the keys of this very exchange. `to` keeps a host from being used as
//! its own peer or another's. Traffic of the past stays secret if the key is lost.
//!
//! Each Noise message is framed:
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic `PLXL` |
//! | 4 | 2 | version of the link, little-endian |
//! | 6 | 2 | length, little-endian, at most [`MAX_NOISE_LEN`] |
//! | 8 | | Noise message; its payload is postcard |

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use format::SessionId;
use ft::{HostId, PEER_VERSION};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use snow::{Builder, HandshakeState, StatelessTransportState};
use thiserror::Error;

use super::key::Key;
use super::record::{Opener, Sealer, split};

const MAGIC: [u8; 4] = *b"PLXL";
/// The version of the handshake and of the records that follow it.
pub(super) const LINK_VERSION: u16 = 1;
/// Both sides must have seen the same version: the header itself proves nothing.
const PROLOGUE: &[u8] = b"PLXL\x01\0";
const HEADER_LEN: usize = 8;
/// The longest message of a handshake, in bytes.
pub(super) const MAX_NOISE_LEN: usize = 256;
const PATTERN: &str = "Noise_NNpsk0_25519_ChaChaPoly_SHA256";

/// Why a handshake failed.
#[derive(Debug, Error)]
pub(super) enum HandshakeError {
    #[error("the connection failed in the handshake: {0}")]
    Io(#[from] io::Error),
    #[error("the other end is no Pollux")]
    Stranger,
    #[error("the other end speaks version {0} of the link, this build {LINK_VERSION}")]
    Version(u16),
    #[error("the other end sent {0} bytes in the handshake")]
    TooLong(usize),
    #[error("the other end does not have the same key")]
    Proof,
    #[error("the other end is authentic, but its handshake makes no sense")]
    Malformed,
    #[error("refused: {0}")]
    Refused(Refusal),
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Purpose {
    Messages,
    Bulk(SessionId),
}

/// What the dialer says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hello {
    peer_version: u16,
    pub(super) from: HostId,
    pub(super) to: HostId,
    pub(super) purpose: Purpose,
}

impl Hello {
    pub(super) fn new(from: HostId, to: HostId, purpose: Purpose) -> Self {
        Self {
            peer_version: PEER_VERSION,
            from,
            to,
            purpose,
        }
    }

    /// What every listener asks of a hello.
    fn check(&self, me: HostId) -> Result<(), Refusal> {
        if self.peer_version != PEER_VERSION {
            return Err(Refusal::PeerVersion(PEER_VERSION));
        }
        if self.to != me {
            return Err(Refusal::OtherHost(me));
        }
        if self.from == me {
            return Err(Refusal::SameName);
        }
        Ok(())
    }
}

/// Why an authentic host is refused.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
pub(super) enum Refusal {
    /// The listener speaks this version of the messages.
    #[error("the hosts run different versions: {PEER_VERSION} and {0}")]
    PeerVersion(u16),
    /// The listener has this name.
    #[error("the host at this address is called {0}: correct the list of standbys")]
    OtherHost(HostId),
    #[error("both hosts have the same name: give each its own --host")]
    SameName,
    #[error("it knows too many hosts already")]
    Full,
}

/// What the listener says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Answer {
    Welcome,
    Refused(Refusal),
}

/// A connection whose other end is authentic.
pub(super) struct Secured {
    pub(super) sealer: Sealer,
    pub(super) opener: Opener,
}

impl Secured {
    fn new(noise: StatelessTransportState) -> Self {
        let (sealer, opener) = split(noise);
        Self { sealer, opener }
    }
}

/// The dialer's half.
pub(super) fn dial(
    stream: &TcpStream,
    key: &Key,
    hello: &Hello,
    until: Instant,
) -> Result<Secured, HandshakeError> {
    let mut stream = Limited { stream, until };
    let mut noise = start(key, Builder::build_initiator);
    write(&mut stream, &mut noise, hello)?;
    match read(&mut stream, &mut noise)? {
        Answer::Welcome => {}
        Answer::Refused(refusal) => return Err(HandshakeError::Refused(refusal)),
    }
    let mut secured = Secured::new(finish(noise));
    secured.sealer.write(&mut stream, &[])?;
    Ok(secured)
}

/// The listener's half. `admit` is asked about a host that knows the key, or about a recording of what
/// one said: it must not change anything.
pub(super) fn listen(
    stream: &TcpStream,
    key: &Key,
    me: HostId,
    until: Instant,
    admit: impl FnOnce(&Hello) -> Result<(), Refusal>,
) -> Result<(Hello, Secured), HandshakeError> {
    let mut stream = Limited { stream, until };
    let mut noise = start(key, Builder::build_responder);
    let hello: Hello = read(&mut stream, &mut noise)?;
    if let Err(refusal) = hello.check(me).and_then(|()| admit(&hello)) {
        write(&mut stream, &mut noise, &Answer::Refused(refusal.clone()))?;
        return Err(HandshakeError::Refused(refusal));
    }
    write(&mut stream, &mut noise, &Answer::Welcome)?;
    let mut secured = Secured::new(finish(noise));
    let mut proof = Vec::new();
    match secured.opener.read(&mut stream, &mut proof) {
        Ok(()) if proof.is_empty() => Ok((hello, secured)),
        Ok(()) => Err(HandshakeError::Malformed),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(HandshakeError::Proof),
        Err(error) => Err(error.into()),
    }
}

fn start<'key>(
    key: &'key Key,
    build: impl FnOnce(Builder<'key>) -> Result<HandshakeState, snow::Error>,
) -> HandshakeState {
    let pattern = PATTERN.parse().expect("the pattern is one that snow knows");
    let builder = Builder::new(pattern)
        .prologue(PROLOGUE)
        .and_then(|builder| builder.psk(0, key.bytes()))
        .expect("prologue and key are set once");
    build(builder).expect("the pattern needs nothing but the key")
}

fn finish(noise: HandshakeState) -> StatelessTransportState {
    noise
        .into_stateless_transport_mode()
        .expect("both messages of the pattern are through")
}

fn write(
    stream: &mut impl Write,
    noise: &mut HandshakeState,
    payload: &impl Serialize,
) -> Result<(), HandshakeError> {
    let payload = postcard::to_stdvec(payload).expect("a Vec takes every byte");
    let mut out = [0; HEADER_LEN + MAX_NOISE_LEN];
    let len = noise
        .write_message(&payload, &mut out[HEADER_LEN..])
        .expect("two names, a session and the overhead are shorter than the limit");
    out[..4].copy_from_slice(&MAGIC);
    out[4..6].copy_from_slice(&LINK_VERSION.to_le_bytes());
    out[6..8].copy_from_slice(&(len as u16).to_le_bytes());
    Ok(stream.write_all(&out[..HEADER_LEN + len])?)
}

fn read<T: DeserializeOwned>(
    stream: &mut impl Read,
    noise: &mut HandshakeState,
) -> Result<T, HandshakeError> {
    let mut header = [0; HEADER_LEN];
    stream.read_exact(&mut header)?;
    let [m0, m1, m2, m3, v0, v1, l0, l1] = header;
    if [m0, m1, m2, m3] != MAGIC {
        return Err(HandshakeError::Stranger);
    }
    match u16::from_le_bytes([v0, v1]) {
        LINK_VERSION => {}
        version => return Err(HandshakeError::Version(version)),
    }
    let len = usize::from(u16::from_le_bytes([l0, l1]));
    if len > MAX_NOISE_LEN {
        return Err(HandshakeError::TooLong(len));
    }
    let mut message = [0; MAX_NOISE_LEN];
    stream.read_exact(&mut message[..len])?;
    let mut payload = [0; MAX_NOISE_LEN];
    let len = noise
        .read_message(&message[..len], &mut payload)
        .map_err(|_| HandshakeError::Proof)?;
    match postcard::take_from_bytes(&payload[..len]) {
        Ok((value, [])) => Ok(value),
        _ => Err(HandshakeError::Malformed),
    }
}

/// A stream whose reads and writes end when the handshake has taken too long.
struct Limited<'a> {
    stream: &'a TcpStream,
    until: Instant,
}

impl Limited<'_> {
    fn left(&self) -> io::Result<std::time::Duration> {
        self.until
            .checked_duration_since(Instant::now())
            .filter(|left| !left.is_zero())
            .ok_or_else(|| io::Error::new(io::ErrorKind::TimedOut, "it took too long"))
    }
}

impl Read for Limited<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.left()?))?;
        self.stream.read(buffer)
    }
}

impl Write for Limited<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.left()?))?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn longest() -> HostId {
        "x".repeat(ft::MAX_HOST_LEN).parse().unwrap()
    }

    #[test]
    fn the_prologue_is_magic_and_version() {
        assert_eq!(PROLOGUE[..4], MAGIC);
        assert_eq!(PROLOGUE[4..], LINK_VERSION.to_le_bytes());
    }

    #[test]
    fn the_longest_messages_fit_with_their_overhead() {
        const EPHEMERAL_AND_TAG: usize = 32 + 16;
        let bulk = Purpose::Bulk(SessionId([255; 16]));
        let hello = postcard::to_stdvec(&Hello::new(longest(), longest(), bulk)).unwrap();
        let refusal = Answer::Refused(Refusal::OtherHost(longest()));
        let refusal = postcard::to_stdvec(&refusal).unwrap();
        assert!(hello.len().max(refusal.len()) + EPHEMERAL_AND_TAG <= MAX_NOISE_LEN);
    }

    /// Golden bytes of version 1. A change here is a new version of the link.
    #[test]
    fn golden_bytes_of_version_1() {
        let (a, b) = ("castor".parse().unwrap(), "pollux".parse().unwrap());
        let hello = Hello::new(a, b, Purpose::Messages);
        let bytes = postcard::to_stdvec(&hello).unwrap();
        assert_eq!(bytes, b"\x01\x06castor\x06pollux\0");
        let hello = Hello::new(a, b, Purpose::Bulk(SessionId([3; 16])));
        let bytes = postcard::to_stdvec(&hello).unwrap();
        assert_eq!(bytes[15..], [&[1][..], &[3; 16]].concat());
        for (answer, golden) in [
            (Answer::Welcome, &b"\0"[..]),
            (Answer::Refused(Refusal::PeerVersion(2)), b"\x01\0\x02"),
            (
                Answer::Refused(Refusal::OtherHost(a)),
                b"\x01\x01\x06castor",
            ),
            (Answer::Refused(Refusal::SameName), b"\x01\x02"),
            (Answer::Refused(Refusal::Full), b"\x01\x03"),
        ] {
            assert_eq!(postcard::to_stdvec(&answer).unwrap(), golden);
        }
    }
}
