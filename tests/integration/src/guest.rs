//! The test guest: booted once for all tests of a process, with network, disk and Redis server; then each
//! test goes on from its snapshot with a copy of the disk.

use std::ffi::OsString;
use std::fs::{self, File, FileTimes};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use harness::privileges;

use crate::{GUEST_ADDRESS, Site, pollux, repository, stderr};

/// A snapshot of the guest at its prompt, and the disk as it was then.
#[derive(Debug)]
pub struct Guest {
    home: PathBuf,
}

impl Guest {
    /// The snapshot.
    #[must_use]
    pub fn snapshot(&self) -> PathBuf {
        self.home.join("snapshot")
    }

    /// Kernel and initial RAM disk, as flags of a command that boots them.
    #[must_use]
    pub fn boot_flags() -> Vec<OsString> {
        let image = repository().join(".cache/guest");
        let file = |name: &str| image.join(name).into_os_string();
        vec![
            "--kernel".into(),
            file("vmlinuz"),
            "--initramfs".into(),
            file("initramfs.cpio"),
        ]
    }

    /// Copies the disk to `to`.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn place_disk(&self, to: &Path) {
        copy_with_times(&self.home.join("disk.img"), to).expect("there is room for a disk");
    }
}

/// The guest. None where it cannot be had here: `test` is then skipped.
///
/// # Panics
/// If nothing may be skipped, or the guest does not boot.
pub fn guest(test: &str) -> Option<&'static Guest> {
    static GUEST: OnceLock<Guest> = OnceLock::new();
    let image = repository().join(".cache/guest");
    let has_image = image.join("initramfs.cpio").exists();
    if !privileges::kvm(test)
        || !privileges::root(test)
        || !(has_image || privileges::skip(test, "a guest image (scripts/guest-image)"))
    {
        return None;
    }
    Some(
        GUEST.get_or_init(|| match std::env::var_os("POLLUX_TEST_GUEST") {
            Some(home) => Guest { home: home.into() },
            None => boot(&image),
        }),
    )
}

fn boot(image: &Path) -> Guest {
    // Within target: made anew by each run, and ignored by git.
    let home = pollux().with_file_name(format!("test-guest-{}", std::process::id()));
    remove_old(&home);
    fs::create_dir_all(&home).expect("target can be written");
    let guest = Guest { home };
    let disk = guest.home.join("disk.img");
    copy_with_times(&image.join("disk.img"), &disk).expect("target can be written");
    eprintln!("booting the test guest once; this takes a minute or more");
    let site = Site::new().expect("root can make a network namespace");
    let mut command = Command::new(pollux());
    command
        .args(["snapshot", "--memory", "160", "--timeout-s", "900"])
        .args(["--tap", "tap0", "--guest-ip"])
        .arg(format!("{GUEST_ADDRESS}/24"))
        .arg("--disk")
        .arg(&disk)
        .arg("--out")
        .arg(guest.snapshot())
        .args(Guest::boot_flags());
    let output = site.output(&mut command);
    assert!(
        output.status.success(),
        "the test guest does not boot to its prompt: {}",
        stderr(&output)
    );
    guest
}

/// Removes what processes have left that are gone.
fn remove_old(home: &Path) {
    let siblings = home.parent().and_then(|dir| fs::read_dir(dir).ok());
    for entry in siblings.into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|n| n.strip_prefix("test-guest-"));
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Copies a file with its times: they are part of a disk's identity.
///
/// # Errors
/// It cannot be read or written.
pub fn copy_with_times(from: &Path, to: &Path) -> io::Result<()> {
    fs::copy(from, to)?;
    let modified = fs::metadata(from)?.modified()?;
    let times = FileTimes::new().set_modified(modified);
    File::options().write(true).open(to)?.set_times(times)
}
