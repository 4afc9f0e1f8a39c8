//! Records: what goes over a connection once both sides are authentic.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 2 | length of what follows, little-endian, 16 to 65,535 |
//! | 2 | | Noise transport message: ciphertext and tag |
//!
//! Records of one direction are numbered from 0 by both sides; one that is missing, repeated, damaged
//! or out of order does not open. Their plain texts in a row are a stream of messages; an empty one
//! says only that the sender lives.

use std::io::{self, Read, Write};
use std::sync::Arc;

use snow::StatelessTransportState;

const LENGTH_LEN: usize = 2;
const TAG_LEN: usize = 16;
const MAX_SEALED_LEN: usize = u16::MAX as usize;
/// The longest plain text of one record, in bytes.
pub(super) const MAX_PLAIN_LEN: usize = MAX_SEALED_LEN - TAG_LEN;

/// Both directions of a connection.
pub(super) fn split(noise: StatelessTransportState) -> (Sealer, Opener) {
    let noise = Arc::new(noise);
    let sealer = Sealer {
        noise: Arc::clone(&noise),
        next: 0,
        record: Vec::new(),
    };
    let opener = Opener {
        noise,
        next: 0,
        record: Vec::new(),
    };
    (sealer, opener)
}

/// Makes the records of one direction.
#[derive(Debug)]
pub(super) struct Sealer {
    noise: Arc<StatelessTransportState>,
    next: u64,
    record: Vec<u8>,
}

impl Sealer {
    /// Writes `plain` as one record, or as many as it takes; an empty one as one.
    pub(super) fn write(&mut self, to: &mut impl Write, plain: &[u8]) -> io::Result<()> {
        if plain.is_empty() {
            return self.write_one(to, plain);
        }
        plain
            .chunks(MAX_PLAIN_LEN)
            .try_for_each(|chunk| self.write_one(to, chunk))
    }

    fn write_one(&mut self, to: &mut impl Write, plain: &[u8]) -> io::Result<()> {
        let sealed_len = plain.len() + TAG_LEN;
        self.record.resize(LENGTH_LEN + sealed_len, 0);
        let (length, sealed) = self.record.split_at_mut(LENGTH_LEN);
        length.copy_from_slice(&(sealed_len as u16).to_le_bytes());
        self.noise
            .write_message(self.next, plain, sealed)
            .map_err(io::Error::other)?;
        self.next += 1;
        to.write_all(&self.record)
    }
}

/// Opens the records of one direction.
#[derive(Debug)]
pub(super) struct Opener {
    noise: Arc<StatelessTransportState>,
    next: u64,
    record: Vec<u8>,
}

impl Opener {
    /// Reads one record and appends its plain text to `out`. Reads not one byte more.
    pub(super) fn read(&mut self, from: &mut impl Read, out: &mut Vec<u8>) -> io::Result<()> {
        let mut length = [0; LENGTH_LEN];
        from.read_exact(&mut length)?;
        let sealed_len = usize::from(u16::from_le_bytes(length));
        if sealed_len < TAG_LEN {
            return Err(invalid("a record is shorter than its tag"));
        }
        self.record.resize(sealed_len, 0);
        from.read_exact(&mut self.record)?;
        let before = out.len();
        out.resize(before + sealed_len - TAG_LEN, 0);
        self.noise
            .read_message(self.next, &self.record, &mut out[before..])
            .map_err(|_| invalid("a record is not authentic"))?;
        self.next += 1;
        Ok(())
    }
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use snow::Builder;

    use super::*;

    fn pair() -> (Sealer, Opener) {
        let pattern = || "Noise_NN_25519_ChaChaPoly_SHA256".parse().unwrap();
        let mut a = Builder::new(pattern()).build_initiator().unwrap();
        let mut b = Builder::new(pattern()).build_responder().unwrap();
        let (mut message, mut payload) = ([0; 128], [0; 128]);
        let len = a.write_message(&[], &mut message).unwrap();
        b.read_message(&message[..len], &mut payload).unwrap();
        let len = b.write_message(&[], &mut message).unwrap();
        a.read_message(&message[..len], &mut payload).unwrap();
        let a = a.into_stateless_transport_mode().unwrap();
        let b = b.into_stateless_transport_mode().unwrap();
        (split(a).0, split(b).1)
    }

    fn sealed(sealer: &mut Sealer, plain: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        sealer.write(&mut out, plain).unwrap();
        out
    }

    #[test]
    fn long_texts_take_several_records_and_empty_ones_one() {
        let (mut sealer, mut opener) = pair();
        let plain: Vec<u8> = (0..2 * MAX_PLAIN_LEN + 1).map(|i| i as u8).collect();
        let mut stream = sealed(&mut sealer, &plain);
        stream.extend(sealed(&mut sealer, &[]));
        let (mut from, mut out) = (stream.as_slice(), Vec::new());
        for _ in 0..3 {
            opener.read(&mut from, &mut out).unwrap();
        }
        assert_eq!(out, plain);
        opener.read(&mut from, &mut out).unwrap();
        assert!(out.len() == plain.len() && from.is_empty());
    }

    #[test]
    fn a_record_opens_once_in_its_place_and_whole() {
        let (mut sealer, mut opener) = pair();
        let first = sealed(&mut sealer, b"first");
        let second = sealed(&mut sealer, b"second");
        let mut out = Vec::new();
        let mut opens = |bytes: &[u8]| opener.read(&mut &bytes[..], &mut out).is_ok();
        assert!(!opens(&second), "out of its place");
        for bit in 0..first.len() * 8 {
            let mut damaged = first.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(!opens(&damaged), "bit {bit}");
        }
        assert!(!opens(&first[..first.len() - 1]) && opens(&first));
        assert!(!opens(&first), "repeated");
        assert!(opens(&second));
    }
}
