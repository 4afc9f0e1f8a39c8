//! How the guest begins: from its kernel, or from a snapshot of it that was taken when it was ready.
//!
//! A snapshot belongs to the guest's files, to the program that took it and to a size of memory; where one
//! of them is another, it is taken anew. With it goes the disk as it was then: a VM that goes on from a
//! snapshot with a disk that has moved on would destroy its file system.

use std::fs::{self, File, FileTimes};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::time::Duration;

use harness::{Host, Process};

use super::{GUEST_ADDRESS, Patience, Programs, StageOptions};
use crate::Failure;

/// How long a guest may take to boot.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
/// What the guest's init prints when all of its services run.
const READY: &str = "READY";

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Start {
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
    /// The disk to begin with.
    disk: PathBuf,
    pub(super) snapshot: Option<PathBuf>,
}

impl Start {
    /// From the kernel.
    fn boot(guest: &Path) -> Result<Self, Failure> {
        let file = |name: &str| {
            let path = guest.join(name);
            if path.exists() {
                return Ok(path);
            }
            Err(format!(
                "{} is missing: run scripts/guest-image",
                path.display()
            ))
        };
        Ok(Self {
            kernel: file("vmlinuz")?,
            initramfs: file("initramfs.cpio")?,
            disk: file("disk.img")?,
            snapshot: None,
        })
    }

    /// As the options say; takes a snapshot if one is wanted and none fits.
    pub(crate) fn prepare(options: &StageOptions, patience: &Patience) -> Result<Self, Failure> {
        let boot = Self::boot(&options.guest)?;
        if options.boot {
            return Ok(boot);
        }
        if let Some(home) = &options.snapshot {
            return Ok(boot.with_snapshot(home));
        }
        let programs = Programs::find(options.programs.as_deref())?;
        let name = format!("{:016x}", boot.fingerprint(&programs, options.memory)?);
        let home = options.snapshots.join(name);
        if !home.exists() {
            eprintln!("      no snapshot of this guest yet: booting it once");
            boot.take_snapshot(&home, &programs, options.memory, patience)?;
        }
        Ok(boot.with_snapshot(&home))
    }

    /// From what was put into this directory when the snapshot was taken.
    fn with_snapshot(self, home: &Path) -> Self {
        Self {
            disk: home.join("disk.img"),
            snapshot: Some(home.join("snapshot")),
            ..self
        }
    }

    /// The snapshot that the guest goes on from, if it does not boot.
    pub(crate) fn snapshot(&self) -> Option<&Path> {
        self.snapshot.as_deref()
    }

    /// The same where there must be one.
    pub(crate) fn needed_snapshot(&self) -> Result<&Path, Failure> {
        self.snapshot()
            .ok_or_else(|| "this needs a snapshot: without --boot".into())
    }

    /// Copies the disk, with its times: they are part of its identity.
    pub(crate) fn place_disk(&self, to: &Path) -> Result<(), Failure> {
        copy_with_times(&self.disk, to)
            .map_err(|error| format!("{} to {}: {error}", self.disk.display(), to.display()).into())
    }

    /// Of the content of everything that a snapshot depends on.
    fn fingerprint(&self, programs: &Programs, memory: u32) -> Result<u64, Failure> {
        let mut hasher = DefaultHasher::new();
        let depends_on = [&self.kernel, &self.initramfs, &self.disk, &programs.pollux];
        for path in depends_on {
            let content = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
            content.hash(&mut hasher);
        }
        memory.hash(&mut hasher);
        Ok(hasher.finish())
    }

    fn take_snapshot(
        &self,
        home: &Path,
        programs: &Programs,
        memory: u32,
        patience: &Patience,
    ) -> Result<(), Failure> {
        if let Some(all) = home.parent() {
            // What was there is of other guests or programs.
            if all.exists() {
                fs::remove_dir_all(all)?;
            }
            fs::create_dir_all(all)?;
        }
        let work = tempfile::tempdir_in(home.parent().unwrap_or(Path::new(".")))?;
        let disk = work.path().join("disk.img");
        self.place_disk(&disk)?;
        // A host of its own: the guest's interface is there, and leads nowhere.
        let host = Host::new()?;
        host.disable_ipv6()?;
        host.add_bridge("br0")?;
        host.add_tap("tap0", "br0")?;
        let mut command = programs.pollux();
        command
            .arg("snapshot")
            .args(["--at", READY, "--tap", "tap0"])
            .args(["--memory", &memory.to_string()])
            .args(["--guest-ip", &format!("{GUEST_ADDRESS}/24")])
            .args(["--timeout-s", &BOOT_LIMIT.as_secs().to_string()])
            .arg("--kernel")
            .arg(&self.kernel)
            .arg("--initramfs")
            .arg(&self.initramfs)
            .arg("--disk")
            .arg(&disk)
            .arg("--out")
            .arg(work.path().join("snapshot"));
        let mut process = host.spawn(&mut command)?;
        let status =
            patience.wait_for("the guest to boot", BOOT_LIMIT, || Ok(process.try_wait()))?;
        if !status.success() {
            return Err(format!("pollux snapshot: {status}\n{}", said(&process)).into());
        }
        fs::rename(work.keep(), home)?;
        Ok(())
    }
}

fn said(process: &Process) -> String {
    process.printed(harness::Stream::Error)
}

fn copy_with_times(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::copy(from, to)?;
    let modified = fs::metadata(from)?.modified()?;
    File::options()
        .write(true)
        .open(to)?
        .set_times(FileTimes::new().set_modified(modified))
}
