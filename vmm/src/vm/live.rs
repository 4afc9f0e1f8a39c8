//! Puts a machine, its host I/O and its pulse together, and takes them apart in order.

use std::sync::Arc;
use std::time::Duration;

use devices::Effect;
use replay::{LogSink, Outside, Recorder};
use thiserror::Error;

use super::{
    Command, Ended, KvmMachine, Live, Pulse, PulseState, Runner, RunnerError, VcpuSender, inbox,
};
use crate::console::Console;
use crate::io::{self, IoConfig, IoError, IoHandle, Storage, Tap};
use hypervisor::Vcpu;

/// The files behind a VM's devices.
#[derive(Default)]
pub struct Backends {
    /// The network.
    pub tap: Option<Tap>,
    /// The disk.
    pub disk: Option<Storage>,
    /// The console.
    pub console: Option<Console>,
    /// For how long output may go out without a look at whether it still may: what a peer waits.
    pub gap: Option<Duration>,
}

/// A VM that cannot be run.
#[derive(Debug, Error)]
pub enum LiveError {
    /// Host I/O.
    #[error(transparent)]
    Io(#[from] IoError),
    /// A thread.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
    /// The VM itself.
    #[error(transparent)]
    Runner(#[from] RunnerError),
}

/// Runs `machine` on this thread until it ends. `started` gets the way to reach it, before it runs.
/// Outstanding disk requests are issued again, and `pending` effects emitted first.
///
/// # Errors
/// The VM cannot be run, or cannot go on.
pub fn run_live<L: LogSink>(
    machine: KvmMachine,
    backends: Backends,
    log: L,
    behind_ns: u64,
    pending: Vec<Effect>,
    started: impl FnOnce(&VcpuSender<Command>),
) -> Result<(Ended, Runner<L>), LiveError> {
    let pulse_state = Arc::new(PulseState::default());
    let kicker = machine.vcpu().kicker();
    let (sender, inbox) = inbox(&pulse_state, Some(kicker.clone()));
    let quit = sender.clone();
    let thread = io::spawn(IoConfig {
        tap: backends.tap,
        disk: backends.disk,
        console: backends.console,
        gate: ft::GateMode::Open,
        gap: backends.gap,
        deliver: sender.deliveries(move |delivery| {
            if matches!(delivery, io::Delivery::Quit | io::Delivery::Failed(_)) {
                let _ = quit.command(Command::Stop);
            }
        }),
    })?;
    let handle = thread.handle();
    let pulse = Pulse::start(Arc::clone(&pulse_state), kicker).map_err(LiveError::Thread)?;
    let now = machine.board().now();
    let mut live = Live::new(now, behind_ns, inbox, Some(handle.clone()), pulse_state);
    resume(&machine, pending, &mut live, &handle);
    started(&sender);
    tracing::info!(exit = machine.exit().0, "the vCPU runs");
    let mut runner = Runner::new(Recorder::new(machine, live, log));
    let ended = runner.run();
    drop(pulse);
    drop(thread);
    Ok((ended?, runner))
}

/// Makes this host's world what the guest takes it for: the TAP has the offloads that its driver
/// negotiated, the requests that it waits for are issued here, and then `pending` is put out.
pub(super) fn resume(
    machine: &KvmMachine,
    pending: Vec<Effect>,
    live: &mut Live<Command>,
    io: &IoHandle,
) {
    let board = machine.board();
    io.emit(Effect::NetOffloads(board.net_offloads()), None);
    for effect in board.outstanding().into_iter().chain(pending) {
        match effect {
            // Answered where the vCPU's thread asks for it, not by the I/O thread.
            Effect::EntropyWanted { .. } => live.emit(effect, None),
            effect => io.emit(effect, None),
        }
    }
}
