//! CPU time of threads and processes.

use super::Failure;
use rustix::time::{ClockId, clock_gettime};

/// What the calling thread has used, in ns.
pub(super) fn of_this_thread() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// What all threads of a process have used that still run, in ns.
pub(super) fn of_process(pid: u32) -> Result<u64, Failure> {
    let mut sum = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread can end between the listing and the look.
        let Ok(text) = std::fs::read_to_string(task?.path().join("schedstat")) else {
            continue;
        };
        let first = text.split(' ').next().unwrap_or_default();
        sum += first.parse::<u64>()?;
    }
    Ok(sum)
}
