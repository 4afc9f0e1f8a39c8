//! A person at a terminal: a VM on a pseudo-terminal, which is left by Ctrl-A x.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use integration::{PATIENCE, pieces, pollux};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};

use crate::scene::Scene;

/// Both ends of a pseudo-terminal.
struct Terminal {
    keyboard: File,
    shown: Receiver<Vec<u8>>,
    seen: String,
    /// The program's end: kept open, so that it can be asked for its modes once the program is gone.
    line: File,
}

impl Terminal {
    fn new() -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let mut line = File::options();
        let line = line.read(true).write(true);
        let line = line.open(name.to_str().unwrap()).unwrap();
        let keyboard = File::from(master);
        let shown = pieces(keyboard.try_clone().unwrap());
        Self {
            keyboard,
            shown,
            seen: String::new(),
            line,
        }
    }

    fn type_keys(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).unwrap();
    }

    /// Waits for `text`, and forgets what was shown up to its end.
    fn wait_for(&mut self, text: &str) {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return;
            }
            let left = end.saturating_duration_since(Instant::now());
            let bytes = self.shown.recv_timeout(left);
            let bytes = bytes.unwrap_or_else(|_| panic!("no {text:?} in {:?}", self.seen));
            self.seen.push_str(&String::from_utf8_lossy(&bytes));
        }
    }

    fn modes(&self) -> Termios {
        tcgetattr(&self.line).unwrap()
    }
}

/// Modes and special characters, so that they can be compared.
fn told(modes: &Termios) -> String {
    format!("{modes:?}")
}

/// Ended however the test ends.
struct Running {
    program: Child,
    /// All that it says on standard error, once it has ended.
    said: Receiver<String>,
}

impl Running {
    fn new(mut program: Child) -> Self {
        let mut errors = program.stderr.take().expect("standard error is piped");
        let (send, said) = channel();
        std::thread::spawn(move || {
            let mut all = String::new();
            let _ = errors.read_to_string(&mut all);
            let _ = send.send(all);
        });
        Self { program, said }
    }

    /// Exit code, and what it has said.
    fn end(&mut self) -> (Option<i32>, String) {
        let said = self.said.recv_timeout(PATIENCE);
        let said = said.expect("it ends when it is left");
        (self.program.wait().unwrap().code(), said)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails only where it has ended.
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

#[test]
fn ctrl_a_x_leaves_a_vm_on_a_terminal_which_is_then_as_it_was() {
    let name = "ctrl_a_x_leaves_a_vm_on_a_terminal_which_is_then_as_it_was";
    let Some(scene) = Scene::new(name) else {
        return;
    };
    let mut terminal = Terminal::new();
    let before = terminal.modes();
    assert!(
        before
            .local_modes
            .contains(LocalModes::ICANON | LocalModes::ECHO)
    );
    let mut command = Command::new(pollux());
    command
        .args(["run", "--tap", "tap0", "--from-snapshot"])
        .arg(scene.guest.snapshot())
        .arg("--disk")
        .arg(scene.disk("disk.img"))
        .stdin(terminal.line.try_clone().unwrap())
        .stdout(terminal.line.try_clone().unwrap())
        .stderr(Stdio::piped());
    let mut running = Running::new(scene.site.spawn(&mut command));
    // It holds the terminal, too.
    drop(command);

    terminal.type_keys(b"\r");
    terminal.wait_for("# ");
    let raw = terminal.modes().local_modes;
    assert!(!raw.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG));
    // Ctrl-C is the guest's.
    terminal.type_keys(b"echo s-$((1+1)); sleep 1000\r");
    terminal.wait_for("s-2");
    terminal.type_keys(b"\x03");
    terminal.wait_for("# ");
    // And so is a Ctrl-A that is typed twice: the shell goes to the beginning of the line.
    terminal.type_keys(b"-$((40+2))\x01\x01echo up\r");
    terminal.wait_for("up-42");
    terminal.wait_for("# ");
    // Each character of a long line comes, although most are written by themselves.
    terminal.type_keys(b"seq -s, 400\r");
    let line: Vec<String> = (1..=400).map(|number: u32| number.to_string()).collect();
    terminal.wait_for(&format!("{}\r\n", line.join(",")));
    terminal.wait_for("# ");
    terminal.type_keys(b"\x01x");
    let (code, said) = running.end();
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("pollux: stopped"), "{said}");
    assert_eq!(told(&terminal.modes()), told(&before));
}
