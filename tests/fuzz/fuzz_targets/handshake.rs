//! The handshake against a stranger, and against somebody on the way who changes bytes. Nothing panics; nothing is
//! believed that was not said by a holder of the key, to the bit.

#![no_main]

use std::io::{self, Read, Write};

use format::{Epoch, Seq, SessionId};
use vhost_ftlog::config_space::Role;
use vhost_ftlog::handshake::{Error, Key, Nonce, Purpose, Request, dial, listen};

/// A connection on which the other end has said what it will ever say.
struct Said<'a> {
    theirs: &'a [u8],
    ours: Vec<u8>,
}

impl<'a> Said<'a> {
    fn new(theirs: &'a [u8]) -> Self {
        Self { theirs, ours: Vec::new() }
    }
}

impl Read for Said<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.theirs.read(buffer)
    }
}

impl Write for Said<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.ours.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

const DIALER: Nonce = [1; 32];
const LISTENER: Nonce = [2; 32];

fn request() -> Request {
    Request {
        session: SessionId([3; 16]),
        epoch: Epoch(4),
        purpose: Purpose::Log { role: Role::Receiver, next: Seq(5) },
    }
}

/// What the dialer says to a listener that says this, and what it makes of it.
fn dials(key: &Key, theirs: &[u8]) -> (Vec<u8>, Result<Seq, Error>) {
    let mut said = Said::new(theirs);
    let result = dial(&mut said, key, &DIALER, &request());
    (said.ours, result)
}

/// What the listener says to a dialer that says this, and the request that it believed.
fn listens(key: &Key, theirs: &[u8]) -> (Vec<u8>, Option<Request>) {
    let mut said = Said::new(theirs);
    let mut believed = None;
    let result = listen(&mut said, key, &LISTENER, |request| {
        believed = Some(*request);
        Ok(Seq(6))
    });
    assert_eq!(result.is_ok(), believed.is_some());
    (said.ours, believed)
}

/// The bytes with some of them changed, as `changes` says: pairs of a position and a mask.
fn changed(bytes: &[u8], changes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for change in changes.chunks_exact(2).take(4) {
        let at = usize::from(change[0]) % bytes.len();
        bytes[at] ^= change[1];
    }
    bytes
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let key = Key::new(vec![9; 32]).expect("long enough");
    assert!(dials(&key, data).1.is_err(), "a stranger was believed");
    assert_eq!(listens(&key, data).1, None, "a stranger was believed");

    // Everything that both sides say, in turns: the nonces are the same each time.
    let (dialer_hello, _) = dials(&key, &[]);
    let (listener_hello, _) = listens(&key, &dialer_hello);
    let (dialer_all, _) = dials(&key, &listener_hello);
    let (listener_all, believed) = listens(&key, &dialer_all);
    assert_eq!(believed, Some(request()));
    assert_eq!(dials(&key, &listener_all).1.expect("both hold the key"), Seq(6));

    let bytes = changed(&dialer_all, data);
    let (_, believed) = listens(&key, &bytes);
    assert_eq!(believed, (bytes == dialer_all).then(request));
    let bytes = changed(&listener_all, data);
    assert_eq!(dials(&key, &bytes).1.is_ok(), bytes == listener_all);
});
