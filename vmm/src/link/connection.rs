//! One connection for messages: its writing half, and the loop that reads it.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::{Mutex, PoisonError};

use ft::{PeerMessage, WireError};

use super::handshake::Secured;
use super::record::{Opener, Sealer};

/// A connection with a host.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) dialed: bool,
    stream: TcpStream,
    sealer: Mutex<Sealer>,
    /// Why this side ended it, if it did.
    why: Mutex<Option<String>>,
}

impl Connection {
    pub(super) fn new(stream: TcpStream, secured: Secured, dialed: bool) -> (Self, Opener) {
        let connection = Self {
            dialed,
            stream,
            sealer: Mutex::new(secured.sealer),
            why: Mutex::new(None),
        };
        (connection, secured.opener)
    }

    /// Writes bytes of a message, or a ping where there are none. On an error the connection is of no
    /// use: a record may have gone in part.
    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let mut sealer = self.sealer.lock().unwrap_or_else(PoisonError::into_inner);
        match sealer.write(&mut &self.stream, bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let why = "the other side takes nothing";
                Err(io::Error::new(io::ErrorKind::TimedOut, why))
            }
            other => other,
        }
    }

    /// Ends the connection. What has arrived can still be read.
    pub(super) fn close(&self, why: impl Into<String>) {
        let mut slot = self.why.lock().unwrap_or_else(PoisonError::into_inner);
        slot.get_or_insert_with(|| why.into());
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Reads until the connection ends, and says why it did.
    pub(super) fn read(&self, mut opener: Opener, deliver: impl Fn(PeerMessage)) -> String {
        let why = match self.read_on(&mut opener, deliver) {
            Ok(()) => "the other side closed it".to_owned(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                "nothing came for too long".to_owned()
            }
            Err(error) => error.to_string(),
        };
        self.close(why);
        let mut slot = self.why.lock().unwrap_or_else(PoisonError::into_inner);
        slot.take().unwrap_or_default()
    }

    fn read_on(&self, opener: &mut Opener, deliver: impl Fn(PeerMessage)) -> io::Result<()> {
        let mut pending = Vec::new();
        loop {
            match opener.read(&mut &self.stream, &mut pending) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                other => other?,
            }
            // Bounded: a length beyond ft's limit is an error, not a truncation.
            let mut rest = pending.as_slice();
            let end = loop {
                match PeerMessage::decode(&mut rest) {
                    Ok(message) => deliver(message),
                    Err(end) => break end,
                }
            };
            if !matches!(end, WireError::Truncated { .. }) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, end));
            }
            let used = pending.len() - rest.len();
            pending.drain(..used);
        }
    }
}
