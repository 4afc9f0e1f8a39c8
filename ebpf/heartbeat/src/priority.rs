//! Scheduling of the threads whose lateness is measured.
#![allow(unsafe_code)] // sched_setscheduler has no safe wrapper in rustix

/// Raises the calling thread: SCHED_FIFO 1, else nice -20, else as it is. Such threads sleep nearly
/// always, and FIFO 1 is the lowest real-time priority.
pub fn raise() {
    let fifo = libc::sched_param { sched_priority: 1 };
    // SAFETY: `fifo` lives through the call; 0 names the calling thread.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const fifo) } == 0 {
        return;
    }
    let me = rustix::thread::gettid();
    // SAFETY: no pointers.
    let result = unsafe {
        libc::setpriority(
            libc::PRIO_PROCESS,
            me.as_raw_nonzero().get().cast_unsigned(),
            -20,
        )
    };
    if result != 0 {
        tracing::debug!("heartbeat thread runs at ordinary priority");
    }
}
