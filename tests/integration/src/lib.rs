//! What the integration tests share: where the programs are, and a snapshot of the test guest.
//!
//! The tests run the programs as a user does, and look at their output, exit codes and files only.
//! Where /dev/kvm or the guest image (scripts/guest-image) is missing a test is skipped by name, or
//! fails under `POLLUX_REQUIRE_KVM=1`.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;

use harness::privileges;

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

/// A snapshot of the test guest at its prompt, made once for all tests of a process. None where it
/// cannot be made here: `test` is then skipped.
///
/// # Panics
/// If nothing may be skipped, or the guest does not boot.
pub fn snapshot(test: &str) -> Option<&'static Path> {
    static SNAPSHOT: OnceLock<PathBuf> = OnceLock::new();
    let guest = repository().join(".cache/guest");
    let (kernel, initramfs) = (guest.join("vmlinuz"), guest.join("initramfs.cpio"));
    let has_image = kernel.exists() && initramfs.exists();
    if !privileges::kvm(test)
        || !(has_image || privileges::skip(test, "a guest image (scripts/guest-image)"))
    {
        return None;
    }
    Some(SNAPSHOT.get_or_init(|| make_snapshot(&kernel, &initramfs)))
}

fn make_snapshot(kernel: &Path, initramfs: &Path) -> PathBuf {
    // Within target: made anew by each run, and ignored by git.
    let dir = pollux().with_file_name("test-guest");
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).expect("target can be written");
    let out = dir.join("snapshot");
    eprintln!("booting the test guest once; this takes a minute or more");
    let status = Command::new(pollux())
        .args(["snapshot", "--memory", "160", "--timeout-s", "900"])
        .arg("--out")
        .arg(&out)
        .arg("--kernel")
        .arg(kernel)
        .arg("--initramfs")
        .arg(initramfs)
        .status()
        .expect("pollux is built with the workspace");
    assert!(status.success(), "the test guest boots to its prompt");
    out
}

/// A recording under way, with the guest's console at our hands.
#[derive(Debug)]
pub struct Recording {
    child: Child,
}

impl Recording {
    /// Records the guest of `snapshot` into `out`.
    #[must_use]
    pub fn start(snapshot: &Path, out: &Path, more: &[&str]) -> Self {
        let child = Command::new(pollux())
            .arg("record")
            .arg("--out")
            .arg(out)
            .arg("--from-snapshot")
            .arg(snapshot)
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("pollux is built with the workspace");
        Self { child }
    }

    /// Types a line, and waits until the console shows `answer`.
    pub fn type_and_wait(&mut self, line: &str, answer: &str) {
        use std::io::{Read, Write};
        let input = self.child.stdin.as_mut().expect("standard input is piped");
        input
            .write_all(format!("{line}\n").as_bytes())
            .expect("the guest runs");
        let output = self
            .child
            .stdout
            .as_mut()
            .expect("standard output is piped");
        let (mut seen, mut byte) = (String::new(), [0]);
        while !seen.contains(answer) {
            let read = output.read(&mut byte).expect("the console can be read");
            assert_eq!(read, 1, "the guest ended; it showed: {seen}");
            seen.push(char::from(byte[0]));
        }
    }

    /// Ends the recording in order.
    pub fn stop(mut self) {
        let pid = self.child.id().to_string();
        let killed = Command::new("kill")
            .args(["-TERM", &pid])
            .status()
            .expect("kill runs");
        assert!(killed.success());
        let status = self.child.wait().expect("it is our child");
        assert!(
            status.success(),
            "a recording that is stopped is closed: {status}"
        );
    }

    /// Kills the recording.
    pub fn kill(mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it is our child");
    }
}
