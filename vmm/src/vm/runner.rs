//! The loop of the vCPU's thread: steps, and commands between them.

use std::sync::mpsc::Sender;

use format::ControlOp;
use hypervisor::kvm::{KvmVcpu, KvmVm};
use replay::{LogSink, MachineState, RecordError, Recorder, Step};
use thiserror::Error;

use super::{EndState, Live};

/// What other threads ask of the vCPU's thread.
pub enum Command {
    /// Ends the VM here, without the guest's doing.
    Stop,
    /// Stops the guest's execution until `Resume`.
    Pause(Sender<()>),
    /// Lets the guest run on.
    Resume(Sender<()>),
    /// Calls `with` with the machine's state at rest, while it is stopped: what takes long there
    /// forks.
    Save(Box<dyn FnOnce(&MachineState, &hypervisor::GuestRam) + Send>),
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Stop => "Stop",
            Self::Pause(_) => "Pause",
            Self::Resume(_) => "Resume",
            Self::Save(_) => "Save",
        })
    }
}

/// How a VM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The guest switched itself off or asked for a reset.
    ByGuest,
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

/// A running VM.
pub struct Runner<L> {
    recorder: LiveRecorder<L>,
    paused: bool,
}

impl<L: LogSink> Runner<L> {
    /// Will run `recorder`.
    pub fn new(recorder: LiveRecorder<L>) -> Self {
        Self {
            recorder,
            paused: false,
        }
    }

    /// The recorder.
    pub fn recorder(&self) -> &LiveRecorder<L> {
        &self.recorder
    }

    /// Runs the VM until it ends.
    ///
    /// # Errors
    /// The machine or the log cannot go on.
    pub fn run(&mut self) -> Result<Ended, RunnerError> {
        loop {
            if self.recorder.step()? == Step::Ended {
                return Ok(Ended::ByGuest);
            }
            while let Some(command) = self.next_command() {
                if let Some(ended) = self.obey(command)? {
                    return Ok(ended);
                }
            }
        }
    }

    fn next_command(&mut self) -> Option<Command> {
        let paused = self.paused;
        let outside = self.recorder.outside_mut();
        if paused {
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
                let state = self.state_at_rest()?;
                let Some(state) = state else {
                    return Ok(Some(Ended::ByGuest));
                };
                with(&state, self.recorder.machine().memory());
            }
        }
        Ok(None)
    }

    /// Brings the machine to rest at a point that a replica can reach. None if the guest ends first.
    fn state_at_rest(&mut self) -> Result<Option<MachineState>, RunnerError> {
        loop {
            if let Some(state) = self.recorder.machine_mut().save()? {
                return Ok(Some(state));
            }
            if self.recorder.step()? == Step::Ended {
                return Ok(None);
            }
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
