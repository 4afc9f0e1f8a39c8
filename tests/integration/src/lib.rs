//! What the integration tests share: the programs of this build, the test guest, and a host with a TAP for it.
//!
//! The tests run the programs as a user does, and look at their output, exit codes and files only.
//! Where root, /dev/kvm or the guest image (scripts/guest-image) is missing a test is skipped by name, or
//! fails under `POLLUX_REQUIRE_KVM=1`.

mod guest;
pub mod pair;
mod random;
mod site;
mod vm;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

pub use guest::{Guest, copy_with_times, guest};
pub use random::Random;
pub use site::{GUEST_ADDRESS, Site};
pub use vm::{PATIENCE, Vm, pieces};

/// The `pollux` program of this build.
#[must_use]
pub fn pollux() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a file");
    let built = test
        .parent()
        .and_then(Path::parent)
        .expect("tests are built into target/*/deps");
    built.join("pollux")
}

/// The repository.
#[must_use]
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Runs `pollux` to its end.
#[must_use]
pub fn run(arguments: &[&str]) -> Output {
    Command::new(pollux())
        .args(arguments)
        .output()
        .expect("pollux is built with the workspace")
}

/// Standard error of a run, for messages.
#[must_use]
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// How often or how much, from an environment variable: small where nobody says, so that `scripts/test` is
/// quick; whole campaigns set it.
///
/// # Panics
/// If it is set to something else than a number.
#[must_use]
pub fn amount(variable: &str, unless_set: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{variable}={text} is no number")),
        Err(_) => unless_set,
    }
}
