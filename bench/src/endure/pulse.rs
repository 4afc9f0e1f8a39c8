//! Notes when this program did not run for long: what happened then to the hosts beside it has a cause that is
//! not theirs, as when the whole machine was held.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::report::{Measure, Report};

/// Between two beats.
const BEAT: Duration = Duration::from_millis(20);
/// A pause of this length is noted: longer than a busy machine makes one wait.
const NOTED: Duration = Duration::from_millis(500);

/// See the module.
pub(super) struct Pulse {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Pauses>,
}

/// The pauses.
#[derive(Debug, Default)]
pub(super) struct Pauses {
    /// Seconds after the beginning, and length.
    noted: Vec<(f64, f64)>,
    longest: Duration,
}

impl Pulse {
    pub(super) fn start() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let (started, mut pauses) = (Instant::now(), Pauses::default());
            let mut last = started;
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(BEAT);
                let pause = last.elapsed();
                pauses.longest = pauses.longest.max(pause);
                if pause >= NOTED {
                    let after = started.elapsed() - pause;
                    pauses
                        .noted
                        .push((after.as_secs_f64(), pause.as_secs_f64()));
                }
                last = Instant::now();
            }
            pauses
        });
        Self { stop, thread }
    }

    pub(super) fn finish(self) -> Pauses {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_default()
    }
}

impl Pauses {
    pub(super) fn report(&self, report: &mut Report) {
        let note =
            "times in which this program itself did not run, beside the hosts: not of their making";
        let count = Measure::count("machine_stalls", self.noted.len() as u64);
        report.push(count.noted(note));
        let longest = self.longest.as_secs_f64() * 1e3;
        report.push(Measure::value("machine_stall_longest", "ms", longest));
        let noted = self
            .noted
            .iter()
            .map(|(after, lasted)| serde_json::json!({ "after_s": after, "lasted_s": lasted }));
        report.detail("machine_stalls", noted.collect());
    }
}
