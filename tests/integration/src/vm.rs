//! A `pollux` process with a VM in it, and its console at our hands.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use crate::{Guest, Site, pollux};

/// How long the guest may take to answer: far longer than it does on a busy machine, so that running out
/// means that it never will.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// How long silence of a program that has ended means that no more comes.
const REST: Duration = Duration::from_secs(1);

/// How long a question waits before it is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(10);

/// See the module. Killed when it goes out of scope.
#[derive(Debug)]
pub struct Vm {
    child: Child,
    input: ChildStdin,
    output: Receiver<Vec<u8>>,
    errors: Receiver<Vec<u8>>,
    /// What the console has shown and nobody has waited for yet.
    seen: String,
    /// All that it has shown.
    shown: String,
    /// What the program has said beside it.
    complained: String,
}

impl Vm {
    /// Starts a `pollux` command on `site`; console and errors are read as they come.
    #[must_use]
    pub fn start(site: &Site, command: &mut Command) -> Self {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = site.spawn(command);
        let input = child.stdin.take().expect("standard input is piped");
        let output = pieces(child.stdout.take().expect("standard output is piped"));
        let errors = pieces(child.stderr.take().expect("standard error is piped"));
        Self {
            child,
            input,
            output,
            errors,
            seen: String::new(),
            shown: String::new(),
            complained: String::new(),
        }
    }

    /// Records `guest` into `out`, with its network and `disk`.
    #[must_use]
    pub fn record(
        site: &Site,
        guest: &Guest,
        disk: &std::path::Path,
        out: &std::path::Path,
        more: &[&str],
    ) -> Self {
        let mut command = Command::new(pollux());
        command
            .args(["record", "--tap", "tap0"])
            .arg("--disk")
            .arg(disk)
            .arg("--out")
            .arg(out)
            .arg("--from-snapshot")
            .arg(guest.snapshot())
            .args(more);
        Self::start(site, &mut command)
    }

    /// Types on the console.
    ///
    /// # Panics
    /// If the VM has ended.
    pub fn type_keys(&mut self, keys: &str) {
        self.input
            .write_all(keys.as_bytes())
            .unwrap_or_else(|error| panic!("the VM has ended: {error}{}", self.said()));
    }

    /// Types a line, and waits until the console shows `answer`, which is not part of the line.
    ///
    /// # Panics
    /// If it never comes.
    pub fn ask(&mut self, line: &str, answer: &str) {
        self.type_keys(&format!("{line}\n"));
        self.wait_for(answer);
    }

    /// Interrupts whatever runs or is half typed and asks, again and again: a shell that is starting forgets
    /// what was typed before.
    ///
    /// # Panics
    /// If no answer ever comes.
    pub fn insist(&mut self, line: &str, answer: &str) {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            self.type_keys(&format!("\u{3}\n{line}\n"));
            if self.shows(answer, ASK_AGAIN) {
                return;
            }
        }
        panic!("the console never showed {answer:?}{}", self.said());
    }

    /// Waits until the console shows `text`, after what was waited for before.
    ///
    /// # Panics
    /// If it never comes.
    pub fn wait_for(&mut self, text: &str) {
        let shown = self.shows(text, PATIENCE);
        assert!(shown, "the console never showed {text:?}{}", self.said());
    }

    fn shows(&mut self, text: &str, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return true;
            }
            let left = end.saturating_duration_since(Instant::now());
            let Ok(bytes) = self.output.recv_timeout(left) else {
                return false;
            };
            let new = String::from_utf8_lossy(&bytes);
            self.seen.push_str(&new);
            self.shown.push_str(&new);
        }
    }

    /// Ends the VM as Ctrl-C does.
    ///
    /// # Panics
    /// If it does not end in order.
    pub fn stop(mut self) {
        let pid = self.child.id().to_string();
        let sent = Command::new("kill").args(["-TERM", &pid]).status();
        assert!(sent.is_ok_and(|status| status.success()));
        let status = self.wait();
        assert!(status.success(), "{status}{}", self.said());
    }

    /// Kills the process.
    pub fn kill(mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it is our child");
    }

    /// Waits for the VM to end by itself.
    ///
    /// # Panics
    /// If it does not.
    pub fn wait(&mut self) -> ExitStatus {
        let end = Instant::now() + PATIENCE;
        // Its output ends with it.
        while let Ok(bytes) = self
            .output
            .recv_timeout(end.saturating_duration_since(Instant::now()))
        {
            self.shown.push_str(&String::from_utf8_lossy(&bytes));
        }
        assert!(Instant::now() < end, "the VM does not end{}", self.said());
        let status = self.child.wait().expect("it is our child");
        // What it said last may still be on its way; a daemon that it has left may keep its end open.
        while let Ok(bytes) = self.errors.recv_timeout(REST) {
            self.complained.push_str(&String::from_utf8_lossy(&bytes));
        }
        status
    }

    /// What console and program have said, for messages.
    pub fn said(&mut self) -> String {
        for bytes in self.errors.try_iter() {
            self.complained.push_str(&String::from_utf8_lossy(&bytes));
        }
        let Self {
            shown, complained, ..
        } = self;
        format!("\n--- console\n{shown}\n--- errors\n{complained}")
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Fails only where it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What can be read, piece by piece, read beside the test until its end.
pub fn pieces(mut from: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (send, receive) = channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(len @ 1..) = from.read(&mut buffer) {
            if send.send(buffer[..len].to_vec()).is_err() {
                return;
            }
        }
    });
    receive
}
