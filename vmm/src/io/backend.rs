//! The thread that does the VM's host I/O.
//!
//! One loop: take effects from the vCPU's thread, release what the gate lets go, reap completions,
//! sleep. An operation that fails because the storage or the link is away stays outstanding and is
//! tried again; only errors of the medium reach the guest.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use devices::{DiskStatus, Effect, Input, NetOffloads, RequestId};
use format::{Seq, SessionId};
use ft::{ClockGap, GateMode};
use thiserror::Error;
use vhost_ftlog::frontend::Acks;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::buffer::Buffer;
use super::gate::{Gate, GateStats, TICK};
use super::ring::{Call, Done, Ring};
use super::storage::{Piece, Storage};
use super::tap::{MAX_FRAME_LEN, Tap};
use crate::console::{Console, Typed};

/// Frames from the TAP that wait for the vCPU at the most; more stay in the kernel's queue.
const MAX_NET_WAITING: usize = 256;
/// Effects that the gate holds at the most; then the vCPU waits.
const MAX_HELD: usize = 4096;
/// Pause before a request that the storage did not take is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(10);
/// Bytes of one console read.
const CONSOLE_READ_LEN: usize = 256;

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
    /// Takes inputs to the vCPU's thread.
    pub deliver: Box<dyn Fn(Delivery) + Send>,
}

/// What the thread delivers.
#[derive(Debug)]
pub enum Delivery {
    /// An input for the guest.
    Input(Input),
    /// The quarantined sectors are in the image.
    Folded,
    /// The gate holds for this session; no effect of an append at or above the position was released
    /// unheld.
    GateHolds(SessionId, Seq),
    /// The gate did not run for longer than the peer waits, and has shut itself.
    GateGap(ClockGap),
    /// The person at the console wants to leave.
    Quit,
}

enum ToIo {
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

struct Shared {
    wake: EventFd,
    sleeping: AtomicBool,
    /// Effects sent and not yet taken over, plus those that the gate holds.
    held: AtomicUsize,
    net_waiting: AtomicUsize,
    stats: Mutex<GateStats>,
}

impl IoHandle {
    /// Hands an effect over; it leaves when everything below `after` is acknowledged.
    pub fn emit(&self, effect: Effect, after: Option<Seq>) {
        self.shared.held.fetch_add(1, Ordering::Relaxed);
        self.send(ToIo::Emit(effect, after));
    }

    /// Whether so much is held that the guest should wait.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.shared.held.load(Ordering::Relaxed) >= MAX_HELD
    }

    /// The vCPU has taken a frame.
    pub fn frame_taken(&self) {
        if self.shared.net_waiting.fetch_sub(1, Ordering::AcqRel) == MAX_NET_WAITING {
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
    let shared = Arc::new(Shared {
        wake: EventFd::new(EFD_NONBLOCK).map_err(IoError::Thread)?,
        sleeping: AtomicBool::new(false),
        held: AtomicUsize::new(0),
        net_waiting: AtomicUsize::new(0),
        stats: Mutex::new(GateStats::default()),
    });
    let handle = IoHandle {
        send,
        shared: Arc::clone(&shared),
    };
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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tag {
    Wake,
    Ack(RawFd),
    TapRead,
    TapWrite,
    Disk(RequestId, Part),
    DiskFlush(RequestId),
    ConsoleRead,
    ConsoleWrite,
}

/// A part of a disk request: where it is, for another try, and where in the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    fd: RawFd,
    at: u64,
    offset: usize,
    write: bool,
}

impl Part {
    fn call(&self) -> Call {
        if self.write {
            Call::WriteAt(self.fd, self.at)
        } else {
            Call::ReadAt(self.fd, self.at)
        }
    }
}

/// A disk request whose parts are under way.
struct Pending {
    parts: usize,
    /// What was read.
    data: Vec<u8>,
    status: DiskStatus,
}

struct Backend {
    config: IoConfig,
    disk: BTreeMap<RequestId, Pending>,
    /// Writes to quarantined sectors wait here while those are folded back.
    folding: bool,
    parked: Vec<Effect>,
    ring: Ring<Tag>,
    receive: Receiver<ToIo>,
    shared: Arc<Shared>,
    gate: Gate,
    console_out: VecDeque<u8>,
    console_busy: bool,
    tap_reading: bool,
    stopping: bool,
}

impl Backend {
    fn new(
        config: IoConfig,
        ring: Ring<Tag>,
        receive: Receiver<ToIo>,
        shared: Arc<Shared>,
    ) -> Self {
        let gate = Gate::new(config.gate);
        Self {
            config,
            disk: BTreeMap::new(),
            folding: false,
            parked: Vec::new(),
            ring,
            receive,
            shared,
            gate,
            console_out: VecDeque::new(),
            console_busy: false,
            tap_reading: false,
            stopping: false,
        }
    }

    fn run(mut self) {
        if let Err(error) = self.serve() {
            tracing::error!(%error, "host I/O stopped");
        }
    }

    fn serve(&mut self) -> io::Result<()> {
        let wake = self.shared.wake.as_raw_fd();
        self.ring
            .push(Tag::Wake, Call::Poll(wake), Buffer::zeroed(0))?;
        if let Some(console) = &self.config.console {
            let call = Call::Read(console.input());
            self.ring
                .push(Tag::ConsoleRead, call, Buffer::zeroed(CONSOLE_READ_LEN))?;
        }
        loop {
            self.take_messages()?;
            self.release()?;
            self.read_tap()?;
            if self.stopping && self.is_idle() {
                return Ok(());
            }
            self.sleep()?;
            while let Some(done) = self.ring.reap() {
                self.complete(done)?;
            }
        }
    }

    /// Nothing of the guest's output is on its way any more.
    fn is_idle(&self) -> bool {
        let output = |tag: &Tag| {
            !matches!(
                tag,
                Tag::Wake | Tag::Ack(_) | Tag::TapRead | Tag::ConsoleRead
            )
        };
        self.ring.count(output) == 0 && self.console_out.is_empty()
    }

    /// Submits, and sleeps unless there is a message already.
    fn sleep(&mut self) -> io::Result<()> {
        self.shared.sleeping.store(true, Ordering::SeqCst);
        let work = self.shared.held.load(Ordering::SeqCst) > self.gate.len();
        let wait = usize::from(!work && !self.gate.arm() && !self.stopping_now());
        if self.gate.holds() {
            self.ring.wait_for(wait, TICK)?;
        } else {
            self.ring.wait(wait)?;
        }
        self.shared.sleeping.store(false, Ordering::SeqCst);
        Ok(())
    }

    fn stopping_now(&self) -> bool {
        self.stopping && self.is_idle()
    }

    fn take_messages(&mut self) -> io::Result<()> {
        loop {
            match self.receive.try_recv() {
                Ok(ToIo::Emit(effect, after)) if acts_on_world(&effect) => {
                    self.gate.hold(effect, after);
                }
                Ok(ToIo::Emit(effect, _)) => {
                    self.shared.held.fetch_sub(1, Ordering::Relaxed);
                    self.start(effect)?;
                }
                Ok(ToIo::Gate(mode)) => {
                    let at = self.gate.set_mode(mode);
                    if let GateMode::Holding(session) = mode {
                        (self.config.deliver)(Delivery::GateHolds(session, at));
                    }
                }
                Ok(ToIo::Fold) => self.fold(),
                Ok(ToIo::Unquarantine) => self.unquarantine()?,
                Ok(ToIo::Announce(frame)) if self.gate.is_shut() => drop(frame),
                Ok(ToIo::Announce(frame)) => self.start(frame)?,
                Ok(ToIo::Watch(session, acks)) => {
                    self.gate.watch(session, acks);
                    self.poll_acks()?;
                }
                Ok(ToIo::Unwatch) => self.gate.unwatch(),
                Ok(ToIo::Discard) => {
                    let dropped = self.gate.discard();
                    self.shared.held.fetch_sub(dropped, Ordering::Relaxed);
                }
                Ok(ToIo::Stop) | Err(TryRecvError::Disconnected) => {
                    self.stopping = true;
                    return Ok(());
                }
                Err(TryRecvError::Empty) => return Ok(()),
            }
        }
    }

    fn release(&mut self) -> io::Result<()> {
        loop {
            match self.gate.release() {
                Ok(Some(effect)) => {
                    self.shared.held.fetch_sub(1, Ordering::Relaxed);
                    self.start(effect)?;
                }
                Ok(None) => break,
                Err(gap) => {
                    (self.config.deliver)(Delivery::GateGap(gap));
                    break;
                }
            }
        }
        *self.shared.stats.lock().expect("nobody panics with it") = self.gate.stats();
        self.write_console()
    }

    fn start(&mut self, effect: Effect) -> io::Result<()> {
        match effect {
            Effect::NetTx(frame) => match self.config.tap.as_ref().map(Tap::fd) {
                Some(tap) => self
                    .ring
                    .push(Tag::TapWrite, Call::Write(tap), Buffer::of(&frame)),
                None => Ok(()),
            },
            Effect::ConsoleTx(byte) => {
                self.console_out.push_back(byte);
                Ok(())
            }
            Effect::NetOffloads(offloads) => {
                self.set_offloads(offloads);
                Ok(())
            }
            Effect::DiskRead { .. } | Effect::DiskWrite { .. } | Effect::DiskFlush { .. } => {
                self.start_disk(effect)
            }
            Effect::EntropyWanted { .. } | Effect::PowerOff | Effect::Reset => Ok(()),
        }
    }

    fn start_disk(&mut self, effect: Effect) -> io::Result<()> {
        let Some(storage) = &self.config.disk else {
            if let Some(id) = effect.request() {
                self.disk_done(id, DiskStatus::MediumError, Vec::new());
            }
            return Ok(());
        };
        match effect {
            Effect::DiskRead { id, sector, len } => {
                let pieces = storage.pieces(sector, len as usize);
                self.disk_parts(id, &pieces, len as usize, None)
            }
            Effect::DiskWrite {
                sector, ref data, ..
            } if self.folding && storage.touches(sector, data.len()) => {
                self.parked.push(effect);
                Ok(())
            }
            Effect::DiskWrite { id, sector, data } => {
                let pieces = storage.pieces(sector, data.len());
                self.disk_parts(id, &pieces, 0, Some(&data))
            }
            Effect::DiskFlush { id } => self.ring.push(
                Tag::DiskFlush(id),
                Call::Sync(storage.fd()),
                Buffer::zeroed(0),
            ),
            _ => Ok(()),
        }
    }

    /// Starts the parts of a request; it is done when all of them are.
    fn disk_parts(
        &mut self,
        id: RequestId,
        pieces: &[Piece],
        read_len: usize,
        write: Option<&[u8]>,
    ) -> io::Result<()> {
        let (parts, status) = (pieces.len(), DiskStatus::Ok);
        self.disk.insert(
            id,
            Pending {
                parts,
                data: vec![0; read_len],
                status,
            },
        );
        for piece in pieces {
            let Piece {
                fd,
                at,
                offset,
                len,
            } = *piece;
            let part = Part {
                fd,
                at,
                offset,
                write: write.is_some(),
            };
            let buffer = match write {
                Some(data) => Buffer::of(&data[offset..offset + len]),
                None => Buffer::zeroed(len),
            };
            self.ring.push(Tag::Disk(id, part), part.call(), buffer)?;
        }
        Ok(())
    }

    fn fold(&mut self) {
        self.folding = true;
        let folded = self.config.disk.as_ref().map_or(Ok(()), Storage::fold);
        match folded {
            Ok(()) => (self.config.deliver)(Delivery::Folded),
            // The protocol asks again; until then the guest's writes to these sectors wait.
            Err(error) => tracing::error!(%error, "side files cannot be folded back"),
        }
    }

    fn unquarantine(&mut self) -> io::Result<()> {
        self.folding = false;
        if let Some(storage) = &mut self.config.disk {
            storage.release();
        }
        std::mem::take(&mut self.parked)
            .into_iter()
            .try_for_each(|effect| self.start(effect))
    }

    fn set_offloads(&self, offloads: NetOffloads) {
        let Some(tap) = &self.config.tap else { return };
        if let Err(error) = tap.set_offloads(offloads) {
            tracing::error!(%error, "the guest's frames may arrive with checksums missing");
        }
    }

    fn write_console(&mut self) -> io::Result<()> {
        let Some(console) = &self.config.console else {
            self.console_out.clear();
            return Ok(());
        };
        if self.console_busy || self.console_out.is_empty() {
            return Ok(());
        }
        let bytes: Vec<u8> = self.console_out.drain(..).collect();
        self.console_busy = true;
        self.ring.push(
            Tag::ConsoleWrite,
            Call::Write(console.output()),
            Buffer::of(&bytes),
        )
    }

    /// Wakes this thread when an acknowledgement comes.
    fn poll_acks(&mut self) -> io::Result<()> {
        let Some(signal) = self.gate.signal() else {
            return Ok(());
        };
        self.ring
            .push(Tag::Ack(signal), Call::Poll(signal), Buffer::zeroed(0))
    }

    fn read_tap(&mut self) -> io::Result<()> {
        let room = self.shared.net_waiting.load(Ordering::Acquire) < MAX_NET_WAITING;
        match &self.config.tap {
            Some(tap) if room && !self.tap_reading && !self.stopping => {
                self.tap_reading = true;
                let call = Call::Read(tap.fd());
                self.ring
                    .push(Tag::TapRead, call, Buffer::zeroed(MAX_FRAME_LEN))
            }
            _ => Ok(()),
        }
    }

    fn complete(&mut self, done: Done<Tag>) -> io::Result<()> {
        match done.tag {
            Tag::Wake => {
                let wake = self.shared.wake.as_raw_fd();
                let _ = self.shared.wake.read();
                self.ring.push(Tag::Wake, Call::Poll(wake), done.buffer)
            }
            // A signal of a session that is over is polled no more.
            Tag::Ack(signal) if self.gate.signal() == Some(signal) => {
                self.gate.clear_signal();
                self.poll_acks()
            }
            Tag::Ack(_) => Ok(()),
            Tag::TapRead => {
                self.tap_reading = false;
                match done.result {
                    Ok(len) => self.frame(&done.buffer[..len]),
                    Err(error) => tracing::warn!(%error, "TAP read failed"),
                }
                Ok(())
            }
            Tag::TapWrite => {
                if let Err(error) = done.result {
                    tracing::debug!(%error, "TAP write failed; the frame is lost, as on a wire");
                }
                Ok(())
            }
            Tag::Disk(id, part) => self.disk_ended(id, part, done),
            Tag::DiskFlush(id) => self.flushed(id, done),
            Tag::ConsoleRead => self.typed(done),
            Tag::ConsoleWrite => self.console_written(done),
        }
    }

    fn frame(&mut self, bytes: &[u8]) {
        self.shared.net_waiting.fetch_add(1, Ordering::AcqRel);
        self.deliver(Input::NetRx(bytes.to_vec()));
    }

    fn deliver(&self, input: Input) {
        (self.config.deliver)(Delivery::Input(input));
    }

    fn disk_done(&self, id: RequestId, status: DiskStatus, data: Vec<u8>) {
        self.deliver(Input::DiskDone { id, status, data });
    }

    /// A part of a disk request has ended on the host: completes the request with its last one, or
    /// tries the part again where the storage, not the medium, failed.
    fn disk_ended(&mut self, id: RequestId, part: Part, done: Done<Tag>) -> io::Result<()> {
        let Done { buffer, result, .. } = done;
        let failed = match result {
            Ok(len) if len == buffer.len() => None,
            Ok(len) => Some(io::Error::other(format!("{len} of {} bytes", buffer.len()))),
            Err(error) if is_transport(&error) && !self.stopping => {
                tracing::warn!(%error, ?id, "storage is away; the request stays outstanding");
                std::thread::sleep(RETRY_PAUSE);
                return self.ring.push(Tag::Disk(id, part), part.call(), buffer);
            }
            Err(error) => Some(error),
        };
        let Some(pending) = self.disk.get_mut(&id) else {
            return Ok(());
        };
        if let Some(error) = failed {
            tracing::error!(%error, ?id, "disk error");
            pending.status = DiskStatus::MediumError;
        } else if !part.write {
            pending.data[part.offset..part.offset + buffer.len()].copy_from_slice(&buffer);
        }
        pending.parts -= 1;
        if pending.parts == 0
            && let Some(pending) = self.disk.remove(&id)
        {
            let ok = pending.status == DiskStatus::Ok;
            let data = if ok { pending.data } else { Vec::new() };
            self.disk_done(id, pending.status, data);
        }
        Ok(())
    }

    fn flushed(&mut self, id: RequestId, done: Done<Tag>) -> io::Result<()> {
        match done.result {
            Ok(_) => self.disk_done(id, DiskStatus::Ok, Vec::new()),
            Err(error) if is_transport(&error) && !self.stopping => {
                std::thread::sleep(RETRY_PAUSE);
                if let Some(storage) = &self.config.disk {
                    return self
                        .ring
                        .push(done.tag, Call::Sync(storage.fd()), done.buffer);
                }
            }
            Err(error) => {
                tracing::error!(%error, ?id, "disk flush failed");
                self.disk_done(id, DiskStatus::MediumError, Vec::new());
            }
        }
        Ok(())
    }

    fn typed(&mut self, done: Done<Tag>) -> io::Result<()> {
        let Some(console) = &mut self.config.console else {
            return Ok(());
        };
        let len = match done.result {
            Ok(0) | Err(_) => return Ok(()), // Nobody types any more.
            Ok(len) => len,
        };
        let input = console.input();
        match console.typed(&done.buffer[..len]) {
            Typed::Bytes(bytes) if bytes.is_empty() => {}
            Typed::Bytes(bytes) => self.deliver(Input::ConsoleRx(bytes)),
            Typed::Quit => (self.config.deliver)(Delivery::Quit),
        }
        self.ring
            .push(Tag::ConsoleRead, Call::Read(input), done.buffer)
    }

    fn console_written(&mut self, done: Done<Tag>) -> io::Result<()> {
        self.console_busy = false;
        if let Ok(len) = done.result {
            for byte in done.buffer[len..].iter().rev() {
                self.console_out.push_front(*byte);
            }
        }
        Ok(())
    }
}

/// Whether an effect waits in the gate; what does not act on the world starts at once.
fn acts_on_world(effect: &Effect) -> bool {
    match effect {
        Effect::NetTx(_)
        | Effect::ConsoleTx(_)
        | Effect::DiskWrite { .. }
        | Effect::DiskFlush { .. }
        | Effect::PowerOff
        | Effect::Reset => true,
        Effect::DiskRead { .. } | Effect::EntropyWanted { .. } | Effect::NetOffloads(_) => false,
    }
}

/// Whether an error says that the storage cannot be reached, not that the medium is bad.
fn is_transport(error: &io::Error) -> bool {
    let codes = [
        libc::ETIMEDOUT,
        libc::ENOTCONN,
        libc::ESTALE,
        libc::EAGAIN,
        libc::EHOSTUNREACH,
    ];
    error
        .raw_os_error()
        .is_some_and(|code| codes.contains(&code))
}
