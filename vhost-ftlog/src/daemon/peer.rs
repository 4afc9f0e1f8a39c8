//! Connections to the peer's daemon: dialing, listening and the handshake, on threads of their own.
//!
//! A stranger can occupy a handshake slot for at most [`HANDSHAKE_LIMIT`]; it changes nothing. The
//! data thread decides about every authentic request and fixes the resume point before it is told to
//! the peer.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use format::Seq;
use thiserror::Error;

use super::bulk::BulkStreams;
use super::engine::{Command, EngineHandle, Prepared, Refused, SessionParamsOf};
use super::tcp::{Class, SocketOptions};
use crate::config_space::{BulkId, Reach, Role, SessionParams};
use crate::handshake::{self, Key, Nonce, Purpose, Refusal, Request};

/// The longest time that a handshake may take.
pub const HANDSHAKE_LIMIT: Duration = Duration::from_secs(2);
/// The longest time that connecting may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(1);
/// Handshakes of accepted connections that may be under way; more are closed at once.
const MAX_HANDSHAKES: usize = 32;
/// Pauses between attempts to connect: they double from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LAST_PAUSE: Duration = Duration::from_millis(320);
/// How long a bulk stream is tried for.
const BULK_LIMIT: Duration = Duration::from_secs(30);

/// Why a session or a stream cannot be had.
#[derive(Debug, Error)]
pub enum PeerError {
    /// The session wants to be dialed, but nobody listens.
    #[error("the session waits for its peer, but the daemon was given no address to listen on")]
    NotListening,
    /// A stream of no session.
    #[error("no session is open")]
    NoSession,
    /// Too many streams.
    #[error("too many bulk streams are expected")]
    TooMany,
}

struct Shared {
    engine: EngineHandle,
    key: Key,
    options: SocketOptions,
    listening: bool,
    bulk: Arc<BulkStreams>,
    handshakes: AtomicUsize,
    session: Mutex<Option<Arc<Dialer>>>,
}

/// The session as the dialing thread sees it.
struct Dialer {
    params: SessionParams,
    state: Mutex<DialState>,
    changed: Condvar,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum DialState {
    Wanted,
    Connected,
    Over,
}

/// All that has to do with the peer's daemon.
#[derive(Clone)]
pub struct Peers {
    shared: Arc<Shared>,
}

impl Peers {
    /// Connections with these options. `listening` says whether [`Peers::serve`] will be called.
    pub fn new(
        engine: EngineHandle,
        key: Key,
        options: SocketOptions,
        listening: bool,
        bulk: Arc<BulkStreams>,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                engine,
                key,
                options,
                listening,
                bulk,
                handshakes: AtomicUsize::new(0),
                session: Mutex::new(None),
            }),
        }
    }

    /// Whether a session of these parameters could get a connection.
    ///
    /// # Errors
    /// [`PeerError::NotListening`].
    pub fn check(&self, params: &SessionParams) -> Result<(), PeerError> {
        if params.reach == Reach::Listen && !self.shared.listening {
            return Err(PeerError::NotListening);
        }
        Ok(())
    }

    fn session(&self) -> std::sync::MutexGuard<'_, Option<Arc<Dialer>>> {
        lock(&self.shared.session)
    }

    /// A session was opened: dial, if that is this side's part.
    pub fn opened(&self, params: SessionParams) {
        self.closed();
        let dialer = Arc::new(Dialer {
            params,
            state: Mutex::new(DialState::Wanted),
            changed: Condvar::new(),
        });
        *self.session() = Some(Arc::clone(&dialer));
        if let Reach::Dial(address) = params.reach {
            let shared = Arc::clone(&self.shared);
            spawn("ftlog-dial", move || {
                dial_session(&shared, &dialer, address)
            });
        }
    }

    /// The connection was lost: dial again, if that is this side's part.
    pub fn lost(&self) {
        if let Some(dialer) = self.session().as_ref() {
            dialer.turn(DialState::Connected, DialState::Wanted);
        }
    }

    /// The session is over.
    pub fn closed(&self) {
        if let Some(dialer) = self.session().take() {
            *lock(&dialer.state) = DialState::Over;
            dialer.changed.notify_all();
        }
    }

    /// Has a bulk stream of the open session made.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn bulk(&self, id: BulkId) -> Result<(), PeerError> {
        let dialer = self.session().clone().ok_or(PeerError::NoSession)?;
        if !self.shared.bulk.expect(id) {
            return Err(PeerError::TooMany);
        }
        if let Reach::Dial(address) = dialer.params.reach {
            let shared = Arc::clone(&self.shared);
            let dialer = Arc::downgrade(&dialer);
            spawn("ftlog-bulk", move || {
                dial_bulk(&shared, &dialer, address, id)
            });
        }
        Ok(())
    }

    /// Accepts connections for ever. One thread for each handshake, a limited number of them.
    pub fn serve(&self, listener: &TcpListener) {
        loop {
            match listener.accept() {
                Ok((stream, from)) => self.accepted(stream, from),
                Err(error) => {
                    tracing::warn!(%error, "accept");
                    // Out of files or memory: trying again at once would only spin.
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        }
    }

    fn accepted(&self, stream: TcpStream, from: SocketAddr) {
        let shared = Arc::clone(&self.shared);
        if shared.handshakes.fetch_add(1, Ordering::Relaxed) >= MAX_HANDSHAKES {
            shared.handshakes.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!(%from, "too many handshakes under way");
            return;
        }
        spawn("ftlog-handshake", move || {
            let _span = tracing::info_span!("answer", %from).entered();
            if let Err(error) = answer(&shared, stream) {
                tracing::warn!(error = &error as &dyn std::error::Error, "handshake");
            }
            shared.handshakes.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

impl Dialer {
    /// Changes the state from `from` to `to`; nothing where it is another.
    fn turn(&self, from: DialState, to: DialState) {
        let mut state = lock(&self.state);
        if *state == from {
            *state = to;
            self.changed.notify_all();
        }
    }

    /// Waits until a connection is wanted; false once the session is over.
    fn wait_until_wanted(&self) -> bool {
        let state = lock(&self.state);
        let state = self
            .changed
            .wait_while(state, |state| *state == DialState::Connected)
            .unwrap_or_else(PoisonError::into_inner);
        *state == DialState::Wanted
    }

    /// Waits between two attempts; cut short where the session is over.
    fn pause(&self, pause: Duration) {
        let state = lock(&self.state);
        let _ = self
            .changed
            .wait_timeout_while(state, pause, |state| *state != DialState::Over);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) {
    let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(run);
    if let Err(error) = spawned {
        tracing::error!(%error, "no thread for {name}");
    }
}

fn nonce() -> io::Result<Nonce> {
    let mut nonce = [0; 32];
    let mut have = 0;
    while have < nonce.len() {
        have += rustix::rand::getrandom(&mut nonce[have..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(nonce)
}

/// A stream whose reads and writes end when the handshake has taken too long.
struct Limited<'a> {
    stream: &'a TcpStream,
    until: Instant,
}

impl Limited<'_> {
    fn left(&self) -> io::Result<Duration> {
        self.until
            .checked_duration_since(Instant::now())
            .filter(|left| !left.is_zero())
            .ok_or_else(|| io::ErrorKind::TimedOut.into())
    }
}

impl io::Read for Limited<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.left()?))?;
        self.stream.read(buffer)
    }
}

impl io::Write for Limited<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.left()?))?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn limited(stream: &TcpStream) -> Limited<'_> {
    Limited {
        stream,
        until: Instant::now() + HANDSHAKE_LIMIT,
    }
}

/// The listener's side of one accepted connection.
fn answer(shared: &Shared, stream: TcpStream) -> Result<(), handshake::Error> {
    let mut prepared = None;
    let decide = |request: &Request| match request.purpose {
        Purpose::Log { .. } => {
            let decided = prepare(&shared.engine, Some(request.purpose), request.into())?;
            prepared = Some(decided);
            Ok(decided.next)
        }
        Purpose::Bulk(id) => decide_bulk(shared, request, id),
    };
    let (request, _) = handshake::listen(&mut limited(&stream), &shared.key, &nonce()?, decide)?;
    match (request.purpose, prepared) {
        (Purpose::Log { next, .. }, Some(prepared)) => {
            tell(
                &shared.engine,
                Command::Adopt(prepared.generation, stream, next),
            );
        }
        (Purpose::Bulk(id), _) => bulk_ready(shared, id, stream)?,
        (Purpose::Log { .. }, None) => {}
    }
    Ok(())
}

fn decide_bulk(shared: &Shared, request: &Request, id: BulkId) -> handshake::Verdict {
    let session = lock(&shared.session).clone().ok_or(Refusal::NoSession)?;
    if SessionParamsOf::from(&session.params) != request.into() {
        return Err(Refusal::NoSession);
    }
    if session.params.reach != Reach::Listen {
        return Err(Refusal::Role);
    }
    if !shared.bulk.is_expected(id) {
        return Err(Refusal::NoBulk);
    }
    Ok(Seq(0))
}

fn bulk_ready(shared: &Shared, id: BulkId, stream: TcpStream) -> Result<(), handshake::Error> {
    shared.options.classify(&stream, Class::Bulk)?;
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    if shared.bulk.ready(id, stream) {
        tell(&shared.engine, Command::BulkReady(id));
    }
    Ok(())
}

fn prepare(
    engine: &EngineHandle,
    purpose: Option<Purpose>,
    of: SessionParamsOf,
) -> Result<Prepared, Refusal> {
    engine
        .ask(|reply| Command::Prepare(purpose, of, reply))
        .unwrap_or_else(|error: Refused| {
            tracing::error!(%error, "data thread");
            Err(Refusal::NoSession)
        })
}

fn tell(engine: &EngineHandle, command: Command) {
    if let Err(error) = engine.tell(command) {
        tracing::error!(%error, "data thread");
    }
}

/// Dials for one session until it is over.
fn dial_session(shared: &Shared, dialer: &Dialer, address: SocketAddr) {
    let session = dialer.params.session;
    let _span = tracing::info_span!("dial", %session, %address).entered();
    let mut pause = FIRST_PAUSE;
    while dialer.wait_until_wanted() {
        match dial_log(shared, dialer, address) {
            Ok(()) => pause = FIRST_PAUSE,
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "dial");
                dialer.turn(DialState::Connected, DialState::Wanted);
                dialer.pause(pause);
                pause = (2 * pause).min(LAST_PAUSE);
            }
        }
    }
}

fn dial_log(shared: &Shared, dialer: &Dialer, address: SocketAddr) -> Result<(), handshake::Error> {
    let params = &dialer.params;
    let stream = shared.options.connect(address, Class::Log, CONNECT_LIMIT)?;
    let prepared =
        prepare(&shared.engine, None, params.into()).map_err(handshake::Error::Refused)?;
    let request = Request {
        session: params.session,
        epoch: params.epoch,
        purpose: Purpose::Log {
            role: params.role,
            next: prepared.next,
        },
    };
    let answer = handshake::dial(&mut limited(&stream), &shared.key, &nonce()?, &request);
    if matches!(answer, Err(handshake::Error::Refused(Refusal::VmmDead))) {
        tell(&shared.engine, Command::PeerVmmDead(params.into()));
    }
    let theirs = answer?;
    let next = match params.role {
        Role::Sender => theirs,
        Role::Receiver => prepared.next,
    };
    // Before the data thread can report its loss.
    dialer.turn(DialState::Wanted, DialState::Connected);
    tell(
        &shared.engine,
        Command::Adopt(prepared.generation, stream, next),
    );
    Ok(())
}

/// Dials a bulk stream until it is there, nobody wants it any more, or it has taken too long.
fn dial_bulk(shared: &Shared, session: &Weak<Dialer>, address: SocketAddr, id: BulkId) {
    let _span = tracing::info_span!("dial_bulk", %address).entered();
    let until = Instant::now() + BULK_LIMIT;
    let mut pause = FIRST_PAUSE;
    while let Some(dialer) = session.upgrade() {
        if !shared.bulk.is_expected(id) || Instant::now() >= until {
            return;
        }
        match dial_one_bulk(shared, &dialer.params, address, id) {
            Ok(()) => return,
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "dial bulk");
            }
        }
        dialer.pause(pause);
        pause = (2 * pause).min(LAST_PAUSE);
    }
}

fn dial_one_bulk(
    shared: &Shared,
    params: &SessionParams,
    address: SocketAddr,
    id: BulkId,
) -> Result<(), handshake::Error> {
    let stream = shared
        .options
        .connect(address, Class::Bulk, CONNECT_LIMIT)?;
    let request = Request {
        session: params.session,
        epoch: params.epoch,
        purpose: Purpose::Bulk(id),
    };
    handshake::dial(&mut limited(&stream), &shared.key, &nonce()?, &request)?;
    bulk_ready(shared, id, stream)
}
