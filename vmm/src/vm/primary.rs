//! A live VM on threads of its own, as the session of a protected VM drives it.

use std::sync::Arc;
use std::thread::JoinHandle;

use devices::Effect;
use ft::GateMode;
use hypervisor::Vcpu;
use replay::Recorder;

use super::channel_log::VmLog;
use super::dirty_log::DirtyLogSwitch;
use super::live::{Backends, LiveError, resume};
use super::pacing::{PacingState, PacingView};
use super::runner::{Told, VmPosition};
use super::{Command, KvmMachine, Live, Pulse, PulseState, Runner, VcpuSender, inbox};
use crate::io::{self, Delivery, IoConfig, IoHandle, IoThread};

/// What a live VM tells its session.
#[derive(Debug)]
pub enum FromPrimary {
    /// The guest has switched itself off, or (true) wants to be reset.
    GuestOff(bool),
    /// The guest has come to rest, as was asked.
    Quiesced,
    /// The vCPU's thread has ended with an error: the VM is lost.
    Failed(String),
    /// From the host I/O thread.
    Io(Delivery),
}

/// A live VM. Dropping it stops the vCPU, drops what the gate holds, waits for the I/O in flight and
/// closes TAP and image.
pub struct Primary {
    dirty_log: DirtyLogSwitch,
    sender: VcpuSender<Command>,
    position: Arc<VmPosition>,
    pacing: Arc<PacingState>,
    io: IoHandle,
    thread: Option<JoinHandle<()>>,
    io_thread: Option<IoThread>,
    pulse: Option<Pulse>,
}

struct TellSession<F>(F);

impl<F: Fn(FromPrimary) + Send> Told for TellSession<F> {
    fn guest_off(&mut self, reset: bool) {
        (self.0)(FromPrimary::GuestOff(reset));
    }

    fn quiesced(&mut self) {
        (self.0)(FromPrimary::Quiesced);
    }
}

impl Primary {
    /// Starts `machine` with a shut gate. Disk requests that it waits for are issued again, and then
    /// `pending` goes into the gate.
    ///
    /// # Errors
    /// Threads or io_uring.
    pub fn start(
        machine: KvmMachine,
        backends: Backends,
        behind_ns: u64,
        pending: Vec<Effect>,
        tell: impl Fn(FromPrimary) + Clone + Send + 'static,
    ) -> Result<Self, LiveError> {
        let pulse_state = Arc::new(PulseState::default());
        let dirty_log = DirtyLogSwitch::new(machine.vm());
        let kicker = machine.vcpu().kicker();
        let (sender, inbox) = inbox(&pulse_state, Some(kicker.clone()));
        let deliveries = tell.clone();
        let io_thread = io::spawn(IoConfig {
            tap: backends.tap,
            disk: backends.disk,
            console: backends.console,
            gate: GateMode::Shut,
            gap: backends.gap,
            deliver: sender.deliveries(move |delivery| {
                deliveries(FromPrimary::Io(delivery));
            }),
        })?;
        let handle = io_thread.handle();
        let pulse = Pulse::start(Arc::clone(&pulse_state), kicker).map_err(LiveError::Thread)?;
        let now = machine.board().now();
        let mut live = Live::new(now, behind_ns, inbox, Some(handle.clone()), pulse_state);
        resume(&machine, pending, &mut live, &handle);
        let mut runner = Runner::new(Recorder::new(machine, live, VmLog::Off));
        let (position, pacing) = (runner.position(), runner.pacing());
        let thread = std::thread::Builder::new()
            .name("vcpu".to_owned())
            .spawn(move || {
                let mut told = TellSession(tell.clone());
                // Nothing of the VM is used after a panic.
                let run = std::panic::AssertUnwindSafe(|| runner.run_protected(&mut told));
                let why = match std::panic::catch_unwind(run) {
                    Ok(Ok(())) => return,
                    Ok(Err(error)) => error.to_string(),
                    Err(_) => "the vCPU's thread has panicked: a mistake in Pollux".to_owned(),
                };
                tracing::error!(why, "the VM cannot go on");
                tell(FromPrimary::Failed(why));
            })
            .map_err(LiveError::Thread)?;
        Ok(Self {
            dirty_log,
            sender,
            position,
            pacing,
            io: handle,
            thread: Some(thread),
            io_thread: Some(io_thread),
            pulse: Some(pulse),
        })
    }

    /// The switch of the machine's dirty log.
    pub fn dirty_log(&self) -> &DirtyLogSwitch {
        &self.dirty_log
    }

    /// The way to the vCPU's thread.
    pub fn vcpu(&self) -> &VcpuSender<Command> {
        &self.sender
    }

    /// The way to the host I/O thread.
    pub fn io(&self) -> &IoHandle {
        &self.io
    }

    /// How far the VM is.
    pub fn position(&self) -> &VmPosition {
        &self.position
    }

    /// How far the backup is behind, and what that costs.
    pub fn pacing(&self) -> PacingView {
        self.pacing.view()
    }
}

impl Drop for Primary {
    fn drop(&mut self) {
        self.io.discard_held();
        let _ = self.sender.command(Command::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the vCPU's thread panicked");
        }
        drop(self.pulse.take());
        drop(self.io_thread.take());
    }
}
