//! The listening side: connections come in, and have to become authentic in time.
//!
//! Each handshake has a thread, and at most [`MAX_HANDSHAKES`] are under way: when there are more, the
//! oldest is closed. So a stranger that opens connections and says nothing keeps nobody out.

use std::collections::VecDeque;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::handshake::{self, HandshakeError, Hello, Purpose, Refusal};
use super::shared::{self, Shared};
use super::{LinkEvent, sockets, until};

/// Handshakes of accepted connections that may be under way.
pub const MAX_HANDSHAKES: usize = 32;
/// Pause after accept() failed for want of files or memory: trying again at once would only spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

/// The handshakes under way, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Slots {
    pending: Mutex<Pending>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct Pending {
    next: u64,
    streams: VecDeque<(u64, Arc<TcpStream>)>,
}

impl Slots {
    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a slot, and where none is free, that of the oldest.
    fn take(&self, stream: &Arc<TcpStream>) -> u64 {
        let mut pending = self.pending();
        while pending.streams.len() >= MAX_HANDSHAKES {
            if let Some((_, oldest)) = pending.streams.front() {
                let _ = oldest.shutdown(Shutdown::Both);
            }
            // Its thread notices at once.
            pending = self
                .freed
                .wait(pending)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let slot = pending.next;
        pending.next += 1;
        pending.streams.push_back((slot, Arc::clone(stream)));
        slot
    }

    fn free(&self, slot: u64) {
        self.pending().streams.retain(|(one, _)| *one != slot);
        self.freed.notify_all();
    }

    pub(super) fn close_all(&self) {
        for (_, stream) in &self.pending().streams {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// Accepts connections until the listener is shut down.
pub(super) fn serve(shared: &Arc<Shared>, listener: &TcpListener) {
    while !shared.is_stopping() {
        match listener.accept() {
            Ok((stream, from)) => accepted(shared, stream, from),
            Err(_) if shared.is_stopping() => return,
            Err(error) => {
                tracing::warn!(%error, "accept");
                std::thread::sleep(ACCEPT_PAUSE);
            }
        }
    }
}

fn accepted(shared: &Arc<Shared>, stream: TcpStream, from: SocketAddr) {
    let stream = Arc::new(stream);
    let slot = shared.slots.take(&stream);
    if shared.is_stopping() {
        let _ = stream.shutdown(Shutdown::Both);
    }
    let theirs = Arc::clone(shared);
    let spawned = shared.spawn("link-handshake", move || {
        let result = answer(&theirs, &stream);
        theirs.slots.free(slot);
        let done = match result {
            Ok((hello, secured)) => Arc::try_unwrap(stream)
                .map_err(|_| {
                    io::Error::other("the slot was freed, so nobody else has the stream").into()
                })
                .and_then(|stream| Ok(admitted(&theirs, &hello, secured, stream, from)?)),
            Err(error) => Err(error),
        };
        if let Err(error) = done {
            theirs.reject(Some(from), &error);
        }
    });
    if let Err(error) = spawned {
        tracing::error!(%error, "no thread for a handshake");
        shared.slots.free(slot);
    }
}

fn answer(
    shared: &Shared,
    stream: &TcpStream,
) -> Result<(Hello, handshake::Secured), HandshakeError> {
    let limit = until(shared.times.handshake);
    handshake::listen(stream, &shared.key, shared.me, limit, |hello| {
        if hello.purpose == Purpose::Messages && !shared.has_room_for(hello.from) {
            return Err(Refusal::Full);
        }
        Ok(())
    })
}

fn admitted(
    shared: &Arc<Shared>,
    hello: &Hello,
    secured: handshake::Secured,
    stream: TcpStream,
    address: SocketAddr,
) -> io::Result<()> {
    let from = hello.from;
    match hello.purpose {
        Purpose::Messages => shared::adopt_accepted(shared, from, stream, secured, address),
        Purpose::Bulk(session) => {
            sockets::yielding(&stream)?;
            sockets::hand_over(&stream)?;
            shared.deliver(LinkEvent::Bulk {
                from,
                session,
                stream,
            });
        }
    }
    Ok(())
}
