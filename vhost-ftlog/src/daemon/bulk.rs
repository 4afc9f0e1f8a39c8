//! Bulk streams: connections of their own that the daemon makes and authenticates and the VMM then
//! uses itself, so that nothing of them can block the log.

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::sync::{Mutex, PoisonError};

use crate::config_space::BulkId;

/// The most streams that are expected or ready at a time.
pub const MAX_STREAMS: usize = 16;

/// Streams that the VMM asked for: expected until their socket is there, then until it is fetched.
#[derive(Default)]
pub struct BulkStreams {
    streams: Mutex<BTreeMap<BulkId, Option<TcpStream>>>,
}

impl BulkStreams {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<BulkId, Option<TcpStream>>> {
        // The map is whole after every statement, so a panic elsewhere leaves it whole.
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Expects a stream; false where too many are.
    pub fn expect(&self, id: BulkId) -> bool {
        let mut streams = self.lock();
        if streams.len() >= MAX_STREAMS && !streams.contains_key(&id) {
            return false;
        }
        streams.insert(id, None);
        true
    }

    /// Whether a stream is expected and not there.
    pub fn is_expected(&self, id: BulkId) -> bool {
        matches!(self.lock().get(&id), Some(None))
    }

    /// The stream's socket is there; false where nobody wants it (any more).
    pub fn ready(&self, id: BulkId, socket: TcpStream) -> bool {
        match self.lock().get_mut(&id) {
            Some(slot @ None) => {
                *slot = Some(socket);
                true
            }
            _ => false,
        }
    }

    /// Hands the socket of a stream out.
    pub fn take(&self, id: BulkId) -> Option<TcpStream> {
        let mut streams = self.lock();
        if matches!(streams.get(&id), Some(Some(_))) {
            streams.remove(&id).flatten()
        } else {
            None
        }
    }

    /// Forgets all: the session is over.
    pub fn clear(&self) {
        self.lock().clear();
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_stream_is_handed_out_once_and_only_if_it_was_asked_for() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = || TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let streams = BulkStreams::default();
        let id = BulkId([1; 16]);
        assert!(!streams.ready(id, socket()));
        assert!(streams.expect(id) && streams.is_expected(id));
        assert!(streams.take(id).is_none());
        assert!(streams.ready(id, socket()));
        assert!(!streams.is_expected(id) && !streams.ready(id, socket()));
        assert!(streams.take(id).is_some() && streams.take(id).is_none());
    }

    #[test]
    fn the_number_of_streams_is_limited() {
        let streams = BulkStreams::default();
        for i in 0..MAX_STREAMS {
            assert!(streams.expect(BulkId([i as u8 + 1; 16])));
        }
        assert!(!streams.expect(BulkId([99; 16])));
        assert!(streams.expect(BulkId([1; 16])), "asked for again");
    }
}
