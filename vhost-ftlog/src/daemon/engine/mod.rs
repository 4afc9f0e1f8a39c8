//! The data thread: rings, connection and shared memory, driven by completions.
//!
//! ```text
//!             Open                Adopt
//!   Closed ---------> Connecting ---------> Connected
//!     ^                 ^   |                  |
//!     |     Close       |   |       loss       |
//!     +-----------------+---+------------------+
//! ```
//!
//! One [`Engine`] owns all state and runs on one thread; others reach it through an
//! [`EngineHandle`]. One turn does everything that can be done now, queues the operations for it, and
//! enters the kernel once for all of them; a short message that is alone leaves at once. It allocates nothing per frame. It knows the kernel only as
//! a [`Ring`].

mod command;
mod frame;
mod io;
mod link;
mod notices;
mod queues;
mod receiver;
pub mod ring_io;
mod sender;
#[cfg(any(test, fuzzing))]
pub mod simulated;
mod spin;
pub mod stats;
#[cfg(test)]
mod tests;
pub mod uring;
mod zero_copy;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;

use ebpf_events::maps::DaemonPage;
use heartbeat::Page;

pub use command::{
    Command, EngineHandle, Prepared, QueueSetup, Refused, Reply, Report, SessionParamsOf, Snapshot,
};

use self::io::{Io, Token};
use self::link::Link;
use self::notices::Notices;
use self::receiver::Receiver;
use self::ring_io::{Completion, Ring, Slot, Wait};
use self::sender::Sender;
use self::spin::SpinBudget;
use self::stats::Stats;
use super::memory::DeviceMemory;
use crate::config_space::{Role, SessionParams, Tuning};
use crate::notice::Notice;

/// How long the sender spins on after an acknowledgement, in ns.
const AFTER_ACK_NS: u64 = 50_000;
/// How often the data thread wakes without a VMM, in ns. With one, a tick wakes it.
const IDLE_NS: u64 = 1_000_000_000;

/// What the engine needs besides its ring.
pub struct EngineConfig {
    /// How long to go on delivering for a dead VMM, or to drain for SIGTERM, in ns.
    pub linger_ns: u64,
    /// Whether to let others on the CPU run between two looks while spinning.
    pub yield_in_spin: bool,
    /// Whether to let a VMM's thread of the same real-time priority run first that an acknowledgement was
    /// told to. It often has the next append, which then needs no kick.
    pub yield_to_called: bool,
    /// Monotonic time in ns.
    pub clock: fn() -> u64,
}

/// The data thread's state.
pub struct Engine<R> {
    io: Io<R>,
    config: EngineConfig,
    inbox: mpsc::Receiver<Command>,
    reports: mpsc::Sender<Report>,
    tuning: Tuning,
    stats: Stats,
    spin: SpinBudget,
    now: u64,
    /// When the kernel last had an answer, in ns.
    worked_at: u64,
    commands_due: bool,
    /// A kick came, and the append that it came for is still to be taken.
    kicked: bool,
    /// Something changed while this turn prepared to wait: take another turn at once.
    again: bool,

    memory: Option<Arc<DeviceMemory>>,
    /// What heartbeats tell of this thread, where `ftprobe` has been found.
    beat: Option<Page<DaemonPage>>,
    vmm_dead: bool,
    /// A VMM's vhost-user connection stands.
    has_frontend: bool,
    sender: Option<Sender>,
    receiver: Option<Receiver>,
    notices: Notices,

    params: Option<SessionParams>,
    /// The session, in what is logged.
    span: tracing::Span,
    link: Option<Link>,
    generation: u64,
    /// The VMM was told that the peer's is dead.
    peer_vmm_dead: bool,
    /// The peer knows that the VMM here is dead.
    told_gone: bool,
    /// When a drain, or the delivery for a dead VMM, is given up.
    give_up_at: Option<u64>,
    draining: bool,
    finished: bool,
}

impl<R: Ring> Engine<R> {
    /// A data thread on this ring. `doorbell` is rung when `inbox` has something.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(
        ring: R,
        config: EngineConfig,
        inbox: mpsc::Receiver<Command>,
        doorbell: std::os::fd::OwnedFd,
        reports: mpsc::Sender<Report>,
    ) -> std::io::Result<Self> {
        let mut io = Io::new(ring);
        io.set_file(Slot::Doorbell, Some(doorbell))?;
        let now = (config.clock)();
        Ok(Self {
            io,
            config,
            inbox,
            reports,
            tuning: Tuning::default(),
            stats: Stats::default(),
            spin: SpinBudget::default(),
            now,
            worked_at: 0,
            commands_due: true,
            kicked: false,
            again: false,
            memory: None,
            beat: None,
            vmm_dead: false,
            has_frontend: false,
            sender: None,
            receiver: None,
            notices: Notices::default(),
            params: None,
            span: tracing::Span::none(),
            link: None,
            generation: 0,
            peer_vmm_dead: false,
            told_gone: false,
            give_up_at: None,
            draining: false,
            finished: false,
        })
    }

    /// Runs until everything that was to be done before the end is done and the handles are gone.
    ///
    /// # Errors
    /// Where the kernel refuses what a healthy kernel does not.
    pub fn run(&mut self) -> std::io::Result<()> {
        while !self.finished {
            self.turn()?;
        }
        self.end_link_in_order();
        Ok(())
    }

    /// One turn: do what can be done, enter the kernel, take its answers.
    ///
    /// # Errors
    /// As [`Engine::run`].
    pub fn turn(&mut self) -> std::io::Result<()> {
        self.now = (self.config.clock)();
        if self.commands_due {
            self.commands_due = false;
            self.run_commands();
        }
        self.again = false;
        self.pump()?;
        self.arm();
        self.tick();
        if self.again {
            self.io.enter(Wait::No)?;
        } else {
            self.rest()?;
        }
        while let Some((token, completion)) = self.io.next() {
            if token != Token::Tick {
                self.worked_at = self.now;
                self.spin.renew(self.now);
            }
            self.complete(token, completion);
        }
        Ok(())
    }

    /// Moves what can be moved.
    fn pump(&mut self) -> std::io::Result<()> {
        if let Err(error) = self.pump_queues() {
            tracing::error!(%error, "the VMM broke a ring");
            self.broken();
        }
        if self.role() == Some(Role::Receiver) {
            self.pump_delivery()?;
        }
        Ok(())
    }

    fn pump_queues(&mut self) -> Result<(), ring::Error> {
        if let Some(sender) = &mut self.sender {
            sender.look_at_flush();
            let gathered = sender.gather(self.now)?;
            if gathered > 0 {
                let kicked = std::mem::take(&mut self.kicked);
                self.stats.counters.kicks_suppressed += gathered - u64::from(kicked);
            }
        }
        if self.is_sending() {
            self.send_frame();
        }
        if self.notices.is_waiting() && self.notices.flush()? {
            self.stats.counters.calls += 1;
            self.io.call(Slot::EventCall);
        }
        Ok(())
    }

    /// Waits for the next thing to do: spins while that is allowed and makes sense, else sleeps.
    fn rest(&mut self) -> std::io::Result<()> {
        if self.should_spin() {
            if !self.spin.is_spinning() {
                self.stats.counters.spins += 1;
            }
            if self.spin.may_spin(&self.tuning, self.now) {
                if self.io.has_answer() || self.io.has_work() {
                    return self.io.enter(Wait::No);
                }
                // While an Output waits for the peer nobody on this CPU has more urgent things to do.
                if self.config.yield_in_spin && !self.waits_for_peer() {
                    std::thread::yield_now();
                } else {
                    std::hint::spin_loop();
                }
                return Ok(());
            }
        }
        if let Some(spun) = self.spin.stop(self.now) {
            self.stats.counters.spin_ns += spun;
        }
        self.sleep()
    }

    fn should_spin(&self) -> bool {
        if self.tuning.spin_us == 0 || self.link.is_none() {
            return false;
        }
        match (&self.sender, &self.receiver, self.params) {
            // The next Output often comes soon after the last one was acknowledged.
            (Some(sender), _, Some(params)) if params.role == Role::Sender => {
                sender.output_waits()
                    || (self.spin.is_spinning() && self.now - self.worked_at < AFTER_ACK_NS)
            }
            // Frames that came a moment ago announce the next ones.
            (_, Some(_), Some(params)) if params.role == Role::Receiver => self
                .link
                .as_ref()
                .is_some_and(|link| link.is_recent(self.now, &self.tuning)),
            _ => false,
        }
    }

    /// Whether there is a connection for the log of the VMM here.
    fn is_sending(&self) -> bool {
        self.role() == Some(Role::Sender) && self.link.is_some()
    }

    fn waits_for_peer(&self) -> bool {
        self.role() == Some(Role::Sender) && self.sender.as_ref().is_some_and(Sender::output_waits)
    }

    fn sleep(&mut self) -> std::io::Result<()> {
        let mut stay_awake = self.notices.is_waiting() && self.notices_can_go();
        let connected = self.link.is_some();
        let is_sending = self.is_sending();
        let mut broken = false;
        if let Some(sender) = &mut self.sender {
            match sender.fall_asleep(&self.tuning, self.now, is_sending) {
                Ok(more) => stay_awake |= more,
                Err(_) => broken = true,
            }
        }
        if let Some(receiver) = &self.receiver {
            stay_awake |= connected && receiver.ask_replay_kick(self.tuning.ack_mode);
        }
        if broken {
            self.broken();
        } else if stay_awake {
            self.io.enter(Wait::No)?;
        } else {
            self.stats.counters.sleeps += 1;
            self.io.enter(self.until_deadline())?;
        }
        if let Some(sender) = &self.sender {
            sender.wake();
        }
        Ok(())
    }

    fn notices_can_go(&mut self) -> bool {
        match self.notices.flush() {
            Ok(true) => {
                self.io.call(Slot::EventCall);
                true
            }
            Ok(false) => false,
            Err(_) => {
                self.broken();
                true
            }
        }
    }

    fn until_deadline(&self) -> Wait {
        let batch = self
            .sender
            .as_ref()
            .filter(|_| self.is_sending())
            .and_then(|sender| sender.timer(&self.tuning, self.now));
        match batch {
            Some(deadline) => Wait::AtMost(deadline.saturating_sub(self.now)),
            None if self.memory.is_some() => Wait::ForAnswer,
            None => Wait::AtMost(IDLE_NS),
        }
    }

    /// The progress word, the death of the VMM where no operation watches it, and what is overdue.
    fn tick(&mut self) {
        if let Some(beat) = &self.beat {
            beat.progress.fetch_add(1, Ordering::Relaxed);
        }
        let Some(memory) = &self.memory else {
            self.check_finished();
            return;
        };
        let control = memory.control();
        control.sender.progress.fetch_add(1, Ordering::Relaxed);
        if !self.vmm_dead && control.owner.is_dead() {
            self.vmm_died();
        }
        if self.vmm_dead || self.draining {
            self.check_finished();
        }
        self.release_if_abandoned();
    }

    /// Keeps the operations under way that wait for something.
    fn arm(&mut self) {
        self.io.watch_event(Token::Doorbell, Slot::Doorbell);
        self.io.watch_event(Token::LogKick, Slot::LogKick);
        self.io.watch_event(Token::DeliveryKick, Slot::DeliveryKick);
        self.io.watch_event(Token::EventKick, Slot::EventKick);
        if self.memory.is_some() {
            self.io.watch_tick();
        }
        self.watch_owner();
        self.arm_link();
    }

    fn complete(&mut self, token: Token, completion: Completion) {
        match token {
            Token::Doorbell => self.commands_due = true,
            Token::LogKick => {
                self.stats.counters.kicks += 1;
                self.kicked = true;
            }
            Token::EventKick => self.stats.counters.kicks += 1,
            Token::DeliveryKick => {
                self.stats.counters.kicks += 1;
                let moved = self.receiver.as_mut().map(Receiver::look_at_consumed);
                if matches!(moved, Some(Err(_))) {
                    self.broken();
                }
            }
            Token::Owner => self.owner_changed(completion.result),
            Token::SendFrame => self.frame_sent(completion.result),
            Token::ReceiveLog => self.log_received(completion.result),
            Token::SendAck => self.ack_sent(completion.result),
            Token::ReceiveAck => self.acks_received(completion.result),
            Token::Tick | Token::Cancel => {}
        }
    }

    fn notify(&mut self, notice: Notice) {
        self.span.in_scope(|| tracing::info!(?notice, "notice"));
        self.notices.push(notice, &mut self.stats);
    }

    fn report(&self, report: Report) {
        // Whoever listened is gone only when the daemon ends.
        let _ = self.reports.send(report);
    }
}
