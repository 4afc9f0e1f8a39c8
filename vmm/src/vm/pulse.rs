//! The pulse: stops a vCPU between exits when an input is due and no exit comes.
//!
//! A guest that computes without exits would see neither its timer nor its network. A thread looks
//! every [`BEAT`]: where the vCPU is in the guest, has made no exit since the last look, and something
//! is due, it kicks it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use hypervisor::Kicker;

/// How often the pulse looks.
const BEAT: Duration = Duration::from_millis(2);

/// What the vCPU's thread tells the pulse. One store each at an exit.
#[derive(Debug)]
pub struct PulseState {
    exits: AtomicU64,
    in_guest: AtomicBool,
    due_host_ns: AtomicU64,
    inputs: AtomicU64,
    stop: AtomicBool,
}

impl Default for PulseState {
    fn default() -> Self {
        Self {
            exits: AtomicU64::new(0),
            in_guest: AtomicBool::new(false),
            due_host_ns: AtomicU64::new(u64::MAX),
            inputs: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        }
    }
}

impl PulseState {
    /// The guest is about to run; its next timer is due at this time of the host's monotonic clock.
    pub fn running(&self, due_host_ns: u64) {
        self.due_host_ns.store(due_host_ns, Ordering::Relaxed);
        self.exits
            .store(self.exits.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        self.in_guest.store(true, Ordering::Relaxed);
    }

    /// The guest does not run: it is halted or paused.
    pub fn resting(&self) {
        self.in_guest.store(false, Ordering::Relaxed);
    }

    /// An input or a command was queued for the vCPU's thread.
    pub fn queued(&self) {
        self.inputs.fetch_add(1, Ordering::Relaxed);
    }

    /// The vCPU's thread has looked at its queue.
    pub fn drained(&self) {
        if self.inputs.load(Ordering::Relaxed) != 0 {
            self.inputs.store(0, Ordering::Relaxed);
        }
    }
}

/// The running thread.
#[derive(Debug)]
pub struct Pulse {
    state: Arc<PulseState>,
    thread: Option<JoinHandle<()>>,
}

impl Pulse {
    /// Starts the pulse of the vCPU behind `kicker`.
    ///
    /// # Errors
    /// No thread.
    pub fn start(state: Arc<PulseState>, kicker: Kicker) -> std::io::Result<Self> {
        let theirs = Arc::clone(&state);
        let thread = std::thread::Builder::new()
            .name("pulse".to_owned())
            .spawn(move || beat(&theirs, &kicker))?;
        Ok(Self {
            state,
            thread: Some(thread),
        })
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn beat(state: &PulseState, kicker: &Kicker) {
    let mut last = 0;
    while !state.stop.load(Ordering::Relaxed) {
        std::thread::sleep(BEAT);
        let exits = state.exits.load(Ordering::Relaxed);
        let still = exits == last;
        last = exits;
        if !still || !state.in_guest.load(Ordering::Relaxed) {
            continue;
        }
        let timer = state.due_host_ns.load(Ordering::Relaxed) <= super::host_ns();
        if timer || state.inputs.load(Ordering::Relaxed) > 0 {
            kicker.kick();
        }
    }
}
