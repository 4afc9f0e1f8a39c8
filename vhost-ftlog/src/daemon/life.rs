//! What the daemon does about its own life: it outlives the VMM, its terminal and its process group.
#![allow(unsafe_code)] // sched_setscheduler has no safe wrapper here.

use std::io;
use std::path::Path;

use super::options::Priority;

/// Leaves the session and process group of whoever started the daemon: neither Ctrl-C nor a kill of
/// the VMM's process group reaches it. True where the daemon has a session of its own now.
pub fn detach() -> bool {
    match rustix::process::setsid() {
        Ok(_) => true,
        Err(error) => {
            // A process group leader cannot; it then has a group of its own already.
            tracing::debug!(%error, "setsid");
            false
        }
    }
}

/// Lifts the scheduling group of the daemon's session to what its data thread has. Where the kernel makes
/// a group of each session (sched_autogroup_enabled), the niceness of a thread counts only within it,
/// and a busy thread of any other session would get half of the CPU.
pub fn lift_session() {
    if let Err(error) = std::fs::write("/proc/self/autogroup", "-20") {
        tracing::debug!(%error, "autogroup");
    }
}

/// Makes the daemon one of the last that the kernel kills when memory is short, where permitted.
pub fn spare_from_oom() {
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-900") {
        tracing::debug!(%error, "oom_score_adj");
    }
}

/// Moves the daemon into a control group, so that ending the VMM's does not end it.
///
/// # Errors
/// Where the group does not exist or may not be entered.
pub fn enter_cgroup(group: &Path) -> io::Result<()> {
    std::fs::write(group.join("cgroup.procs"), "0")
}

/// Sets the scheduling of the calling thread; a refusal is logged, not fatal. True where it is real-time now.
pub fn schedule(priority: Priority) -> bool {
    let real_time = priority == Priority::Fifo && fifo().is_ok();
    if real_time || priority == Priority::None {
        return real_time;
    }
    if let Err(error) = nice() {
        tracing::warn!(%error, ?priority, "scheduling of the data thread stays as it is");
    }
    false
}

fn nice() -> io::Result<()> {
    Ok(rustix::process::setpriority_process(None, -20)?)
}

fn fifo() -> io::Result<()> {
    let param = libc::sched_param { sched_priority: 1 };
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // SAFETY: changes the policy of the calling thread; the parameter is a valid structure.
    if unsafe { libc::sched_setscheduler(0, policy, &raw const param) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Keeps the calling thread on one CPU.
///
/// # Errors
/// Where there is no such CPU.
pub fn pin(cpu: usize) -> io::Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    Ok(rustix::thread::sched_setaffinity(None, &set)?)
}

/// The monotonic clock in ns: the one clock that the VMM and the daemon share.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
