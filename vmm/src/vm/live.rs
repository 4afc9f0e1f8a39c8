//! Puts a machine, its host I/O and its pulse together, and takes them apart in order.

use std::sync::Arc;

use devices::Effect;
use replay::{LogSink, Recorder};
use thiserror::Error;

use super::{
    Command, Ended, KvmMachine, Live, Pulse, PulseState, Runner, RunnerError, VcpuSender, inbox,
};
use crate::console::Console;
use crate::io::{self, IoConfig, IoError, Storage, Tap};
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
        deliver: sender.deliveries(move |delivery| {
            if matches!(delivery, io::Delivery::Quit) {
                let _ = quit.command(Command::Stop);
            }
        }),
    })?;
    let handle = thread.handle();
    for effect in reissue(&machine).into_iter().chain(pending) {
        handle.emit(effect, None);
    }
    let pulse = Pulse::start(Arc::clone(&pulse_state), kicker).map_err(LiveError::Thread)?;
    let now = machine.board().now();
    let live = Live::new(now, behind_ns, inbox, Some(handle), pulse_state);
    started(&sender);
    let mut runner = Runner::new(Recorder::new(machine, live, log));
    let ended = runner.run();
    drop(pulse);
    drop(thread);
    Ok((ended?, runner))
}

/// The disk requests that the guest waits for, to be issued by this host.
pub fn reissue(machine: &KvmMachine) -> Vec<Effect> {
    machine.board().outstanding()
}
