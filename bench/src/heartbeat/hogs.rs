//! Busy threads that take the CPUs away from everything else.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use rustix::thread::{CpuSet, sched_setaffinity};

use super::scheduling;
use crate::Failure;

/// How hogs are scheduled.
#[derive(Debug, Clone, Copy)]
enum Class {
    /// As any program.
    Ordinary,
    /// Only when nothing else runs.
    Idle,
}

/// Running hogs; dropping them stops and joins them.
pub(crate) struct Hogs {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Hogs {
    /// `per_cpu` hogs on each of the CPUs.
    pub(crate) fn start(per_cpu: usize, cpus: &[usize]) -> Result<Self, Failure> {
        Self::spawn(per_cpu, cpus, Class::Ordinary)
    }

    /// One on each of the CPUs that gives way to everything: a CPU that would sleep does not.
    pub(crate) fn awake(cpus: &[usize]) -> Result<Self, Failure> {
        Self::spawn(1, cpus, Class::Idle)
    }

    fn spawn(per_cpu: usize, cpus: &[usize], class: Class) -> Result<Self, Failure> {
        let mut hogs = Self {
            stop: Arc::new(AtomicBool::new(false)),
            threads: Vec::new(),
        };
        let running = Arc::new(AtomicU64::new(0));
        for cpu in cpus {
            for _ in 0..per_cpu {
                let (stop, running, cpu) = (Arc::clone(&hogs.stop), Arc::clone(&running), *cpu);
                let hog = std::thread::Builder::new()
                    .name("hog".into())
                    .spawn(move || {
                        let mut set = CpuSet::new();
                        set.set(cpu);
                        if let Err(error) = sched_setaffinity(None, &set) {
                            eprintln!("a hog does not keep to CPU {cpu}: {error}");
                        }
                        if let Class::Idle = class
                            && let Err(error) = scheduling::set(0, scheduling::Policy::Idle)
                        {
                            eprintln!("a hog is not idle: {error}");
                        }
                        running.fetch_add(1, Ordering::Release);
                        while !stop.load(Ordering::Relaxed) {
                            std::hint::spin_loop();
                        }
                    })?;
                hogs.threads.push(hog);
            }
        }
        let all = hogs.threads.len() as u64;
        harness::wait_until("the hogs to run", || running.load(Ordering::Acquire) == all)?;
        Ok(hogs)
    }
}

impl Drop for Hogs {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A hog does nothing that could panic.
            let _ = thread.join();
        }
    }
}
