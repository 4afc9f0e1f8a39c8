//! Where a guest spends its time: the vCPU is kicked every millisecond, and where it stands is noted.
//!
//! One owner: the vCPU's thread adds samples, whoever asked for the profile reads them at the end. A
//! kick between exits costs the guest some 30 us, so a profile is for looking, not for measuring.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use guest_kernel::SymbolTable;
use hypervisor::Kicker;

/// Time between two samples.
const EVERY: Duration = Duration::from_millis(1);
/// Functions that a report shows.
const SHOWN: usize = 150;

/// Samples of one guest. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Samples {
    /// Count by ring and instruction pointer.
    counts: Arc<Mutex<BTreeMap<(u8, u64), u64>>>,
}

impl Samples {
    /// The guest was stopped here.
    pub fn note(&self, cpl: u8, rip: u64) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry((cpl, rip)).or_default() += 1;
    }

    /// The functions of the kernel by the time spent in them, most first; programs are one line.
    #[must_use]
    pub fn report(&self, symbols: &SymbolTable) -> String {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let mut functions: BTreeMap<String, u64> = BTreeMap::new();
        for ((cpl, rip), count) in counts.iter() {
            let name = if *cpl == 0 {
                let mut name = symbols.describe(*rip);
                name.truncate(name.find('+').unwrap_or(name.len()));
                name
            } else {
                "(programs)".to_owned()
            };
            *functions.entry(name).or_default() += count;
        }
        let total: u64 = functions.values().sum();
        let mut sorted: Vec<(String, u64)> = functions.into_iter().collect();
        sorted.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        let mut text = format!("{total} samples, one a millisecond of execution\n");
        for (name, count) in sorted.iter().take(SHOWN) {
            let share = *count as f64 * 100.0 / total.max(1) as f64;
            let _ = writeln!(text, "{count:8} {share:5.1}% {name}");
        }
        text
    }
}

/// Kicks a vCPU until it is dropped.
#[derive(Debug)]
pub struct Sampler {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sampler {
    /// Starts to kick.
    ///
    /// # Errors
    /// No thread.
    pub fn start(kicker: Kicker) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let theirs = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("sampler".to_owned())
            .spawn(move || {
                while !theirs.load(Ordering::Relaxed) {
                    std::thread::sleep(EVERY);
                    kicker.kick();
                }
            })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
