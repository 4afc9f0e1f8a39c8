//! Policies of the scheduler, of this thread and of the kernel's own.
#![allow(unsafe_code)] // sched_setscheduler has no safe wrapper in rustix

use std::io;

/// A scheduling policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Policy {
    /// Of ordinary threads.
    Other,
    /// Only when nothing else runs.
    Idle,
    /// Before all ordinary threads.
    Fifo(i32),
}

/// Sets the policy of a thread; 0 is the calling one.
pub(super) fn set(thread: i32, policy: Policy) -> io::Result<()> {
    let (number, priority) = match policy {
        Policy::Other => (libc::SCHED_OTHER, 0),
        Policy::Idle => (libc::SCHED_IDLE, 0),
        Policy::Fifo(priority) => (libc::SCHED_FIFO, priority),
    };
    let parameter = libc::sched_param {
        sched_priority: priority,
    };
    // SAFETY: the parameter lives through the call.
    if unsafe { libc::sched_setscheduler(thread, number, &raw const parameter) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The kernel's threads for deferred network work, raised above ordinary threads until this is dropped.
pub(super) struct RaisedSoftirqs(Vec<i32>);

impl RaisedSoftirqs {
    /// Raises those of all CPUs.
    pub(super) fn raise() -> io::Result<Self> {
        let mut raised = Self(Vec::new());
        for entry in std::fs::read_dir("/proc")? {
            let entry = entry?;
            let number = entry.file_name().to_str().and_then(|n| n.parse().ok());
            let Some(thread) = number else { continue };
            let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            if name.starts_with("ksoftirqd/") {
                set(thread, Policy::Fifo(1))?;
                raised.0.push(thread);
            }
        }
        Ok(raised)
    }
}

impl Drop for RaisedSoftirqs {
    fn drop(&mut self) {
        for thread in &self.0 {
            if let Err(error) = set(*thread, Policy::Other) {
                eprintln!("a thread of the kernel keeps its raised priority: {error}");
            }
        }
    }
}
