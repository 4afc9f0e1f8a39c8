//! The pulse: stops a vCPU between exits when an input is due and no exit comes.
//!
//! A guest that computes without exits would see neither its timer nor its network. A thread looks
//! every [`BEAT`]: where the vCPU is in the guest, has made no exit since the last look, and something
//! is due, it kicks it. What is due may be a hold: a guest that runs ahead of its backup is stopped in
//! code without exits too (R17).

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
    /// Beats without an exit after which the guest is to be held; 0: none.
    hold_beats: AtomicU64,
    stop: AtomicBool,
}

impl Default for PulseState {
    fn default() -> Self {
        Self {
            exits: AtomicU64::new(0),
            in_guest: AtomicBool::new(false),
            due_host_ns: AtomicU64::new(u64::MAX),
            inputs: AtomicU64::new(0),
            hold_beats: AtomicU64::new(0),
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

    /// A guest that has run this long without an exit is to be stopped, so that it can be held.
    pub fn hold_after(&self, time: Option<Duration>) {
        let beats = time.map_or(0, |time| (time.as_nanos() / BEAT.as_nanos()).max(1) as u64);
        if self.hold_beats.load(Ordering::Relaxed) != beats {
            self.hold_beats.store(beats, Ordering::Relaxed);
        }
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
    let (mut last, mut still_beats) = (0, 0);
    while !state.stop.load(Ordering::Relaxed) {
        std::thread::sleep(BEAT);
        let exits = state.exits.load(Ordering::Relaxed);
        let still = exits == last;
        last = exits;
        if !still || !state.in_guest.load(Ordering::Relaxed) {
            still_beats = 0;
            continue;
        }
        still_beats += 1;
        let timer = state.due_host_ns.load(Ordering::Relaxed) <= super::host_ns();
        let hold = state.hold_beats.load(Ordering::Relaxed);
        let hold = hold > 0 && still_beats >= hold;
        if timer || hold || state.inputs.load(Ordering::Relaxed) > 0 {
            kicker.kick();
        }
    }
}
