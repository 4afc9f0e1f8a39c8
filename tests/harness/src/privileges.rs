//! What a test needs of the machine, and what happens where it is missing: it is skipped by name, and
//! fails if `POLLUX_REQUIRE_KVM=1` says that nothing may be skipped.
//!
//! Each skip adds a line to the file that `POLLUX_SKIPPED` names, so that `scripts/test` can name and
//! count them: what a passing test prints is not shown.

use std::io::Write;

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
/// If nothing may be skipped, or the note cannot be written.
pub fn skip(test: &str, wanted: &str) -> bool {
    assert!(
        std::env::var_os("POLLUX_REQUIRE_KVM").is_none_or(|v| v != "1"),
        "{test} needs {wanted}, and POLLUX_REQUIRE_KVM=1 says that nothing may be skipped"
    );
    eprintln!("SKIPPED {test}: needs {wanted}");
    if let Some(path) = std::env::var_os("POLLUX_SKIPPED") {
        let file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(path);
        file.and_then(|mut file| writeln!(file, "{test}: needs {wanted}"))
            .expect("the file that POLLUX_SKIPPED names can be written");
    }
    false
}
