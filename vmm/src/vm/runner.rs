//! The loop of a live VM's vCPU thread: steps, and commands between them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

use format::ControlOp;
use ft::{LagLimits, Pace};
use hypervisor::GuestRam;
use hypervisor::kvm::{KvmVcpu, KvmVm};
use replay::{LogSink, MachineState, RecordError, Recorder, Step};
use thiserror::Error;

use super::channel_log::{ChannelLog, VmLog};
use super::dirty_log::DirtyLogUser;
use super::pacing::{LOOK_AGAIN, Pacer, PacingState};
use super::{EndState, Live, Samples, host_ns};

/// How long a guest is watched to see whether it rests, in ns: several periods of its timer.
const WATCH_NS: u64 = 200_000_000;
/// The share of that time which it then waits in HLT, in per cent: the rest goes into its timer's ticks.
const RESTS_PERCENT: u64 = 75;
/// How long a guest may take to come to rest, in ns. One that computes all the time never does.
const UNREST_NS: u64 = 10_000_000_000;

/// Called with a machine's state at rest, while it is stopped: what takes long there forks.
pub type WithState = Box<dyn FnOnce(&MachineState, &GuestRam) + Send>;

/// Called with the state at rest from which the machine is logged, and since when it is stopped: [`host_ns`].
pub type BeginLog = Box<dyn FnOnce(&MachineState, &GuestRam, u64) + Send>;

/// What other threads ask of the vCPU's thread.
pub enum Command {
    /// Ends the VM here, without the guest's doing.
    Stop,
    /// Stops the guest's execution until `Resume`.
    Pause(Sender<()>),
    /// Lets the guest run on.
    Resume(Sender<()>),
    /// Shows the machine's state at rest; a VM that is not protected lets the guest come to rest as well.
    Save(WithState),
    /// Shows the state at rest, and logs to the channel from there.
    StartLog(ChannelLog, DirtyLogUser, BeginLog),
    /// Logs no more.
    EndLog,
    /// Brings the guest to rest: no disk request outstanding, at a numbered exit, with the op as the
    /// log's last entry. The VM then stands, as is told, until `Unquiesce`.
    Quiesce(Option<ControlOp>),
    /// Lets the guest run on.
    Unquiesce,
    /// Other limits of the backup's lag.
    SetLag(LagLimits),
    /// Notes where the guest is whenever the vCPU is kicked.
    Sample(Samples),
    /// Puts a control entry into the log here.
    Inject(ControlOp, Vec<u8>),
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Stop => "Stop",
            Self::Pause(_) => "Pause",
            Self::Resume(_) => "Resume",
            Self::Save(_) => "Save",
            Self::StartLog(..) => "StartLog",
            Self::EndLog => "EndLog",
            Self::Quiesce(_) => "Quiesce",
            Self::Unquiesce => "Unquiesce",
            Self::SetLag(_) => "SetLag",
            Self::Sample(_) => "Sample",
            Self::Inject(..) => "Inject",
        })
    }
}

/// How a VM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The guest switched itself off.
    ByGuest,
    /// The guest asked for a reset.
    Reset,
    /// [`Command::Stop`].
    ByCommand,
}

/// Why the loop ended without being asked.
#[derive(Debug, Error)]
pub enum RunnerError {
    /// Machine or log.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] replay::MachineError),
}

/// A recorder over KVM and this host.
pub type LiveRecorder<L> = Recorder<KvmVm, KvmVcpu, Live<Command>, L>;

/// How far a running VM is, for those who watch it.
#[derive(Debug, Default)]
pub struct VmPosition {
    exit: AtomicU64,
    virtual_ns: AtomicU64,
}

impl VmPosition {
    /// The last exit.
    #[must_use]
    pub fn exit(&self) -> u64 {
        self.exit.load(Ordering::Relaxed)
    }

    /// Virtual time in ns.
    #[must_use]
    pub fn virtual_ns(&self) -> u64 {
        self.virtual_ns.load(Ordering::Relaxed)
    }

    pub(super) fn set(&self, exit: u64, virtual_ns: u64) {
        self.exit.store(exit, Ordering::Relaxed);
        self.virtual_ns.store(virtual_ns, Ordering::Relaxed);
    }
}

/// Told by the loop.
pub trait Told: Send {
    /// The guest has switched itself off, or wants to be reset; the loop waits for commands.
    fn guest_off(&mut self, reset: bool);

    /// The guest has come to rest.
    fn quiesced(&mut self);
}

/// A log that can be switched while the VM runs.
pub trait Switch: LogSink {
    /// Logs to the channel from now on, or no more.
    fn switch(&mut self, to: Option<ChannelLog>);
}

impl Switch for VmLog {
    fn switch(&mut self, to: Option<ChannelLog>) {
        *self = to.map_or(Self::Off, |log| Self::Channel(Box::new(log)));
    }
}

/// A running VM.
pub struct Runner<L> {
    recorder: LiveRecorder<L>,
    position: Arc<VmPosition>,
    paused: bool,
    /// `Quiesce` was asked, with this last entry.
    quiet: Option<Option<ControlOp>>,
    /// Stands still, as `Quiesce` asked.
    standing: bool,
    /// A reset was injected.
    reset: bool,
    pacer: Pacer,
    samples: Option<Samples>,
    /// While the log is on. Behind the machine: where that ends, nothing needs switching.
    dirty_log: Option<DirtyLogUser>,
}

impl<L: LogSink> Runner<L> {
    /// Will run `recorder`.
    pub fn new(recorder: LiveRecorder<L>) -> Self {
        Self {
            recorder,
            position: Arc::default(),
            paused: false,
            quiet: None,
            standing: false,
            reset: false,
            pacer: Pacer::new(LagLimits::default()),
            samples: None,
            dirty_log: None,
        }
    }

    /// How far the VM is.
    pub fn position(&self) -> Arc<VmPosition> {
        Arc::clone(&self.position)
    }

    /// How many instructions KVM has emulated for the guest, if it tells.
    pub fn emulated_instructions(&self) -> Option<u64> {
        self.recorder.machine().vcpu().emulated_instructions()
    }

    /// What pacing has found.
    pub fn pacing(&self) -> Arc<PacingState> {
        self.pacer.state()
    }

    /// Runs the VM until it ends; commands that concern protection are refused.
    ///
    /// # Errors
    /// The machine or the log cannot go on.
    pub fn run(&mut self) -> Result<Ended, RunnerError> {
        loop {
            if self.step()? == Step::Ended {
                let reset = self.recorder.outside_mut().wants_reset();
                return Ok(if reset { Ended::Reset } else { Ended::ByGuest });
            }
            while let Some(command) = self.next_command() {
                let ended = match command {
                    Command::Save(with) => match self.run_to_rest()? {
                        None => self.save_quiet(with)?,
                        ended => ended,
                    },
                    command => self.obey(command)?,
                };
                if let Some(ended) = ended {
                    return Ok(ended);
                }
            }
        }
    }

    /// Lets the guest do what it has begun until it mostly waits, so that one that goes on from there answers
    /// at once. A guest that does not come to rest is left as it is.
    fn run_to_rest(&mut self) -> Result<Option<Ended>, RunnerError> {
        let began = host_ns();
        let mut since = began;
        self.recorder.outside_mut().take_waited();
        loop {
            if self.step()? == Step::Ended {
                return Ok(None);
            }
            if let Some(command) = self.next_command()
                && let Some(ended) = self.obey(command)?
            {
                return Ok(Some(ended));
            }
            let now = host_ns();
            let watched = now.saturating_sub(since);
            if watched < WATCH_NS {
                continue;
            }
            let waited = self.recorder.outside_mut().take_waited();
            if waited * 100 >= watched * RESTS_PERCENT || now.saturating_sub(began) >= UNREST_NS {
                return Ok(None);
            }
            since = now;
        }
    }

    /// Shows the state at a point at which the guest waits for no disk request, so that the image is what
    /// the state takes it for. Commands are obeyed while the last requests end.
    fn save_quiet(&mut self, with: WithState) -> Result<Option<Ended>, RunnerError> {
        self.recorder.quiesce(true);
        while !matches!(self.step()?, Step::Quiet | Step::Ended) {
            if let Some(command) = self.next_command()
                && let Some(ended) = self.obey(command)?
            {
                return Ok(Some(ended));
            }
        }
        self.recorder.quiesce(false);
        self.obey(Command::Save(with))
    }

    fn step(&mut self) -> Result<Step, RunnerError> {
        let kicks = self.recorder.stats().kicks;
        let step = self.recorder.step()?;
        if let Some(samples) = &self.samples
            && self.recorder.stats().kicks != kicks
        {
            let machine = self.recorder.machine_mut();
            let ram = machine.memory().clone();
            samples.note(machine.vcpu_mut(), &ram);
        }
        let machine = self.recorder.machine();
        self.position.set(machine.exit().0, machine.board().now().0);
        Ok(step)
    }

    fn next_command(&mut self) -> Option<Command> {
        let stopped = self.paused || self.standing;
        let outside = self.recorder.outside_mut();
        if stopped {
            outside.pulse().resting();
            return outside.inbox_mut().wait_command();
        }
        outside.inbox_mut().command()
    }

    fn obey(&mut self, command: Command) -> Result<Option<Ended>, RunnerError> {
        match command {
            Command::Stop => return Ok(Some(Ended::ByCommand)),
            Command::Pause(reply) => {
                self.paused = true;
                let _ = reply.send(());
            }
            Command::Resume(reply) => {
                self.paused = false;
                let _ = reply.send(());
            }
            Command::Save(with) => {
                if let Some((state, _)) = self.state_at_rest()? {
                    with(&state, self.recorder.machine().memory());
                }
            }
            Command::Quiesce(op) => {
                self.quiet = Some(op);
                self.recorder.quiesce(true);
            }
            Command::Unquiesce => {
                self.quiet = None;
                self.standing = false;
                self.recorder.quiesce(false);
            }
            Command::SetLag(limits) => self.pacer.set_limits(limits),
            Command::Sample(samples) => self.samples = Some(samples),
            // The log of a guest at rest has its end; they are told again when it goes on.
            Command::Inject(ControlOp::Limits, _) if self.quiet.is_some() => {}
            Command::Inject(op, data) => {
                self.reset |= op == ControlOp::Reset;
                self.recorder.control(op, &data)?;
            }
            Command::StartLog(..) | Command::EndLog => {
                tracing::error!(?command, "this VM's log cannot be switched");
            }
        }
        Ok(None)
    }

    /// Brings the machine to rest at a point from which a replica can begin: its state, and since when it is
    /// stopped. None if the guest ends first.
    fn state_at_rest(&mut self) -> Result<Option<(MachineState, u64)>, RunnerError> {
        loop {
            if self.recorder.machine().has_ended() {
                return Ok(None);
            }
            let stopped = host_ns();
            if let Some(state) = self.recorder.machine_mut().save()? {
                return Ok(Some((state, stopped)));
            }
            self.step()?;
        }
    }

    /// Ends a recording: brings the machine to a point that a replay reaches, and logs the hashes of
    /// the state there.
    ///
    /// # Errors
    /// The machine or the log cannot go on.
    pub fn close_log(mut self) -> Result<(EndState, LiveRecorder<L>), RunnerError> {
        // A kicked stop has no number; the next exit, or a delta, has its place in the log.
        while self.recorder.step()? == Step::Kicked {}
        while !self.recorder.machine_mut().come_to_rest()? {
            self.recorder.step()?;
        }
        let end = EndState::of(self.recorder.machine_mut())?;
        let bytes = postcard::to_stdvec(&end).expect("four numbers always encode");
        self.recorder.control(ControlOp::Mark, &bytes)?;
        Ok((end, self.recorder))
    }
}

impl<L: Switch> Runner<L> {
    /// Runs a VM that may be protected, until [`Command::Stop`]: also a guest that has switched
    /// itself off waits for that, because its log may still be needed.
    ///
    /// # Errors
    /// The machine or the log cannot go on.
    pub fn run_protected(&mut self, told: &mut dyn Told) -> Result<(), RunnerError> {
        let mut off = false;
        loop {
            match self.paced_step()? {
                Step::Ended if !off => {
                    off = true;
                    self.standing = true;
                    let reset = self.reset || self.recorder.outside_mut().wants_reset();
                    told.guest_off(reset);
                }
                Step::Quiet => self.stand(told)?,
                _ => {}
            }
            while let Some(command) = self.next_command() {
                if matches!(command, Command::Stop) {
                    return Ok(());
                }
                self.obey_protected(command, off, told)?;
            }
        }
    }

    /// A step, and the hold that the backup's lag asks for.
    fn paced_step(&mut self) -> Result<Step, RunnerError> {
        if !self.pacer.follows() {
            return self.step();
        }
        let began = host_ns();
        self.recorder.outside_mut().take_waited();
        let step = self.step()?;
        let now = host_ns();
        let waited = self.recorder.outside_mut().take_waited();
        let ran = Duration::from_nanos(now.saturating_sub(began).saturating_sub(waited));
        let pace = self.pacer.at_exit(ran, self.position.exit(), now);
        let kick_after = self.pacer.kick_after();
        self.recorder.outside_mut().pulse().hold_after(kick_after);
        match pace {
            Pace::Run => return Ok(step),
            Pace::Hold(time) => self.recorder.outside_mut().hold(time),
            Pace::Stop => self.stop_for_backup(),
        }
        let held = host_ns().saturating_sub(now);
        self.pacer.state().add_held(Duration::from_nanos(held));
        Ok(step)
    }

    /// Stands still until the backup is closer, or a command comes.
    fn stop_for_backup(&mut self) {
        while !self.pacer.may_run(host_ns()) {
            let outside = self.recorder.outside_mut();
            outside.hold(LOOK_AGAIN);
            if outside.inbox_mut().has_command() {
                return;
            }
        }
    }

    /// The guest has come to rest: the log ends here, and whoever asked is told.
    fn stand(&mut self, told: &mut dyn Told) -> Result<(), RunnerError> {
        let Some(op) = self.quiet.take() else {
            return Ok(());
        };
        if let Some(op) = op {
            self.recorder.control(op, &[])?;
        }
        self.recorder.log_mut().urgent();
        self.standing = true;
        told.quiesced();
        Ok(())
    }

    fn obey_protected(
        &mut self,
        command: Command,
        off: bool,
        told: &mut dyn Told,
    ) -> Result<(), RunnerError> {
        match command {
            // A connection that took long: its session was given up meanwhile, and the log of a later one
            // may be on. A session is abandoned before the next begins.
            Command::StartLog(log, ..) if log.position().is_abandoned() => {
                tracing::info!("a log that was given up is not started");
            }
            Command::StartLog(log, dirty_log, begin) => {
                if let Some((state, stopped)) = self.state_at_rest()? {
                    self.recorder.machine_mut().clear_dirty_log()?;
                    self.dirty_log = Some(dirty_log);
                    begin(&state, self.recorder.machine().memory(), stopped);
                    let (acks, position) = (Box::new(log.acks()), log.position());
                    self.pacer.follow(acks, position, state.exit().0);
                    self.recorder.log_mut().switch(Some(log));
                }
            }
            Command::EndLog => {
                self.recorder.log_mut().switch(None);
                self.pacer.unfollow();
                self.recorder.outside_mut().pulse().hold_after(None);
                self.dirty_log = None;
            }
            Command::Quiesce(op) if off => {
                self.quiet = Some(op);
                self.stand(told)?;
            }
            command => {
                self.obey(command)?;
            }
        }
        Ok(())
    }
}
