//! The thread that does the VM's host I/O.
//!
//! One loop: take effects from the vCPU's thread, release what the gate lets go, reap completions,
//! sleep. An operation that fails because the storage or the link is away stays outstanding and is
//! tried again; only errors of the medium reach the guest.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use devices::{Effect, Input, NetOffloads, RequestId};
use ft::GateMode;

use super::buffer::Buffer;
use super::gate::{Gate, effect_bytes};
use super::handle::{Delivery, IoConfig, Shared, ToIo};
use super::requests::{Part, Requests};
use super::ring::{Call, Done, Ring};
use super::tap::{MAX_FRAME_LEN, Tap};
use crate::console::Typed;

/// Frames from the TAP that wait for the vCPU at the most; more stay in the kernel's queue.
pub(super) const MAX_NET_WAITING: usize = 256;
/// Bytes of output that wait for a console that is not read at the most; what comes then is lost, as on a
/// serial line where nobody listens.
const MAX_CONSOLE_WAITING: usize = 1 << 20;
/// How long a console that takes nothing may keep the thread from ending.
const CONSOLE_PATIENCE: Duration = Duration::from_millis(500);
/// Bytes of one console read.
const CONSOLE_READ_LEN: usize = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tag {
    Wake,
    Ack(RawFd),
    TapRead,
    TapWrite,
    Disk(RequestId, Part),
    /// A read of the image somewhere else, which began then.
    Elsewhere(Instant),
    ConsoleRead,
    ConsoleWrite,
}

pub(super) struct Backend {
    pub(super) config: IoConfig,
    pub(super) requests: Requests,
    pub(super) ring: Ring<Tag>,
    receive: Receiver<ToIo>,
    shared: Arc<Shared>,
    gate: Gate,
    console_out: VecDeque<u8>,
    console_busy: bool,
    console_lost: u64,
    tap_reading: bool,
    pub(super) stopping: bool,
    /// When the console last took something, or the end was asked for.
    console_moved: Instant,
}

impl Backend {
    pub(super) fn new(
        config: IoConfig,
        ring: Ring<Tag>,
        receive: Receiver<ToIo>,
        shared: Arc<Shared>,
    ) -> Self {
        let gate = Gate::new(config.gate, config.gap);
        Self {
            config,
            requests: Requests::default(),
            ring,
            receive,
            shared,
            gate,
            console_out: VecDeque::new(),
            console_busy: false,
            console_lost: 0,
            tap_reading: false,
            stopping: false,
            console_moved: Instant::now(),
        }
    }

    pub(super) fn run(mut self) {
        if let Err(error) = self.serve() {
            tracing::error!(%error, "host I/O stopped");
            (self.config.deliver)(Delivery::Failed(format!("host I/O stopped: {error}")));
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
            self.look_after_storage()?;
            if self.stopping && self.is_idle() {
                return Ok(());
            }
            self.sleep()?;
            while let Some(done) = self.ring.reap() {
                self.complete(done)?;
            }
        }
    }

    /// Nothing of the guest's output is on its way any more, but for a console that takes none.
    fn is_idle(&self) -> bool {
        let output = |tag: &Tag| matches!(tag, Tag::TapWrite | Tag::Disk(..));
        let console = self.console_busy || !self.console_out.is_empty();
        self.ring.count(output) == 0
            && !(console && self.console_moved.elapsed() < CONSOLE_PATIENCE)
    }

    /// Submits, and sleeps unless there is something to do. Who has something to do for it wakes it only where
    /// `sleeping` is set: all of that is looked at once more when it is.
    pub(super) fn sleep(&mut self) -> io::Result<()> {
        self.shared.sleeping.store(true, Ordering::SeqCst);
        let work = self.shared.queued.load(Ordering::SeqCst) > 0 || self.wants_frames();
        let wait = usize::from(!work && !self.gate.arm() && !self.stopping_now());
        match self.requests.pause() {
            Some(pause) => self.ring.wait_for(wait, pause)?,
            None if self.gate.holds() || !self.requests.is_idle() || self.stopping => {
                self.ring.wait_for(wait, self.gate.tick())?;
            }
            None => self.ring.wait(wait)?,
        }
        self.shared.sleeping.store(false, Ordering::SeqCst);
        Ok(())
    }

    fn stopping_now(&self) -> bool {
        self.stopping && self.is_idle()
    }

    pub(super) fn take_messages(&mut self) -> io::Result<()> {
        loop {
            let message = match self.receive.try_recv() {
                Ok(message) => message,
                Err(TryRecvError::Empty) => return Ok(()),
                Err(TryRecvError::Disconnected) => {
                    self.stop();
                    return Ok(());
                }
            };
            self.shared.queued.fetch_sub(1, Ordering::SeqCst);
            match message {
                ToIo::Emit(effect, after) if acts_on_world(&effect) => {
                    self.gate.hold(effect, after);
                }
                ToIo::Emit(effect, _) => {
                    self.shared.let_go(1, effect_bytes(&effect));
                    self.start(effect)?;
                }
                ToIo::Gate(mode) => {
                    let at = self.gate.set_mode(mode);
                    if let GateMode::Holding(session) = mode {
                        (self.config.deliver)(Delivery::GateHolds(session, at));
                    }
                }
                ToIo::Fold => self.fold()?,
                ToIo::Unquarantine => self.unquarantine()?,
                ToIo::Announce(frame) if self.gate.is_shut() => drop(frame),
                ToIo::Announce(frame) => self.start(frame)?,
                ToIo::Watch(session, acks) => {
                    self.gate.watch(session, acks);
                    self.poll_acks()?;
                }
                ToIo::Unwatch => self.gate.unwatch(),
                ToIo::Discard => {
                    let (count, bytes) = self.gate.discard();
                    self.shared.let_go(count, bytes);
                }
                ToIo::Stop => {
                    self.stop();
                    return Ok(());
                }
            }
        }
    }

    fn stop(&mut self) {
        if !self.stopping {
            self.stopping = true;
            self.console_moved = Instant::now();
        }
    }

    fn release(&mut self) -> io::Result<()> {
        loop {
            match self.gate.release() {
                Ok(Some(effect)) => {
                    self.shared.let_go(1, effect_bytes(&effect));
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

    pub(super) fn start(&mut self, effect: Effect) -> io::Result<()> {
        match effect {
            Effect::NetTx(frame) => match self.config.tap.as_ref().map(Tap::fd) {
                Some(tap) => self
                    .ring
                    .push(Tag::TapWrite, Call::Write(tap), Buffer::of(&frame)),
                None => Ok(()),
            },
            Effect::ConsoleTx(byte) => {
                self.show(byte);
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

    fn set_offloads(&self, offloads: NetOffloads) {
        let Some(tap) = &self.config.tap else { return };
        if let Err(error) = tap.set_offloads(offloads) {
            tracing::error!(%error, "the guest's frames may arrive with checksums missing");
        }
    }

    fn show(&mut self, byte: u8) {
        if self.console_out.len() < MAX_CONSOLE_WAITING {
            return self.console_out.push_back(byte);
        }
        if self.console_lost == 0 {
            tracing::warn!("the console is not read; output of the guest is lost");
        }
        self.console_lost += 1;
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

    /// Whether frames are to be read and are not.
    fn wants_frames(&self) -> bool {
        let room = self.shared.net_waiting.load(Ordering::SeqCst) < MAX_NET_WAITING;
        room && self.config.tap.is_some() && !self.tap_reading && !self.stopping
    }

    fn read_tap(&mut self) -> io::Result<()> {
        let wanted = self.wants_frames();
        match &self.config.tap {
            Some(tap) if wanted => {
                self.tap_reading = true;
                let call = Call::Read(tap.fd());
                self.ring
                    .push(Tag::TapRead, call, Buffer::zeroed(MAX_FRAME_LEN))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn complete(&mut self, done: Done<Tag>) -> io::Result<()> {
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
            Tag::Elsewhere(began) => {
                self.elsewhere(began, &done.result);
                Ok(())
            }
            Tag::ConsoleRead => self.typed(done),
            Tag::ConsoleWrite => self.console_written(done),
        }
    }

    fn frame(&mut self, bytes: &[u8]) {
        self.shared.net_waiting.fetch_add(1, Ordering::AcqRel);
        self.deliver(Input::NetRx(bytes.to_vec()));
    }

    pub(super) fn deliver(&self, input: Input) {
        (self.config.deliver)(Delivery::Input(input));
    }

    fn typed(&mut self, done: Done<Tag>) -> io::Result<()> {
        let Some(console) = &mut self.config.console else {
            return Ok(());
        };
        let input = console.input();
        let len = match done.result {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                return self
                    .ring
                    .push(Tag::ConsoleRead, Call::Read(input), done.buffer);
            }
            Ok(0) | Err(_) => return Ok(()), // Nobody types any more.
            Ok(len) => len,
        };
        match console.typed(&done.buffer[..len]) {
            Typed::Bytes(bytes) if bytes.is_empty() => {}
            Typed::Bytes(bytes) => self.deliver(Input::ConsoleRx(bytes)),
            Typed::Quit => (self.config.deliver)(Delivery::Quit),
        }
        self.ring
            .push(Tag::ConsoleRead, Call::Read(input), done.buffer)
    }

    /// A terminal is written to by a thread of the kernel's, which signals of its own can interrupt: nothing is
    /// written then, and it is tried again.
    fn console_written(&mut self, done: Done<Tag>) -> io::Result<()> {
        self.console_busy = false;
        self.console_moved = Instant::now();
        let written = match done.result {
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => {
                tracing::warn!(%error, "the console takes no output; it is lost");
                return Ok(());
            }
        };
        for byte in done.buffer[written..].iter().rev() {
            self.console_out.push_front(*byte);
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
