//! A relay between two links: the network, with its ways to fail, and with ears.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use super::PATIENCE;

/// Forwards every connection to one address.
pub(super) struct Relay {
    pub(super) address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    to: SocketAddr,
    /// What comes is swallowed, and no end of a connection is passed on.
    frozen: AtomicBool,
    /// The byte of the dialers' streams that is damaged.
    damage_at: AtomicUsize,
    /// What the dialer of the first connection said.
    heard: Mutex<Vec<u8>>,
    more: Condvar,
    streams: Mutex<Vec<TcpStream>>,
}

impl Relay {
    pub(super) fn start(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            to,
            frozen: AtomicBool::new(false),
            damage_at: AtomicUsize::new(usize::MAX),
            heard: Mutex::default(),
            more: Condvar::new(),
            streams: Mutex::default(),
        });
        let theirs = Arc::clone(&shared);
        std::thread::spawn(move || {
            while let Ok((dialer, _)) = listener.accept() {
                let Ok(listener) = TcpStream::connect(theirs.to) else {
                    return;
                };
                join(&theirs, dialer, listener);
            }
        });
        Self { address, shared }
    }

    /// From now on nothing passes, and nobody is told.
    pub(super) fn freeze(&self, frozen: bool) {
        self.shared.frozen.store(frozen, Ordering::SeqCst);
    }

    /// Flips a bit of this byte of what a dialer says.
    pub(super) fn damage(&self, at: usize) {
        self.shared.damage_at.store(at, Ordering::SeqCst);
    }

    pub(super) fn heard(&self) -> Vec<u8> {
        self.shared.heard.lock().unwrap().clone()
    }

    /// Waits until the dialer of the first connection has said so many bytes.
    pub(super) fn wait_until_heard(&self, len: usize) {
        let heard = self.shared.heard.lock().unwrap();
        let more = &self.shared.more;
        let (heard, _) = more
            .wait_timeout_while(heard, PATIENCE, |heard| heard.len() < len)
            .unwrap();
        assert!(heard.len() >= len, "{} of {len} bytes", heard.len());
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        for stream in self.shared.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.shared.frozen.store(false, Ordering::SeqCst);
    }
}

fn join(shared: &Arc<Shared>, dialer: TcpStream, listener: TcpStream) {
    let mut streams = shared.streams.lock().unwrap();
    let first = streams.is_empty();
    for stream in [&dialer, &listener] {
        streams.push(stream.try_clone().unwrap());
    }
    let (back, forth) = (listener.try_clone().unwrap(), dialer.try_clone().unwrap());
    let theirs = Arc::clone(shared);
    std::thread::spawn(move || pump(&theirs, dialer, listener, true, first));
    let theirs = Arc::clone(shared);
    std::thread::spawn(move || pump(&theirs, back, forth, false, false));
}

fn pump(shared: &Shared, mut from: TcpStream, mut to: TcpStream, dialer: bool, listen: bool) {
    let mut buffer = [0; 4096];
    let mut passed = 0;
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        let bytes = &mut buffer[..len];
        if shared.frozen.load(Ordering::SeqCst) {
            continue;
        }
        let at = shared.damage_at.load(Ordering::SeqCst);
        if dialer && (passed..passed + len).contains(&at) {
            bytes[at - passed] ^= 1;
        }
        passed += len;
        if listen {
            shared.heard.lock().unwrap().extend_from_slice(bytes);
            shared.more.notify_all();
        }
        if to.write_all(bytes).is_err() {
            break;
        }
    }
    if !shared.frozen.load(Ordering::SeqCst) {
        let _ = to.shutdown(Shutdown::Both);
    }
}
