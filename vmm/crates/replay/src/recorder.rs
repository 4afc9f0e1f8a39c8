//! The recorder: drives a machine from the outside world and writes what it cannot derive to a log.
//!
//! One call of [`Recorder::step`] takes the guest through one execution point: run, access, inputs,
//! leave. Entries of one point make one append. With [`NoLog`] the same code runs a VM that nobody
//! follows: no digest is compared, no delta is taken.

use devices::{Board, Effect, Input, VirtualTime};
use format::{ControlOp, DiskStatus, Entry, Event, Seq, split_encoded};
use hypervisor::{Vcpu, Vm};
use thiserror::Error;

use crate::clearing::DirtyClearing;
use crate::effects::is_output;
use crate::machine::MachineError;
use crate::{Machine, OutputSum, Ran};

/// Exits without a digest after which the log gets a [`Event::Reached`], so that a replica of a busy but
/// silent guest neither falls behind nor diverges for long unnoticed, whatever else is logged.
const SILENT_EXITS: u64 = 512;
/// Time without an entry after which the next exit gets one: a replica leaves no exit before it knows of a
/// later entry, so what the guest has run since the last one the replica has to run when the next comes.
const SILENT_NS: u64 = 20_000_000;
/// Exits without any entry after which a guest that has come to rest in HLT gets one.
const SILENT_EXITS_HALTED: u64 = 64;
/// How long an input waits for an exit while the guest computes in ring 0. The kernel makes one on its
/// way to any program and before it rests, so a delta there would nearly always be in vain; a kernel
/// that waits for an interrupt without either still gets it.
const RING0_PATIENCE_NS: u64 = 50_000_000;
/// Inputs applied at one execution point at the most; more wait for the next.
const MAX_INPUTS: usize = 64;

/// Where the log goes.
pub trait LogSink {
    /// Takes an append of whole entries, [`format::MAX_APPEND_LEN`] bytes at the most, and returns its
    /// sequence number. Waits while the log has no room: nothing is ever dropped.
    ///
    /// # Errors
    /// The log is gone for good.
    fn append(&mut self, bytes: &[u8]) -> Result<Seq, LogError>;

    /// An output waits for everything appended so far.
    fn urgent(&mut self);

    /// Whether anybody reads the log: without, the recorder writes none.
    fn is_on(&self) -> bool;
}

/// The log is gone for good; the text says why.
#[derive(Debug, Error)]
#[error("the log cannot be written: {0}")]
pub struct LogError(pub String);

/// No log at all.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoLog;

impl LogSink for NoLog {
    fn append(&mut self, _: &[u8]) -> Result<Seq, LogError> {
        Ok(Seq(0))
    }

    fn urgent(&mut self) {}

    fn is_on(&self) -> bool {
        false
    }
}

/// The outside world of a live machine.
pub trait Outside {
    /// Virtual time now.
    fn now(&mut self) -> VirtualTime;

    /// The next input that is there, of those that the board has room for. Costs next to nothing
    /// when there is none.
    fn poll(&mut self, board: &Board, ram: &hypervisor::GuestRam) -> Option<Input>;

    /// Something the machine does outside. What acts on the world waits until the log below `after`
    /// is acknowledged; where there is no log, `after` is none. May block while the gate is full.
    fn emit(&mut self, effect: Effect, after: Option<Seq>);

    /// Waits, with the guest halted, until an input may be there or virtual time reaches `until`, or a
    /// command wants the vCPU's thread.
    fn wait(&mut self, until: Option<VirtualTime>);

    /// Whether there is something for which the guest should be stopped between exits: a timer that is
    /// due, or an input that [`Outside::poll`] would give.
    fn overdue(&mut self, board: &Board, ram: &hypervisor::GuestRam) -> bool;

    /// Told before the guest runs: the next timer, for those who kick the vCPU when it is overdue.
    fn running(&mut self, next_timer: Option<VirtualTime>);
}

/// What a step came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The guest has moved on.
    Moved,
    /// The vCPU was kicked and no input was due: the caller may have a command for it.
    Kicked,
    /// The guest waits in HLT, and nothing has come.
    Halted,
    /// As [`Recorder::quiesce`] asked: at a numbered exit that was left, with no disk request
    /// outstanding. The guest does not run.
    Quiet,
    /// The guest has powered off or reset itself.
    Ended,
}

/// Why a live machine cannot go on.
#[derive(Debug, Error)]
pub enum RecordError {
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The log.
    #[error(transparent)]
    Log(#[from] LogError),
}

/// Counters of what was logged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RecorderStats {
    /// Deltas taken.
    pub deltas: u64,
    /// Pages in them.
    pub delta_pages: u64,
    /// Kicked stops.
    pub kicks: u64,
    /// Bytes appended to the log.
    pub log_bytes: u64,
}

/// A live machine and its log.
#[derive(Debug)]
pub struct Recorder<V, C, O, L> {
    machine: Machine<V, C>,
    outside: O,
    log: L,
    /// Entries of the present point, not yet appended.
    point: Vec<u8>,
    /// Output of the present point, not yet in an `Output` entry.
    sum: OutputSum,
    held: Vec<Effect>,
    last_entry_exit: u64,
    /// When, in virtual time that may not be logged.
    last_entry_at: VirtualTime,
    last_digest_exit: u64,
    clearing: DirtyClearing,
    /// When the input that is due at the present kicked stop was first seen to be.
    due_since: Option<VirtualTime>,
    scratch: Vec<u8>,
    quiescing: bool,
    /// The last stop had no number.
    kicked: bool,
    stats: RecorderStats,
}

impl<V: Vm, C: Vcpu, O: Outside, L: LogSink> Recorder<V, C, O, L> {
    /// Drives `machine` from `outside` and writes to `log`.
    pub fn new(machine: Machine<V, C>, outside: O, log: L) -> Self {
        let clearing = DirtyClearing::new(machine.board().now());
        Self {
            last_entry_exit: machine.exit().0,
            last_entry_at: machine.board().now(),
            last_digest_exit: machine.exit().0,
            machine,
            outside,
            log,
            point: Vec::with_capacity(4096),
            sum: OutputSum::default(),
            held: Vec::new(),
            clearing,
            due_since: None,
            scratch: Vec::new(),
            quiescing: false,
            kicked: false,
            stats: RecorderStats::default(),
        }
    }

    /// The machine.
    pub fn machine(&self) -> &Machine<V, C> {
        &self.machine
    }

    /// The machine, between steps.
    pub fn machine_mut(&mut self) -> &mut Machine<V, C> {
        &mut self.machine
    }

    /// The outside world.
    pub fn outside_mut(&mut self) -> &mut O {
        &mut self.outside
    }

    /// The log.
    pub fn log_mut(&mut self) -> &mut L {
        &mut self.log
    }

    /// What was logged so far.
    pub fn stats(&self) -> RecorderStats {
        self.stats
    }

    /// Takes it apart.
    pub fn into_parts(self) -> (Machine<V, C>, O, L) {
        (self.machine, self.outside, self.log)
    }

    /// Takes the guest through one execution point, or waits at the present one while it is halted.
    ///
    /// # Errors
    /// The machine or the log cannot go on.
    pub fn step(&mut self) -> Result<Step, RecordError> {
        if self.machine.has_ended() {
            return Ok(Step::Ended);
        }
        if self.machine.is_halted() {
            let timer = self.machine.board().next_timer();
            if self.quiescing {
                // It waits itself, for what there is to wait for.
                self.take_inputs()?;
                return self.come_to_quiet();
            }
            self.outside.wait(timer);
            self.take_inputs()?;
            return self.finish_point();
        }
        let may_rest = self.machine.is_left() && !self.kicked;
        if self.quiescing && may_rest && !self.has_disk_outstanding() {
            return Ok(Step::Quiet);
        }
        if !self.machine.is_open() && !self.machine.wants_time() {
            self.outside.running(self.machine.board().next_timer());
            self.kicked = self.machine.run()? == Ran::Kicked;
            if self.kicked {
                self.stats.kicks += 1;
                return self.between();
            }
        }
        self.at_exit()
    }

    /// From now on the guest is to come to rest: at the next numbered exit its disk requests are
    /// waited for, and [`Recorder::step`] returns [`Step::Quiet`]. False lets it run on.
    pub fn quiesce(&mut self, on: bool) {
        self.quiescing = on;
    }

    fn at_exit(&mut self) -> Result<Step, RecordError> {
        self.due_since = None;
        if self.machine.wants_time() {
            self.log_time()?;
        }
        self.log_output()?;
        self.take_inputs()?;
        if self.quiescing {
            return self.come_to_quiet();
        }
        self.finish_point()
    }

    fn has_disk_outstanding(&self) -> bool {
        let entropy = |effect: &Effect| matches!(effect, Effect::EntropyWanted { .. });
        !self.machine.board().outstanding().iter().all(entropy)
    }

    /// Waits at the present exit for the guest's disk requests, then leaves it.
    fn come_to_quiet(&mut self) -> Result<Step, RecordError> {
        self.flush_point()?;
        if self.has_disk_outstanding() {
            self.outside.wait(None);
            self.take_inputs()?;
            self.flush_point()?;
            return Ok(Step::Halted);
        }
        match self.finish_point()? {
            Step::Moved | Step::Halted => Ok(Step::Quiet),
            other => Ok(other),
        }
    }

    fn between(&mut self) -> Result<Step, RecordError> {
        let ram = self.machine.vm.memory();
        let due = self.outside.overdue(&self.machine.board, ram);
        if !due || !self.machine.vcpu().can_interrupt() || !self.is_delta_worthwhile() {
            return Ok(Step::Kicked);
        }
        self.due_since = None;
        self.open_between()?;
        self.take_inputs()?;
        self.finish_point()
    }

    /// Whether what is due should not wait for the next exit: nobody follows, a program computes, or the
    /// kernel has for long.
    fn is_delta_worthwhile(&mut self) -> bool {
        if !self.log.is_on() || self.machine.vcpu().sregs().cs.dpl != 0 {
            return true;
        }
        let now = self.outside.now();
        let since = *self.due_since.get_or_insert(now);
        now.0.saturating_sub(since.0) >= RING0_PATIENCE_NS
    }

    /// Makes the kicked stop at which the vCPU stands an execution point.
    fn open_between(&mut self) -> Result<(), RecordError> {
        if !self.log.is_on() {
            self.machine.open_between();
            return Ok(());
        }
        let mut delta = Vec::new();
        let pages = self.machine.take_delta(&mut delta)?;
        self.stats.delta_pages += pages;
        self.stats.deltas += 1;
        self.clearing.delta(self.machine.board().now(), pages);
        self.entry(Event::Delta(&delta))?;
        self.flush_point()?;
        Ok(())
    }

    fn take_inputs(&mut self) -> Result<(), RecordError> {
        let now = self.outside.now();
        if self
            .machine
            .board()
            .next_timer()
            .is_some_and(|due| due <= now)
        {
            self.input(Input::Time(now))?;
        }
        for taken in 0..MAX_INPUTS {
            let ram = self.machine.vm.memory();
            let Some(input) = self.outside.poll(&self.machine.board, ram) else {
                break;
            };
            if taken == 0 && self.machine.board().now() < now {
                self.input(Input::Time(now))?;
            }
            self.input(input)?;
        }
        self.log_output()
    }

    fn log_time(&mut self) -> Result<(), RecordError> {
        let now = self.outside.now().max(self.machine.board().now());
        self.input(Input::Time(now))
    }

    fn input(&mut self, input: Input) -> Result<(), RecordError> {
        let on = self.log.is_on();
        let mut encoded = std::mem::take(&mut self.scratch);
        encoded.clear();
        if on {
            Entry {
                exit: self.machine.exit(),
                event: event(&input),
            }
            .encode(&mut encoded);
        }
        let applied = self.machine.apply(input);
        let logged = match applied {
            Ok(()) if on => self.push_encoded(&encoded),
            Ok(()) => Ok(()),
            // It has changed nothing, and would not on a replica: the log need not know.
            Err(MachineError::Rejected { exit, source }) => {
                tracing::debug!(%exit, %source, "the board does not take an input");
                Ok(())
            }
            Err(error) => Err(error.into()),
        };
        self.scratch = encoded;
        logged
    }

    /// Adds a control entry at the present point.
    ///
    /// # Errors
    /// The log is gone.
    pub fn control(&mut self, op: ControlOp, data: &[u8]) -> Result<Option<Seq>, RecordError> {
        if matches!(op, ControlOp::PowerOff | ControlOp::Reset) {
            self.machine.end();
        }
        if !self.log.is_on() {
            return Ok(None);
        }
        self.entry(Event::Control(op, data))?;
        let seq = self.flush_point()?;
        self.log.urgent();
        Ok(seq)
    }

    fn entry(&mut self, event: Event<'_>) -> Result<(), RecordError> {
        let mut encoded = std::mem::take(&mut self.scratch);
        encoded.clear();
        if matches!(event, Event::Output { .. } | Event::Reached { .. }) {
            self.last_digest_exit = self.machine.exit().0;
        }
        Entry {
            exit: self.machine.exit(),
            event,
        }
        .encode(&mut encoded);
        let pushed = self.push_encoded(&encoded);
        self.scratch = encoded;
        pushed
    }

    /// Adds one encoded entry to the present point's append.
    fn push_encoded(&mut self, encoded: &[u8]) -> Result<(), RecordError> {
        self.last_entry_exit = self.machine.exit().0;
        self.last_entry_at = self.outside.now();
        if self.point.len() + encoded.len() > format::MAX_APPEND_LEN {
            self.flush_point()?;
        }
        if encoded.len() <= format::MAX_APPEND_LEN {
            self.point.extend_from_slice(encoded);
            return Ok(());
        }
        self.append_in_parts(encoded)
    }

    fn append_in_parts(&mut self, encoded: &[u8]) -> Result<(), RecordError> {
        split_encoded(self.machine.exit(), encoded, |bytes| {
            self.stats.log_bytes += bytes.len() as u64;
            self.log.append(bytes).map(|_| ())
        })?;
        Ok(())
    }

    /// Logs what the machine has put out, publishes it, and hands the effects over.
    fn log_output(&mut self) -> Result<(), RecordError> {
        let mut held = std::mem::take(&mut self.held);
        held.append(&mut self.machine.take_effects());
        if held.is_empty() {
            self.held = held;
            return Ok(());
        }
        let on = self.log.is_on();
        let mut after = None;
        if on && held.iter().any(is_output) {
            held.iter().for_each(|effect| self.sum.add(effect));
            let OutputSum { bytes, crc } = std::mem::take(&mut self.sum);
            let digest = self.machine.digest().0;
            self.entry(Event::Output { bytes, crc, digest })?;
            after = self.flush_point()?.map(Seq::next);
            self.log.urgent();
        }
        for effect in held.drain(..) {
            let after = if is_output(&effect) { after } else { None };
            self.outside.emit(effect, after);
        }
        self.held = held;
        Ok(())
    }

    fn finish_point(&mut self) -> Result<Step, RecordError> {
        if self.machine.has_ended() {
            self.flush_point()?;
            return Ok(Step::Ended);
        }
        let halted = !self.machine.can_leave();
        if self.log.is_on() {
            self.keep_log_alive(halted)?;
        }
        self.flush_point()?;
        if halted {
            return Ok(Step::Halted);
        }
        self.machine.leave()?;
        Ok(Step::Moved)
    }

    /// Keeps a replica close behind a silent guest, and the next delta small.
    fn keep_log_alive(&mut self, halted: bool) -> Result<(), RecordError> {
        let exit = self.machine.exit().0;
        let unchecked = exit - self.last_digest_exit >= SILENT_EXITS;
        let silent = halted && exit - self.last_entry_exit >= SILENT_EXITS_HALTED;
        let mut late = || {
            !halted
                && exit > self.last_entry_exit
                && self.outside.now().0.saturating_sub(self.last_entry_at.0) >= SILENT_NS
        };
        if self.machine.is_at_exit() && (unchecked || silent || late()) {
            let digest = self.machine.digest().0;
            self.entry(Event::Reached { digest })?;
        }
        let now = self.machine.board().now();
        if self.clearing.is_due(now) && self.machine.is_at_exit() {
            self.machine.clear_dirty_log()?;
            self.clearing.cleared(now);
        }
        Ok(())
    }

    fn flush_point(&mut self) -> Result<Option<Seq>, RecordError> {
        if self.point.is_empty() {
            return Ok(None);
        }
        let seq = self.log.append(&self.point)?;
        self.stats.log_bytes += self.point.len() as u64;
        self.point.clear();
        Ok(Some(seq))
    }
}

/// An input as it stands in the log.
fn event(input: &Input) -> Event<'_> {
    match input {
        Input::Time(now) => Event::Time { ns: now.0 },
        Input::Entropy { id, data } => Event::Entropy {
            request: id.0,
            data,
        },
        Input::NetRx(frame) => Event::NetRx(frame),
        Input::ConsoleRx(bytes) => Event::ConsoleRx(bytes),
        Input::DiskDone { id, status, data } => {
            let status = match status {
                devices::DiskStatus::Ok => DiskStatus::Ok,
                devices::DiskStatus::MediumError => DiskStatus::MediumError,
            };
            Event::DiskDone {
                request: id.0,
                status,
                data,
            }
        }
    }
}
