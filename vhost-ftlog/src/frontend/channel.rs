//! The channel as a whole: one daemon, one session at a time, and a supervisor that keeps both.
//!
//! ```text
//!            daemon dies                 started again, arena handed over, session opened
//!   Serving ------------> Recovering -------------------------------------------------> Serving
//! ```
//!
//! The supervisor thread is the only one that waits for the daemon's socket and the event queue. The
//! data path needs neither it nor any lock.

use std::collections::VecDeque;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use format::Seq;
use ring::{ArenaConfig, Desc, Limits};
use rustix::event::{PollFd, PollFlags};

use super::session::{QueueEvents, Session, SessionMemory};
use super::spawn::{Connected, Daemon};
use super::wake::Event;
use super::watchdog::{ANSWER_LIMIT, Watchdog, Watched};
use super::wire::Wire;
use super::{Error, io_error};
use crate::config_space::{BulkId, Command, Role, SessionParams, Status, Tuning};
use crate::notice::{NOTICE_LEN, Notice};

/// Pause between attempts to get the daemon back.
const RECOVERY_PAUSE: Duration = Duration::from_millis(50);

/// How long a daemon may take to introduce itself.
const NEGOTIATION_LIMIT: Duration = Duration::from_secs(10);

/// What a channel is made of.
#[derive(Debug, Clone)]
pub struct ChannelConfig {
    /// The daemon.
    pub daemon: Daemon,
    /// Sizes of a session's arena; the area of the direction that its role does not use is as small as
    /// can be.
    pub arena: ArenaConfig,
    /// Limits to begin with.
    pub tuning: Tuning,
}

impl ChannelConfig {
    fn arena_of(&self, role: Role) -> ArenaConfig {
        match role {
            Role::Sender => ArenaConfig {
                delivery_bytes: Limits::MIN_DELIVERY_BYTES,
                ..self.arena
            },
            Role::Receiver => ArenaConfig {
                log_bytes: Limits::MIN_LOG_BYTES,
                ..self.arena
            },
        }
    }
}

/// What happens to the channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelEvent {
    /// A notice of the daemon.
    Notice(Notice),
    /// The daemon is gone; it is being started or waited for again. Nothing is lost.
    DaemonLost,
    /// The daemon is back and has the session.
    DaemonBack,
}

/// The events of a channel, in order.
#[derive(Debug)]
pub struct Events {
    events: Receiver<ChannelEvent>,
    ready: Arc<Event>,
}

impl Events {
    /// The next event, if one is there.
    pub fn next_event(&mut self) -> Option<ChannelEvent> {
        self.events.try_recv().ok()
    }

    /// The next event, waited for; `None` after `limit` or once the channel is gone.
    pub fn wait(&mut self, limit: Duration) -> Option<ChannelEvent> {
        self.events.recv_timeout(limit).ok()
    }

    /// Takes the signals that are there; look for events afterwards.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn clear(&self) -> Result<(), Error> {
        self.ready.clear()
    }
}

impl AsFd for Events {
    /// Readable when an event was added.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }
}

struct State {
    wire: Option<Link>,
    session: Option<(SessionParams, Arc<SessionMemory>)>,
    tuning: Tuning,
    listen: Option<SocketAddr>,
}

/// The connection to a daemon.
struct Link {
    wire: Wire,
    daemon: Arc<Watched>,
}

struct Inner {
    config: ChannelConfig,
    state: Mutex<State>,
    event_queue: QueueEvents,
    events: Mutex<Sender<ChannelEvent>>,
    ready: Arc<Event>,
    stop: Event,
    stopping: AtomicBool,
    watchdog: Watchdog,
}

/// The control handle of a channel. Dropping it ends the session and lets the daemon go.
pub struct Channel {
    inner: Arc<Inner>,
    supervisor: Option<JoinHandle<()>>,
}

impl Channel {
    /// Connects to the daemon or starts it.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn start(config: ChannelConfig) -> Result<(Self, Events), Error> {
        config.tuning.validate()?;
        let (events_in, events) = mpsc::channel();
        let ready = Arc::new(Event::new()?);
        let tuning = config.tuning;
        let inner = Arc::new(Inner {
            config,
            state: Mutex::new(State {
                wire: None,
                session: None,
                tuning,
                listen: None,
            }),
            event_queue: QueueEvents::new()?,
            events: Mutex::new(events_in),
            ready: Arc::clone(&ready),
            stop: Event::new()?,
            stopping: AtomicBool::new(false),
            watchdog: Watchdog::start()?,
        });
        inner.connect()?;
        let supervised = Arc::clone(&inner);
        let supervisor = std::thread::Builder::new()
            .name("ftlog-supervise".to_owned())
            .spawn(move || supervised.supervise())
            .map_err(io_error("start the supervisor"))?;
        let channel = Self {
            inner,
            supervisor: Some(supervisor),
        };
        Ok((channel, Events { events, ready }))
    }

    /// Begins a session whose first append has the number `first` (both sides must say the same).
    /// Ends the one before.
    ///
    /// # Errors
    /// See [`Error`]. The session before is then ended all the same.
    pub fn open(&self, params: SessionParams, first: Seq) -> Result<Session, Error> {
        let mut state = self.inner.lock();
        let state = &mut *state;
        let arena = self.inner.config.arena_of(params.role);
        let (memory, log) = SessionMemory::new(arena, params.session, first)?;
        let old = state.session.take();
        self.inner.ask(&mut state.wire, |wire| {
            if old.is_some() {
                wire.command(&Command::Close)?;
            }
            wire.stop_queues()?;
            wire.hand_over(&memory, &self.inner.event_queue)?;
            wire.command(&Command::Open(params))
        })?;
        let session = memory.parts(log);
        state.session = Some((params, memory));
        Ok(session)
    }

    /// Ends the session (R13): when this returns without an error no further acknowledgement leaves.
    /// A daemon that is dead leaves none either, and one that the channel has started and that does
    /// not answer is killed. One that somebody else runs and that does not answer is an error: the
    /// session must not be counted as closed.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn close(&self) -> Result<(), Error> {
        let mut state = self.inner.lock();
        // Forgotten first: a daemon that comes back is not given the session again.
        state.session = None;
        if state.wire.is_none() {
            return Ok(());
        }
        let closed = self
            .inner
            .ask(&mut state.wire, |wire| wire.command(&Command::Close));
        match (closed, &state.wire) {
            (Err(_), Some(link)) if link.daemon.is_gone() => Ok(()),
            (closed, _) => closed,
        }
    }

    /// Changes the limits while the channel runs.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn tune(&self, tuning: Tuning) -> Result<(), Error> {
        tuning.validate()?;
        let mut state = self.inner.lock();
        state.tuning = tuning;
        if state.wire.is_none() {
            return Ok(());
        }
        self.inner.ask(&mut state.wire, |wire| wire.tune(&tuning))
    }

    /// The limits in force.
    #[must_use]
    pub fn tuning(&self) -> Tuning {
        self.inner.lock().tuning
    }

    /// Where the session stands.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn status(&self) -> Result<Status, Error> {
        let mut state = self.inner.lock();
        self.inner.ask(&mut state.wire, Wire::status)
    }

    /// The daemon's process.
    #[must_use]
    pub fn daemon_pid(&self) -> Option<u32> {
        let state = self.inner.lock();
        let peer =
            rustix::net::sockopt::socket_peercred(state.wire.as_ref()?.wire.socket()).ok()?;
        u32::try_from(peer.pid.as_raw_nonzero().get()).ok()
    }

    /// The address on which a daemon that the channel started listens for its peer.
    #[must_use]
    pub fn listen_address(&self) -> Option<SocketAddr> {
        self.inner.lock().listen
    }

    /// Asks for a bulk stream of the open session; the peer's VMM asks for the same id. The event
    /// [`Notice::BulkReady`] says when it can be fetched.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn request_bulk(&self, id: BulkId) -> Result<(), Error> {
        let mut state = self.inner.lock();
        self.inner
            .ask(&mut state.wire, |wire| wire.command(&Command::Bulk(id)))
    }

    /// The connected socket of a bulk stream: an ordinary byte stream to the peer's VMM, which the
    /// daemon has authenticated and then forgotten.
    ///
    /// # Errors
    /// See [`Error`]; also before [`Notice::BulkReady`].
    pub fn take_bulk(&self, id: BulkId) -> Result<TcpStream, Error> {
        let mut state = self.inner.lock();
        self.inner.ask(&mut state.wire, |wire| wire.fetch_bulk(id))
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change of the state is made last, so a panic leaves the old one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the daemon, and waits for its answer as long as it may take.
    fn ask<T>(
        &self,
        link: &mut Option<Link>,
        what: impl FnOnce(&mut Wire) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let link = link.as_mut().ok_or(Error::State("no daemon"))?;
        let _watching = self.watchdog.watch(&link.daemon, ANSWER_LIMIT);
        what(&mut link.wire)
    }

    /// Gets a daemon and gives it what there is. The state is locked only for the latter, so that a
    /// session can be closed while there is no daemon.
    fn connect(&self) -> Result<(), Error> {
        let Connected {
            stream,
            listen,
            process,
        } = self.config.daemon.connect()?;
        let socket = stream
            .try_clone()
            .map_err(io_error("duplicate the daemon's socket"))?;
        let daemon = Arc::new(Watched::new(process, socket));
        let wire = {
            let _watching = self.watchdog.watch(&daemon, NEGOTIATION_LIMIT);
            Wire::negotiate(stream)?
        };
        let mut link = Some(Link { wire, daemon });
        let mut state = self.lock();
        let State {
            session, tuning, ..
        } = &*state;
        self.ask(&mut link, |wire| {
            wire.tune(tuning)?;
            let Some((params, memory)) = session else {
                return Ok(());
            };
            wire.hand_over(memory, &self.event_queue)?;
            wire.command(&Command::Open(*params))
        })?;
        state.wire = link;
        state.listen = listen.or(state.listen);
        Ok(())
    }

    fn emit(&self, event: ChannelEvent) {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody listens any more: fine.
        if events.send(event).is_ok() {
            self.ready.signal();
        }
    }

    /// The supervisor thread.
    fn supervise(&self) {
        while !self.stopping.load(Ordering::Acquire) {
            if !self.watch() {
                self.recover();
            }
        }
    }

    /// Waits for events; false once the daemon is gone.
    fn watch(&self) -> bool {
        let socket = {
            let state = self.lock();
            match state
                .wire
                .as_ref()
                .map(|link| link.wire.socket().try_clone())
            {
                Some(Ok(socket)) => socket,
                _ => return false,
            }
        };
        let mut poll = [
            PollFd::new(&self.stop, PollFlags::IN),
            PollFd::new(&self.event_queue.call, PollFlags::IN),
            // Only its end: answers belong to whoever asked.
            PollFd::new(&socket, PollFlags::RDHUP),
        ];
        if rustix::event::poll(&mut poll, None).is_err() {
            return true;
        }
        let ended = poll[2]
            .revents()
            .intersects(PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR);
        let called = poll[1].revents().contains(PollFlags::IN);
        if (called || ended)
            && let Err(error) = self.take_notices(called)
        {
            tracing::error!(%error, "event queue");
        }
        !ended
    }

    fn take_notices(&self, called: bool) -> Result<(), Error> {
        if called {
            self.event_queue.call.clear()?;
        }
        let Some((_, memory)) = self.lock().session.clone() else {
            return Ok(());
        };
        for notice in read_notices(&memory)? {
            self.emit(ChannelEvent::Notice(notice));
        }
        Ok(())
    }

    /// Gets the daemon back, however long it takes.
    fn recover(&self) {
        self.lock().wire = None;
        self.emit(ChannelEvent::DaemonLost);
        while !self.stopping.load(Ordering::Acquire) {
            match self.connect() {
                Ok(()) => {
                    self.emit(ChannelEvent::DaemonBack);
                    return;
                }
                Err(error) => {
                    tracing::warn!(%error, "the daemon is not back yet");
                    let _ = self.stop.wait(Some(RECOVERY_PAUSE));
                }
            }
        }
    }
}

/// Takes the notices out of the event queue and gives the buffers back.
fn read_notices(memory: &SessionMemory) -> Result<VecDeque<Notice>, Error> {
    let mut events = memory.events.lock().unwrap_or_else(PoisonError::into_inner);
    let mut notices = VecDeque::new();
    let ring_size = u64::from(Limits::EVENT_RING);
    loop {
        let outstanding_from = events.position() - ring_size;
        if events.refresh()? == outstanding_from {
            // Sleep only where nothing came since.
            if !events.reaper().arm(outstanding_from)? {
                return Ok(notices);
            }
            continue;
        }
        let slot = outstanding_from % ring_size;
        let addr = memory.layout.events + slot * u64::from(Limits::EVENT_LEN);
        let mut bytes = [0; NOTICE_LEN];
        memory.mapping.read(addr, &mut bytes);
        notices.extend(Notice::decode(&bytes));
        events.add(Desc {
            addr,
            len: Limits::EVENT_LEN,
            flags: Desc::WRITE,
            next: 0,
        })?;
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.inner.stopping.store(true, Ordering::Release);
        self.inner.stop.signal();
        if let Some(supervisor) = self.supervisor.take() {
            // It panics only where this process is broken anyway.
            let _ = supervisor.join();
        }
        // The owner word is let go before the socket is closed, so that the daemon knows an orderly end.
        let mut state = self.inner.lock();
        let _ = self
            .inner
            .ask(&mut state.wire, |wire| wire.command(&Command::Close));
        state.session = None;
    }
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel").finish_non_exhaustive()
    }
}
