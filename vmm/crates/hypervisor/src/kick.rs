//! Stopping a vCPU from another thread.
//!
//! A kick is a flag and, if the vCPU is in the guest, a signal to its thread. The flag is looked
//! at after the vCPU has declared itself to be in the guest, and the signal's handler sets
//! `immediate_exit` in the vCPU's `kvm_run`, so a kick at any moment makes the current or the
//! next `run` return [`crate::Stop::Kicked`]: none is lost, several before one stop are one.
//! `KVM_RUN` may be interrupted by other signals as well; those are not stops.
#![allow(unsafe_code)] // Signal handlers and tgkill have no safe interface.

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

/// Stops one vCPU. Clones stop the same one; a kicker may outlive its vCPU. It reaches vCPUs of its
/// own process only, so it is useless in the child of a fork.
#[derive(Clone, Debug)]
pub struct Kicker {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    pending: AtomicBool,
    in_guest: AtomicBool,
    thread: AtomicI32,
}

impl Kicker {
    /// Makes the vCPU's current or next run end with [`crate::Stop::Kicked`]. Costs a store and a
    /// load when the vCPU is not in the guest.
    pub fn kick(&self) {
        self.shared.pending.store(true, Ordering::SeqCst);
        if self.shared.in_guest.load(Ordering::SeqCst) {
            let thread = self.shared.thread.load(Ordering::SeqCst);
            // SAFETY: tgkill takes no pointers; it reaches only threads of this process, whose
            // handler for the signal was installed before `in_guest` was first set.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal()) };
        }
    }

    pub(crate) fn new() -> Self {
        Self {
            shared: Arc::default(),
        }
    }

    pub(crate) fn is_pending(&self) -> bool {
        self.shared.pending.load(Ordering::SeqCst)
    }

    /// Uses up a kick, if there is one.
    pub(crate) fn take(&self) -> bool {
        self.shared.pending.swap(false, Ordering::SeqCst)
    }

    /// Declares the calling thread to be in the guest of the vCPU whose `immediate_exit` byte is
    /// given, until the guard is dropped. The byte must stay mapped that long.
    pub(crate) fn enter(&self, immediate_exit: *mut u8) -> InGuest<'_> {
        IMMEDIATE_EXIT.set(immediate_exit);
        self.shared
            .thread
            .store(THREAD.with(|thread| *thread), Ordering::SeqCst);
        self.shared.in_guest.store(true, Ordering::SeqCst);
        InGuest {
            shared: &self.shared,
        }
    }
}

/// While it lives, kicks send a signal to the thread that made it.
pub(crate) struct InGuest<'a> {
    shared: &'a Shared,
}

impl Drop for InGuest<'_> {
    fn drop(&mut self) {
        self.shared.in_guest.store(false, Ordering::SeqCst);
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

thread_local! {
    /// `immediate_exit` of the vCPU that this thread has in the guest, else null. Const and
    /// without a destructor, so that a signal handler may read it.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };

    // SAFETY: gettid has no arguments and cannot fail.
    static THREAD: i32 = unsafe { libc::gettid() };
}

/// A realtime signal away from the first few, which profilers and runtimes like to use.
fn signal() -> i32 {
    libc::SIGRTMIN() + 5
}

extern "C" fn on_kick(_signal: i32) {
    let byte = IMMEDIATE_EXIT.get();
    if !byte.is_null() {
        // SAFETY: the pointer is set only while this thread is between `enter` and the guard's
        // drop, during which the byte stays mapped; KVM and the vCPU's thread access it atomically.
        unsafe { AtomicU8::from_ptr(byte) }.store(1, Ordering::Relaxed);
    }
}

/// Installs the handler, once in the life of the process.
pub(crate) fn install_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Option<i32>> = OnceLock::new();
    let failure = INSTALLED.get_or_init(|| {
        // SAFETY: an all-zero sigaction is valid: no flags, empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_kick as extern "C" fn(i32) as usize;
        // KVM_RUN returns EINTR all the same; other calls of the thread go on.
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: the action is fully initialised and its handler is async-signal-safe: it only
        // reads a const thread-local and stores one byte.
        let result = unsafe { libc::sigaction(signal(), &raw const action, ptr::null_mut()) };
        (result != 0).then(|| {
            io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EINVAL)
        })
    });
    match failure {
        None => Ok(()),
        Some(errno) => Err(io::Error::from_raw_os_error(*errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kick_before_entering_is_kept_and_used_up_once() {
        let kicker = Kicker::new();
        kicker.clone().kick();
        kicker.kick();
        assert!(kicker.is_pending());
        assert!(kicker.take());
        assert!(!kicker.take());
    }

    #[test]
    fn kick_in_the_guest_sets_the_byte_and_outside_it_does_not() {
        install_handler().unwrap();
        let kicker = Kicker::new();
        let mut byte = 0u8;
        let guard = kicker.enter(&raw mut byte);
        kicker.kick(); // To this very thread: delivered before tgkill returns.
        drop(guard);
        assert_eq!(byte, 1);
        byte = 0;
        kicker.kick();
        assert_eq!(byte, 0);
    }
}
