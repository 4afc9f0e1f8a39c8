//! The outside world of a live VM: the host's clock, the queue of inputs, and the host I/O thread.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use devices::{Board, Effect, Input, VirtualTime};
use format::Seq;
use hypervisor::{GuestRam, Kicker};
use replay::{Outside, VirtualClock};

use super::host_ns;
use super::pulse::PulseState;
use crate::io::{Delivery, IoHandle};

/// Longest sleep while the guest is halted, so that a lost wake-up would not be for ever.
const MAX_SLEEP: Duration = Duration::from_secs(1);
/// Pause before the vCPU looks again whether the gate has room.
const FULL_PAUSE: Duration = Duration::from_micros(50);
/// Bytes typed that are given to the guest at one time.
const CONSOLE_PIECE: usize = 16;

/// What other threads send to the vCPU's thread.
#[derive(Debug)]
pub enum ToVcpu<K> {
    /// An input for the guest.
    Input(Input),
    /// A command.
    Command(K),
}

/// Sends inputs and commands to the vCPU's thread.
#[derive(Debug)]
pub struct VcpuSender<K> {
    send: Sender<ToVcpu<K>>,
    pulse: Arc<PulseState>,
    kicker: Option<Kicker>,
}

impl<K> Clone for VcpuSender<K> {
    fn clone(&self) -> Self {
        Self {
            send: self.send.clone(),
            pulse: Arc::clone(&self.pulse),
            kicker: self.kicker.clone(),
        }
    }
}

impl<K> VcpuSender<K> {
    /// Queues an input; it reaches the guest at the next exit, or by the pulse if none comes.
    pub fn input(&self, input: Input) {
        // A vCPU that has ended takes no inputs; they are lost as on a machine that is off.
        if self.send.send(ToVcpu::Input(input)).is_ok() {
            self.pulse.queued();
        }
    }

    /// Queues a command, and stops the vCPU for it. False where the vCPU has ended.
    pub fn command(&self, command: K) -> bool {
        let sent = self.send.send(ToVcpu::Command(command)).is_ok();
        if sent {
            self.pulse.queued();
            if let Some(kicker) = &self.kicker {
                kicker.kick();
            }
        }
        sent
    }

    /// Takes the host I/O thread's inputs; what is none goes to `other`.
    pub fn deliveries(
        &self,
        other: impl Fn(Delivery) + Send + 'static,
    ) -> Box<dyn Fn(Delivery) + Send>
    where
        K: Send + 'static,
    {
        let sender = self.clone();
        Box::new(move |delivery| match delivery {
            Delivery::Input(input) => sender.input(input),
            delivery => other(delivery),
        })
    }
}

/// The queue's end at the vCPU's thread.
#[derive(Debug)]
pub struct Inbox<K> {
    receive: Receiver<ToVcpu<K>>,
    frames: VecDeque<Vec<u8>>,
    keys: VecDeque<u8>,
    others: VecDeque<Input>,
    commands: VecDeque<K>,
}

/// Makes the queue to a vCPU's thread.
pub fn inbox<K>(pulse: &Arc<PulseState>, kicker: Option<Kicker>) -> (VcpuSender<K>, Inbox<K>) {
    let (send, receive) = channel();
    let sender = VcpuSender {
        send,
        pulse: Arc::clone(pulse),
        kicker,
    };
    let inbox = Inbox {
        receive,
        frames: VecDeque::new(),
        keys: VecDeque::new(),
        others: VecDeque::new(),
        commands: VecDeque::new(),
    };
    (sender, inbox)
}

impl<K> Inbox<K> {
    fn sort(&mut self, message: ToVcpu<K>) {
        match message {
            ToVcpu::Input(Input::NetRx(frame)) => self.frames.push_back(frame),
            ToVcpu::Input(Input::ConsoleRx(bytes)) => self.keys.extend(bytes),
            ToVcpu::Input(other) => self.others.push_back(other),
            ToVcpu::Command(command) => self.commands.push_back(command),
        }
    }

    /// Sorts what has come; true where something has.
    fn drain(&mut self) -> bool {
        let mut came = false;
        while let Ok(message) = self.receive.try_recv() {
            self.sort(message);
            came = true;
        }
        came
    }

    /// The next command.
    pub fn command(&mut self) -> Option<K> {
        self.drain();
        self.commands.pop_front()
    }

    /// Whether a command waits.
    pub fn has_command(&self) -> bool {
        !self.commands.is_empty()
    }

    /// The next command, waited for; none once all senders are gone.
    pub fn wait_command(&mut self) -> Option<K> {
        loop {
            if let Some(command) = self.command() {
                return Some(command);
            }
            let message = self.receive.recv().ok()?;
            self.sort(message);
        }
    }
}

/// The outside world.
pub struct Live<K> {
    clock: VirtualClock,
    inbox: Inbox<K>,
    io: Option<IoHandle>,
    pulse: Arc<PulseState>,
    next_timer: Option<VirtualTime>,
    waited_ns: u64,
    reset: bool,
}

impl<K> Live<K> {
    /// A world in which virtual time goes on from `now`; `behind_ns` have to be caught up.
    pub fn new(
        now: VirtualTime,
        behind_ns: u64,
        inbox: Inbox<K>,
        io: Option<IoHandle>,
        pulse: Arc<PulseState>,
    ) -> Self {
        let clock = VirtualClock::new(now, host_ns(), behind_ns);
        Self {
            clock,
            inbox,
            io,
            pulse,
            next_timer: None,
            waited_ns: 0,
            reset: false,
        }
    }

    /// The queue.
    pub fn inbox_mut(&mut self) -> &mut Inbox<K> {
        &mut self.inbox
    }

    /// The pulse.
    pub fn pulse(&self) -> &PulseState {
        &self.pulse
    }

    /// Whether the guest has asked for a reset.
    pub fn wants_reset(&self) -> bool {
        self.reset
    }

    /// How long this world let the vCPU's thread wait since the last call, in ns: for inputs, and for
    /// room in the gate.
    pub fn take_waited(&mut self) -> u64 {
        std::mem::take(&mut self.waited_ns)
    }

    /// Keeps the guest from running for `time`, or until a command comes. Inputs wait meanwhile.
    pub fn hold(&mut self, time: Duration) {
        self.pulse.resting();
        let end = host_ns().saturating_add(time.as_nanos() as u64);
        loop {
            self.inbox.drain();
            let left = end.saturating_sub(host_ns());
            if left == 0 || !self.inbox.commands.is_empty() {
                return;
            }
            match self.inbox.receive.recv_timeout(Duration::from_nanos(left)) {
                Ok(message) => self.inbox.sort(message),
                Err(RecvTimeoutError::Timeout) => return,
                Err(RecvTimeoutError::Disconnected) => {
                    return std::thread::sleep(Duration::from_nanos(left));
                }
            }
        }
    }

    fn wait_counted(&mut self, sleep: Duration) {
        let since = host_ns();
        match self.inbox.receive.recv_timeout(sleep) {
            Ok(message) => self.inbox.sort(message),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => std::thread::sleep(sleep),
        }
        self.waited_ns += host_ns().saturating_sub(since);
    }

    /// The queue whose first input the board has room for.
    fn ready(&self, board: &Board, ram: &GuestRam) -> Option<Ready> {
        if !self.inbox.others.is_empty() {
            return Some(Ready::Other);
        }
        if !self.inbox.keys.is_empty() {
            let room = board.console_rx_room();
            let count = room.min(CONSOLE_PIECE).min(self.inbox.keys.len());
            if count > 0 {
                return Some(Ready::Keys(count));
            }
        }
        (!self.inbox.frames.is_empty() && board.net_rx_room(ram.memory())).then_some(Ready::Frame)
    }
}

/// An input that the board has room for.
enum Ready {
    Other,
    Keys(usize),
    Frame,
}

impl<K> Outside for Live<K> {
    fn now(&mut self) -> VirtualTime {
        self.clock.sample(host_ns())
    }

    fn poll(&mut self, board: &Board, ram: &GuestRam) -> Option<Input> {
        self.pulse.drained();
        self.inbox.drain();
        match self.ready(board, ram)? {
            Ready::Other => self.inbox.others.pop_front(),
            Ready::Keys(count) => Some(Input::ConsoleRx(self.inbox.keys.drain(..count).collect())),
            Ready::Frame => {
                let frame = self.inbox.frames.pop_front()?;
                if let Some(io) = &self.io {
                    io.frame_taken();
                }
                Some(Input::NetRx(frame))
            }
        }
    }

    fn emit(&mut self, effect: Effect, after: Option<Seq>) {
        if let Effect::EntropyWanted { id, len } = effect {
            self.inbox.others.push_back(Input::Entropy {
                id,
                data: random(len as usize),
            });
            return;
        }
        self.reset |= matches!(effect, Effect::Reset);
        let Some(io) = &self.io else { return };
        io.emit(effect, after);
        if !io.is_full() {
            return;
        }
        let since = host_ns();
        while io.is_full() {
            std::thread::sleep(FULL_PAUSE);
        }
        self.waited_ns += host_ns().saturating_sub(since);
    }

    fn wait(&mut self, until: Option<VirtualTime>) {
        self.pulse.resting();
        // What has come since the last look may be what is waited for.
        if self.inbox.drain() || self.inbox.has_command() || !self.inbox.others.is_empty() {
            return;
        }
        let now = host_ns();
        self.clock.sample(now);
        let sleep = until.map_or(MAX_SLEEP, |due| {
            Duration::from_nanos(self.clock.host_ns_until(due)).min(MAX_SLEEP)
        });
        if sleep.is_zero() {
            return;
        }
        self.wait_counted(sleep);
    }

    fn overdue(&mut self, board: &Board, ram: &GuestRam) -> bool {
        self.pulse.drained();
        self.inbox.drain();
        let now = self.clock.sample(host_ns());
        board.next_timer().is_some_and(|due| due <= now) || self.ready(board, ram).is_some()
    }

    fn running(&mut self, next_timer: Option<VirtualTime>) {
        let due = match next_timer {
            Some(due) => self.clock.host_deadline(due),
            None => u64::MAX,
        };
        self.next_timer = next_timer;
        self.pulse.running(due);
    }
}

fn random(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut filled = 0;
    while filled < len {
        match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "no random numbers from the host; the guest waits");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
    bytes
}
