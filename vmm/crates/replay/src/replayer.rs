//! The replayer: drives a machine from a log and compares what it does.
//!
//! It leaves an exit only when the log holds an entry for a later exit or a delta (the horizon), so it
//! never runs past what the primary is known to have done. Every prefix of whole entries is a place
//! from which it can go live.

use devices::{Effect, Input, RequestId, VirtualTime};
use format::{Assembler, ControlOp, DiskStatus, Entry, Event, ExitNumber};
use hypervisor::{Vcpu, Vm};
use thiserror::Error;

use crate::divergence::Context;
use crate::effects::is_output;
use crate::machine::MachineError;
use crate::recent::RecentOutput;
use crate::{Divergence, Machine, MachineState, Mismatch, OutputSum, Ran};

/// Bytes of network output that the replica keeps after the log has confirmed it. A caller that keeps more
/// takes it after each entry.
const MAX_RECENT_BYTES: usize = 4 << 20;

/// Why replay cannot go on.
#[derive(Debug, Error)]
pub enum ReplayError {
    /// The machine is not where the log says.
    #[error("{0}")]
    Divergence(Box<Divergence>),
    /// The machine cannot run at all.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The log's bytes are bad.
    #[error("the log does not decode: {0}")]
    Format(#[from] format::Error),
    /// The caller asked to stop.
    #[error("replay was stopped")]
    Stopped,
}

/// What applying an entry came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Replayed {
    /// Applied.
    Applied,
    /// A part of a large entry, staged.
    Staged,
    /// A control entry with its data: the caller acts on it.
    Control(ControlOp, Vec<u8>),
}

/// A machine that follows a log.
#[derive(Debug)]
pub struct Replayer<V, C> {
    machine: Machine<V, C>,
    assembler: Assembler,
    context: Context,
    agreed: ExitNumber,
    /// Effects of the present point that no `Output` entry has confirmed yet.
    unconfirmed: Vec<Effect>,
    /// Confirmed network output, kept because the primary may have died before it was released.
    recent: RecentOutput,
    keep_recent: bool,
}

impl<V: Vm, C: Vcpu> Replayer<V, C> {
    /// A replica of the machine that wrote the log; deltas may be as large as its memory.
    pub fn new(machine: Machine<V, C>) -> Self {
        let limit = machine.memory().size_bytes() + machine.memory().page_count() * 8 + (1 << 20);
        Self {
            agreed: machine.exit(),
            machine,
            assembler: Assembler::new(limit),
            context: Context::default(),
            unconfirmed: Vec::new(),
            recent: RecentOutput::new(MAX_RECENT_BYTES),
            keep_recent: false,
        }
    }

    /// Keeps the newest confirmed output for [`Replayer::into_live`].
    pub fn keep_recent_output(&mut self) {
        self.keep_recent = true;
    }

    /// The machine.
    pub fn machine(&self) -> &Machine<V, C> {
        &self.machine
    }

    /// The machine, for settings that are not the guest's state.
    pub fn machine_mut(&mut self) -> &mut Machine<V, C> {
        &mut self.machine
    }

    /// Runs the machine to the entry's exit and applies the entry there.
    ///
    /// # Errors
    /// Divergence, or a machine that cannot run. `stop` is looked at when the vCPU is kicked; true
    /// ends with [`ReplayError::Stopped`], at a point from which replay can go on.
    pub fn entry(
        &mut self,
        entry: &Entry<'_>,
        stop: &dyn Fn() -> bool,
    ) -> Result<Replayed, ReplayError> {
        if let Event::Part(part, data) = entry.event {
            if !self.assembler.push(entry.exit, part, data)? {
                return Ok(Replayed::Staged);
            }
            let assembler = std::mem::replace(&mut self.assembler, Assembler::new(0));
            let result = match assembler.whole() {
                Ok(whole) => self.whole_entry(&whole, stop),
                Err(error) => Err(error.into()),
            };
            self.assembler = assembler;
            return result;
        }
        if self.assembler.is_staging() {
            return Err(format::Error::Part("another entry between the parts of one").into());
        }
        self.whole_entry(entry, stop)
    }

    fn whole_entry(
        &mut self,
        entry: &Entry<'_>,
        stop: &dyn Fn() -> bool,
    ) -> Result<Replayed, ReplayError> {
        self.context.note(entry);
        if entry.exit < self.machine.exit() {
            return Err(self.diverged(Mismatch::Entry {
                kind: entry.event.kind().name(),
                why: format!("it belongs to exit {}, which is past", entry.exit),
            }));
        }
        self.run_to(entry.exit, stop)?;
        match entry.event {
            Event::Time { ns } => self.time(VirtualTime(ns)),
            Event::Entropy { request, data } => self.input(
                entry,
                Input::Entropy {
                    id: RequestId(request),
                    data: data.to_vec(),
                },
            ),
            Event::NetRx(frame) => self.input(entry, Input::NetRx(frame.to_vec())),
            Event::ConsoleRx(bytes) => self.input(entry, Input::ConsoleRx(bytes.to_vec())),
            Event::DiskDone {
                request,
                status,
                data,
            } => {
                let status = disk_status(status);
                let id = RequestId(request);
                self.input(
                    entry,
                    Input::DiskDone {
                        id,
                        status,
                        data: data.to_vec(),
                    },
                )
            }
            Event::Output { bytes, crc, digest } => self.output(OutputSum { bytes, crc }, digest),
            Event::Reached { digest } => self.compare_digest(digest),
            Event::Delta(bytes) => self.delta(bytes),
            Event::Control(op, data) => {
                if matches!(op, ControlOp::PowerOff | ControlOp::Reset) {
                    self.machine.end();
                }
                return Ok(Replayed::Control(op, data.to_vec()));
            }
            Event::Part(..) => Err(format::Error::Part("a part within a part").into()),
        }
        .map(|()| Replayed::Applied)
    }

    /// Runs the machine to `exit`, for which the log is known to hold an entry, or one for a later
    /// exit; nothing is applied there.
    ///
    /// # Errors
    /// As [`Replayer::entry`].
    pub fn advance(
        &mut self,
        exit: ExitNumber,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), ReplayError> {
        self.run_to(exit, stop)
    }

    /// The state of the machine, where all entries of its exit are applied. None where the access of
    /// the exit leads to another, which has to be replayed first.
    ///
    /// # Errors
    /// As [`Replayer::entry`].
    pub fn save(&mut self) -> Result<Option<MachineState>, ReplayError> {
        if !self.machine.is_left() && self.machine.can_leave() && !self.machine.has_ended() {
            self.leave()?;
        }
        let state = self.machine.save()?;
        if state.is_none() {
            self.unconfirmed.extend(self.machine.take_effects());
        }
        Ok(state)
    }

    fn run_to(&mut self, exit: ExitNumber, stop: &dyn Fn() -> bool) -> Result<(), ReplayError> {
        while self.machine.exit() < exit {
            if !self.machine.is_left() {
                self.leave()?;
            }
            match self.machine.run()? {
                Ran::Exit => self.unconfirmed.extend(self.machine.take_effects()),
                Ran::Kicked if stop() => return Err(ReplayError::Stopped),
                Ran::Kicked => {}
            }
        }
        Ok(())
    }

    fn leave(&mut self) -> Result<(), ReplayError> {
        if self.machine.has_ended() || !self.machine.can_leave() {
            let why = if self.machine.has_ended() {
                "the guest has ended, and the log goes on"
            } else if self.machine.wants_time() {
                "the exit needs the time, and the log has none for it"
            } else {
                "the guest is halted, and the log has no input that wakes it"
            };
            return Err(self.diverged(Mismatch::Stuck {
                why: why.to_owned(),
            }));
        }
        if self.unconfirmed.iter().any(is_output) {
            return self.output(OutputSum::default(), self.machine.digest().0);
        }
        self.unconfirmed.clear();
        Ok(self.machine.leave()?)
    }

    fn time(&mut self, now: VirtualTime) -> Result<(), ReplayError> {
        if now < self.machine.board().now() {
            return Err(self.diverged(Mismatch::Entry {
                kind: "Time",
                why: "it is before the machine's time".to_owned(),
            }));
        }
        if self.machine.is_left() {
            return Err(self.misplaced("Time"));
        }
        self.machine.apply(Input::Time(now))?;
        self.unconfirmed.extend(self.machine.take_effects());
        Ok(())
    }

    fn input(&mut self, entry: &Entry<'_>, input: Input) -> Result<(), ReplayError> {
        if !self.machine.is_open() {
            return Err(self.misplaced(entry.event.kind().name()));
        }
        match self.machine.apply(input) {
            Ok(()) => {
                self.unconfirmed.extend(self.machine.take_effects());
                Ok(())
            }
            Err(MachineError::Rejected { source, .. }) => Err(self.diverged(Mismatch::Entry {
                kind: entry.event.kind().name(),
                why: format!("the board does not take it: {source}"),
            })),
            Err(error) => Err(error.into()),
        }
    }

    fn misplaced(&self, kind: &'static str) -> ReplayError {
        let why = if self.machine.wants_time() {
            "the exit needs the time first"
        } else {
            "the machine is between two exits"
        };
        self.diverged(Mismatch::Entry {
            kind,
            why: why.to_owned(),
        })
    }

    fn output(&mut self, expected: OutputSum, digest: u64) -> Result<(), ReplayError> {
        let mut found = OutputSum::default();
        self.unconfirmed.iter().for_each(|effect| found.add(effect));
        if found != expected {
            return Err(self.diverged(Mismatch::Output {
                expected: (expected.bytes, expected.crc),
                found: (found.bytes, found.crc),
            }));
        }
        for effect in self.unconfirmed.drain(..) {
            if self.keep_recent && matches!(effect, Effect::NetTx(_)) {
                self.recent.push((), effect);
            }
        }
        self.compare_digest(digest)
    }

    fn compare_digest(&mut self, expected: u64) -> Result<(), ReplayError> {
        let found = self.machine.digest().0;
        if found != expected {
            return Err(self.diverged(Mismatch::Registers { expected, found }));
        }
        self.agreed = self.machine.exit();
        Ok(())
    }

    fn delta(&mut self, bytes: &[u8]) -> Result<(), ReplayError> {
        if !self.machine.is_left() {
            self.leave()?;
        }
        match self.machine.apply_delta(bytes)? {
            Ok(()) => Ok(()),
            Err(error) => Err(self.diverged(Mismatch::Entry {
                kind: "Delta",
                why: error.to_string(),
            })),
        }
    }

    /// Compares a hash of the state at the end of a recording.
    ///
    /// # Errors
    /// It differs.
    pub fn compare_end(
        &self,
        what: &'static str,
        expected: u64,
        found: u64,
    ) -> Result<(), ReplayError> {
        if expected == found {
            return Ok(());
        }
        Err(self.diverged(Mismatch::End {
            what,
            expected,
            found,
        }))
    }

    fn diverged(&self, mismatch: Mismatch) -> ReplayError {
        ReplayError::Divergence(Box::new(Divergence {
            exit: self.machine.exit(),
            agreed: self.agreed,
            rip: self.machine.vcpu().regs().rip,
            cpl: self.machine.vcpu().sregs().cs.dpl,
            mismatch,
            entries: self.context.lines(),
            after: Vec::new(),
        }))
    }

    /// Goes live where the log ends: an incomplete large entry is discarded. Returns the machine, the
    /// confirmed network output that may not have left (to be sent again: receivers drop duplicates),
    /// and the effects of the present point that nobody has seen yet. Requests are not among them: the board
    /// has all that are outstanding, and one that was issued twice could land after a later one.
    pub fn into_live(self) -> (Machine<V, C>, Vec<Effect>, Vec<Effect>) {
        let mut unconfirmed = self.unconfirmed;
        unconfirmed.retain(|effect| effect.request().is_none());
        let recent = self.recent.into_effects().map(|((), effect)| effect);
        (self.machine, recent.collect(), unconfirmed)
    }

    /// Takes the confirmed network output since the last call.
    pub fn take_recent(&mut self) -> impl Iterator<Item = Effect> + '_ {
        self.recent.drain().map(|((), effect)| effect)
    }
}

fn disk_status(status: DiskStatus) -> devices::DiskStatus {
    match status {
        DiskStatus::Ok => devices::DiskStatus::Ok,
        DiskStatus::MediumError => devices::DiskStatus::MediumError,
    }
}
