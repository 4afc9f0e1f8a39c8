//! Asks a VMM for its log rate and its lag while a load runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::stage::Api;

/// Between two questions. The log's rate is that since the question before.
const EVERY: Duration = Duration::from_secs(1);
/// So often it is looked whether it is over.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What a VMM said.
#[derive(Debug, Default)]
pub(super) struct Readings {
    /// Of the log.
    pub(super) mbit: Vec<f64>,
    /// Of the backup.
    pub(super) lag_ms: Vec<f64>,
}

impl Readings {
    pub(super) fn extend(&mut self, others: Self) {
        self.mbit.extend(others.mbit);
        self.lag_ms.extend(others.lag_ms);
    }
}

/// See the module.
pub(super) struct Meter {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Readings>,
}

impl Meter {
    /// Begins to ask.
    pub(super) fn start(api: Api) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            // What was before the load is not of it.
            api.status();
            let mut readings = Readings::default();
            loop {
                let waited = wait(&stopped);
                if let Some(status) = api.status() {
                    readings.mbit.push(status.log_mbit_s);
                    readings.lag_ms.push(status.lag.ms);
                }
                if !waited {
                    return readings;
                }
            }
        });
        Self { stop, thread }
    }

    /// Ends it.
    pub(super) fn finish(self) -> Readings {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_default()
    }
}

/// Until the next question is due; false once it is over.
fn wait(stop: &AtomicBool) -> bool {
    let mut left = EVERY;
    while !left.is_zero() {
        if stop.load(Ordering::Relaxed) {
            return false;
        }
        std::thread::sleep(LOOK_EVERY);
        left = left.saturating_sub(LOOK_EVERY);
    }
    true
}
