//! The other threads' side of host I/O: what they hand over, and what comes back.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use devices::{Effect, Input};
use format::{Seq, SessionId};
use ft::{ClockGap, GateLimits, GateMode};
use thiserror::Error;
use vhost_ftlog::frontend::Acks;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::backend::{Backend, MAX_NET_WAITING};
use super::gate::{GateStats, effect_bytes};
use super::ring::Ring;
use super::storage::Storage;
use super::tap::Tap;
use crate::console::Console;

/// Host I/O that cannot go on.
#[derive(Debug, Error)]
pub enum IoError {
    /// There is no io_uring here.
    #[error(
        "io_uring is not available: {0}. If it is switched off on this host, allow it with \
         `sysctl kernel.io_uring_disabled=0` (or put this user into kernel.io_uring_group)"
    )]
    NoUring(io::Error),
    /// The thread or its wake-up cannot be made.
    #[error("host I/O thread: {0}")]
    Thread(io::Error),
}

/// The files behind the VM's devices, and where what comes in goes.
pub struct IoConfig {
    /// The network.
    pub tap: Option<Tap>,
    /// The disk.
    pub disk: Option<Storage>,
    /// The console.
    pub console: Option<Console>,
    /// The mode that the gate begins with.
    pub gate: GateMode,
    /// After so long without a turn the gate shuts itself: what its peer waits.
    pub gap: Option<Duration>,
    /// Takes inputs to the vCPU's thread.
    pub deliver: Box<dyn Fn(Delivery) + Send>,
}

/// What the thread delivers.
#[derive(Debug)]
pub enum Delivery {
    /// An input for the guest.
    Input(Input),
    /// A disk request has been outstanding for too long.
    StorageLost,
    /// None is late any more.
    StorageBack,
    /// The quarantined sectors are in the image.
    Folded,
    /// The gate holds for this session; no effect of an append at or above the position was released
    /// unheld.
    GateHolds(SessionId, Seq),
    /// The gate did not run for longer than the peer waits, and has shut itself.
    GateGap(ClockGap),
    /// The person at the console wants to leave.
    Quit,
    /// Host I/O has ended and cannot go on: why.
    Failed(String),
}

pub(super) enum ToIo {
    Emit(Effect, Option<Seq>),
    Gate(GateMode),
    Fold,
    Unquarantine,
    Announce(Effect),
    Watch(SessionId, Acks),
    Unwatch,
    Discard,
    Stop,
}

/// The vCPU thread's side.
#[derive(Clone)]
pub struct IoHandle {
    send: Sender<ToIo>,
    shared: Arc<Shared>,
}

pub(super) struct Shared {
    pub(super) wake: EventFd,
    pub(super) sleeping: AtomicBool,
    /// Messages that were sent and are not taken.
    pub(super) queued: AtomicUsize,
    /// Effects sent and not yet taken over, plus those that the gate holds.
    pub(super) held: AtomicUsize,
    /// Their bytes.
    held_bytes: AtomicUsize,
    /// How many, and how many bytes, make the vCPU wait.
    most_held: AtomicUsize,
    most_bytes: AtomicUsize,
    pub(super) net_waiting: AtomicUsize,
    pub(super) stats: Mutex<GateStats>,
}

impl Shared {
    pub(super) fn new() -> io::Result<Self> {
        let limits = GateLimits::default();
        Ok(Self {
            wake: EventFd::new(EFD_NONBLOCK)?,
            sleeping: AtomicBool::new(false),
            queued: AtomicUsize::new(0),
            held: AtomicUsize::new(0),
            held_bytes: AtomicUsize::new(0),
            most_held: AtomicUsize::new(limits.count),
            most_bytes: AtomicUsize::new(limits.bytes),
            net_waiting: AtomicUsize::new(0),
            stats: Mutex::new(GateStats::default()),
        })
    }

    /// So much is on its way, or dropped.
    pub(super) fn let_go(&self, count: usize, bytes: usize) {
        self.held.fetch_sub(count, Ordering::Relaxed);
        self.held_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl IoHandle {
    pub(super) const fn new(send: Sender<ToIo>, shared: Arc<Shared>) -> Self {
        Self { send, shared }
    }

    /// Hands an effect over; it leaves when everything below `after` is acknowledged.
    pub fn emit(&self, effect: Effect, after: Option<Seq>) {
        self.shared.held.fetch_add(1, Ordering::Relaxed);
        let bytes = effect_bytes(&effect);
        self.shared.held_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.send(ToIo::Emit(effect, after));
    }

    /// Whether so much is held that the guest should wait.
    #[must_use]
    pub fn is_full(&self) -> bool {
        let load = |word: &AtomicUsize| word.load(Ordering::Relaxed);
        load(&self.shared.held) >= load(&self.shared.most_held)
            || load(&self.shared.held_bytes) >= load(&self.shared.most_bytes)
    }

    /// Other limits of what is held before the vCPU waits.
    pub fn set_limits(&self, count: usize, bytes: usize) {
        self.shared.most_held.store(count, Ordering::Relaxed);
        self.shared.most_bytes.store(bytes, Ordering::Relaxed);
    }

    /// The vCPU has taken a frame.
    pub fn frame_taken(&self) {
        if self.shared.net_waiting.fetch_sub(1, Ordering::SeqCst) == MAX_NET_WAITING {
            self.poke();
        }
    }

    /// Makes the thread look again: more is acknowledged.
    pub fn poke(&self) {
        if self.shared.sleeping.swap(false, Ordering::SeqCst) {
            self.shared
                .wake
                .write(1)
                .expect("an eventfd takes far more wake-ups than there are");
        }
    }

    /// Sets the gate's mode; where it then holds, [`Delivery::GateHolds`] answers.
    pub fn set_gate(&self, mode: GateMode) {
        self.send(ToIo::Gate(mode));
    }

    /// Sends a frame that is no output of the guest, while the gate is not shut.
    pub fn announce(&self, frame: Effect) {
        self.send(ToIo::Announce(frame));
    }

    /// Copies the quarantined sectors into the image, while the guest's writes to them wait:
    /// [`Delivery::Folded`] answers.
    pub fn fold(&self) {
        self.send(ToIo::Fold);
    }

    /// The quarantine is over; writes that waited go on.
    pub fn unquarantine(&self) {
        self.send(ToIo::Unquarantine);
    }

    /// From now on acknowledgements of `session` count.
    pub fn watch(&self, session: SessionId, acks: Acks) {
        self.send(ToIo::Watch(session, acks));
    }

    /// No acknowledgement counts any more.
    pub fn unwatch(&self) {
        self.send(ToIo::Unwatch);
    }

    /// Drops what the gate holds.
    pub fn discard_held(&self) {
        self.send(ToIo::Discard);
    }

    /// What the gate holds and has held.
    #[must_use]
    pub fn gate_stats(&self) -> GateStats {
        *self.shared.stats.lock().expect("nobody panics with it")
    }

    fn send(&self, message: ToIo) {
        self.shared.queued.fetch_add(1, Ordering::SeqCst);
        // The thread ends only after Stop; what comes later has no world to act on.
        let _ = self.send.send(message);
        self.poke();
    }
}

/// The running thread; dropping it stops it, with everything in flight completed or cancelled.
pub struct IoThread {
    handle: IoHandle,
    thread: Option<JoinHandle<()>>,
}

impl IoThread {
    /// The vCPU thread's side.
    #[must_use]
    pub fn handle(&self) -> IoHandle {
        self.handle.clone()
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.handle.send(ToIo::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the host I/O thread panicked");
        }
    }
}

/// Starts the thread.
///
/// # Errors
/// There is no io_uring, or no thread.
pub fn spawn(config: IoConfig) -> Result<IoThread, IoError> {
    let (send, receive) = channel();
    let shared = Arc::new(Shared::new().map_err(IoError::Thread)?);
    let handle = IoHandle::new(send, Arc::clone(&shared));
    let (started, outcome) = channel();
    let thread = std::thread::Builder::new()
        .name("io".to_owned())
        .spawn(move || {
            // The ring belongs to the thread that uses it.
            let ring = match Ring::new() {
                Ok(ring) => ring,
                Err(error) => return drop(started.send(Err(error))),
            };
            let _ = started.send(Ok(()));
            Backend::new(config, ring, receive, shared).run();
        })
        .map_err(IoError::Thread)?;
    match outcome.recv() {
        Ok(Ok(())) => Ok(IoThread {
            handle,
            thread: Some(thread),
        }),
        Ok(Err(error)) => Err(IoError::NoUring(error)),
        Err(error) => Err(IoError::Thread(io::Error::other(error))),
    }
}
