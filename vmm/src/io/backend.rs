//! The thread that does the VM's host I/O.
//!
//! One loop: take effects from the vCPU's thread, release what the gate lets go, reap completions,
//! sleep. An operation that fails because the storage or the link is away stays outstanding and is
//! tried again; only errors of the medium reach the guest.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use devices::{DiskStatus, Effect, Input, NetOffloads, RequestId};
use format::Seq;
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::buffer::Buffer;
use super::disk::{Disk, SECTOR_LEN};
use super::gate::{Acks, Gate, GateStats};
use super::ring::{Call, Done, Ring};
use super::tap::{MAX_FRAME_LEN, Tap};
use crate::console::{Console, Typed};

/// Frames from the TAP that wait for the vCPU at the most; more stay in the kernel's queue.
const MAX_NET_WAITING: usize = 256;
/// Effects that the gate holds at the most; then the vCPU waits.
const MAX_HELD: usize = 4096;
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
    pub disk: Option<Disk>,
    /// The console.
    pub console: Option<Console>,
    /// How far the log is acknowledged.
    pub acks: Acks,
    /// Takes inputs to the vCPU's thread.
    pub deliver: Box<dyn Fn(Delivery) + Send>,
}

/// What the thread delivers.
#[derive(Debug)]
pub enum Delivery {
    /// An input for the guest.
    Input(Input),
    /// The person at the console wants to leave.
    Quit,
}

enum ToIo {
    Emit(Effect, Option<Seq>),
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
    TapRead,
    TapWrite,
    DiskRead(RequestId, u64),
    DiskWrite(RequestId, u64),
    DiskFlush(RequestId),
    ConsoleRead,
    ConsoleWrite,
}

struct Backend {
    config: IoConfig,
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
        let gate = Gate::new(config.acks.clone());
        Self {
            config,
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
        let output = |tag: &Tag| !matches!(tag, Tag::Wake | Tag::TapRead | Tag::ConsoleRead);
        self.ring.count(output) == 0 && self.console_out.is_empty()
    }

    /// Submits, and sleeps unless there is a message already.
    fn sleep(&mut self) -> io::Result<()> {
        self.shared.sleeping.store(true, Ordering::SeqCst);
        let work = self.shared.held.load(Ordering::SeqCst) > self.gate.len();
        self.ring.wait(usize::from(!work && !self.stopping_now()))?;
        self.shared.sleeping.store(false, Ordering::SeqCst);
        Ok(())
    }

    fn stopping_now(&self) -> bool {
        self.stopping && self.is_idle()
    }

    fn take_messages(&mut self) -> io::Result<()> {
        loop {
            match self.receive.try_recv() {
                Ok(ToIo::Emit(effect, after)) => self.gate.hold(effect, after),
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
        while let Some(effect) = self.gate.release() {
            self.shared.held.fetch_sub(1, Ordering::Relaxed);
            self.start(effect)?;
        }
        *self.shared.stats.lock().expect("nobody panics with it") = self.gate.stats();
        self.write_console()
    }

    fn start(&mut self, effect: Effect) -> io::Result<()> {
        let tap = self.config.tap.as_ref().map(Tap::fd);
        let disk = self.config.disk.as_ref().map(Disk::fd);
        match (effect, tap, disk) {
            (Effect::NetTx(frame), Some(tap), _) => {
                self.ring
                    .push(Tag::TapWrite, Call::Write(tap), Buffer::of(&frame))
            }
            (Effect::ConsoleTx(byte), ..) => {
                self.console_out.push_back(byte);
                Ok(())
            }
            (Effect::NetOffloads(offloads), ..) => {
                self.set_offloads(offloads);
                Ok(())
            }
            (Effect::DiskRead { id, sector, len }, _, Some(disk)) => {
                let at = sector * SECTOR_LEN;
                let buffer = Buffer::zeroed(len as usize);
                self.ring
                    .push(Tag::DiskRead(id, at), Call::ReadAt(disk, at), buffer)
            }
            (Effect::DiskWrite { id, sector, data }, _, Some(disk)) => {
                let at = sector * SECTOR_LEN;
                let buffer = Buffer::of(&data);
                self.ring
                    .push(Tag::DiskWrite(id, at), Call::WriteAt(disk, at), buffer)
            }
            (Effect::DiskFlush { id }, _, Some(disk)) => {
                self.ring
                    .push(Tag::DiskFlush(id), Call::Sync(disk), Buffer::zeroed(0))
            }
            (Effect::NetTx(_), None, _) => Ok(()),
            (Effect::DiskRead { id, .. }, ..)
            | (Effect::DiskWrite { id, .. }, ..)
            | (Effect::DiskFlush { id }, ..) => {
                self.disk_done(id, DiskStatus::MediumError, Vec::new());
                Ok(())
            }
            (Effect::EntropyWanted { .. } | Effect::PowerOff | Effect::Reset, ..) => Ok(()),
        }
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
            Tag::DiskRead(id, at) => self.disk_ended(done, id, Some(at), false),
            Tag::DiskWrite(id, at) => self.disk_ended(done, id, Some(at), true),
            Tag::DiskFlush(id) => self.disk_ended(done, id, None, false),
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

    /// A disk request has ended on the host: completes it, or tries it again where the storage, not
    /// the medium, failed.
    fn disk_ended(
        &mut self,
        done: Done<Tag>,
        id: RequestId,
        at: Option<u64>,
        write: bool,
    ) -> io::Result<()> {
        let Done {
            tag,
            buffer,
            result,
        } = done;
        let short = |len: usize| at.is_some() && len != buffer.len();
        match result {
            Ok(len) if short(len) => {
                tracing::error!(?id, len, wanted = buffer.len(), "short disk transfer");
                self.disk_done(id, DiskStatus::MediumError, Vec::new());
            }
            Ok(_) => {
                let data = if write { Vec::new() } else { buffer.to_vec() };
                self.disk_done(id, DiskStatus::Ok, data);
            }
            Err(error) if is_transport(&error) && !self.stopping => {
                tracing::warn!(%error, ?id, "storage is away; the request stays outstanding");
                std::thread::sleep(Duration::from_millis(10));
                return self.retry(tag, at, write, buffer);
            }
            Err(error) => {
                tracing::error!(%error, ?id, "disk error");
                self.disk_done(id, DiskStatus::MediumError, Vec::new());
            }
        }
        Ok(())
    }

    fn retry(&mut self, tag: Tag, at: Option<u64>, write: bool, buffer: Buffer) -> io::Result<()> {
        let Some(disk) = self.config.disk.as_ref().map(Disk::fd) else {
            return Ok(());
        };
        let call = match (at, write) {
            (Some(at), true) => Call::WriteAt(disk, at),
            (Some(at), false) => Call::ReadAt(disk, at),
            (None, _) => Call::Sync(disk),
        };
        self.ring.push(tag, call, buffer)
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
