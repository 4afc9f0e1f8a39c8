//! What a test needs of the machine, and what happens where it is missing: it is skipped by name and
//! counted, or fails if `POLLUX_REQUIRE_KVM=1` says that nothing may be skipped.

use std::sync::atomic::{AtomicUsize, Ordering};

static SKIPPED: AtomicUsize = AtomicUsize::new(0);

/// Whether `test` may make network namespaces and load eBPF programs.
///
/// # Panics
/// If it may not and nothing may be skipped.
pub fn root(test: &str) -> bool {
    rustix::process::geteuid().is_root() || skip(test, "root")
}

/// Whether `test` can open /dev/kvm.
///
/// # Panics
/// If it cannot and nothing may be skipped.
pub fn kvm(test: &str) -> bool {
    std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok()
        || skip(test, "/dev/kvm")
}

/// Notes that `test` is skipped for want of something. Always false.
///
/// # Panics
/// If nothing may be skipped.
pub fn skip(test: &str, wanted: &str) -> bool {
    assert!(
        std::env::var_os("POLLUX_REQUIRE_KVM").is_none_or(|v| v != "1"),
        "{test} needs {wanted}, and POLLUX_REQUIRE_KVM=1 says that nothing may be skipped"
    );
    let count = SKIPPED.fetch_add(1, Ordering::Relaxed) + 1;
    eprintln!("SKIPPED {test}: needs {wanted} ({count} skipped so far in this run)");
    false
}
