//! RDTSC faulting for the time of one KVM_RUN.
//!
//! Where ring 3 of the guest runs as ordinary ring 3 of the host, the guest's CR4.TSD has no
//! effect, but that of the host has: `PR_SET_TSC` sets it for one thread. It also breaks the
//! vDSO's clock on that thread, so it is on only while the guest runs.
#![allow(unsafe_code)] // prctl has no safe interface.

/// While it lives, RDTSC faults on this thread.
pub(super) struct Trap(());

impl Trap {
    pub(super) fn new() -> Self {
        set(libc::PR_TSC_SIGSEGV);
        Self(())
    }
}

impl Drop for Trap {
    fn drop(&mut self) {
        set(libc::PR_TSC_ENABLE);
    }
}

fn set(mode: libc::c_int) {
    // SAFETY: the call takes one number and changes only this thread's use of RDTSC; nothing
    // between the two calls of a `Trap` but KVM_RUN executes it.
    let result = unsafe { libc::prctl(libc::PR_SET_TSC, mode, 0, 0, 0) };
    assert_eq!(
        result, 0,
        "PR_SET_TSC exists on every x86 kernel since 2.6.26"
    );
}
