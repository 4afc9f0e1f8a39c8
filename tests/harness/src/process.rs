//! A process of a test: killed and reaped when it goes out of scope, its output kept.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::{HarnessError, system, wait_for};

/// Which output of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Error,
}

/// Lines of output kept; the oldest go first.
const KEPT_LINES: usize = 10_000;

/// How long the rest of the output of a process that has ended is waited for: longer only a
/// grandchild takes, which holds the pipe open.
const REST: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
struct Lines(Mutex<Vec<(Stream, String)>>);

impl Lines {
    fn with<T>(&self, job: impl FnOnce(&mut Vec<(Stream, String)>) -> T) -> T {
        job(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// See the module.
#[derive(Debug)]
pub struct Process {
    child: Child,
    status: Option<ExitStatus>,
    lines: Arc<Lines>,
    readers: Vec<JoinHandle<()>>,
}

impl Process {
    /// Starts a process with no input; its output is read as it comes.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(command: &mut Command) -> Result<Self, HarnessError> {
        let program = format!("{command:?}");
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| HarnessError::Command {
                command: program,
                said: error.to_string(),
            })?;
        let lines = Arc::new(Lines::default());
        let mut readers = Vec::new();
        if let Some(out) = child.stdout.take() {
            readers.push(read_lines(out, Stream::Out, &lines));
        }
        if let Some(error) = child.stderr.take() {
            readers.push(read_lines(error, Stream::Error, &lines));
        }
        Ok(Self {
            child,
            status: None,
            lines,
            readers,
        })
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// It has been reaped.
    pub fn signal(&self, signal: Signal) -> Result<(), HarnessError> {
        if self.status.is_some() {
            return Err(system("signal to a process that has been reaped")(
                rustix::io::Errno::SRCH,
            ));
        }
        kill_process(self.pid(), signal).map_err(system("signal"))
    }

    /// Waits for it to exit by itself, and for all that it has printed.
    ///
    /// # Errors
    /// [`HarnessError::Patience`].
    pub fn wait(&mut self) -> Result<ExitStatus, HarnessError> {
        let status = wait_for("a process to exit", || self.try_wait())?;
        let until = Instant::now() + REST;
        while !self.readers.iter().all(JoinHandle::is_finished) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(status)
    }

    /// Its status, if it has exited. What it printed last may still be on its way.
    pub fn try_wait(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().ok().flatten();
        }
        self.status
    }

    /// Kills it with SIGKILL and reaps it.
    pub fn kill(&mut self) {
        if self.status.is_none() {
            // Fails only if it has exited in the meantime.
            let _ = self.child.kill();
            self.status = self.child.wait().ok();
        }
    }

    /// All that it has printed so far, one line each.
    pub fn printed(&self, stream: Stream) -> String {
        self.lines.with(|lines| {
            let of = lines.iter().filter(|(s, _)| *s == stream);
            of.map(|(_, line)| format!("{line}\n")).collect()
        })
    }

    /// Waits for a line with `text` in it, on either stream, and returns that line.
    ///
    /// # Errors
    /// [`HarnessError::Command`] with what it has printed instead: it never came, or the process has
    /// exited.
    pub fn wait_for_line(&mut self, text: &str) -> Result<String, HarnessError> {
        let lines = Arc::clone(&self.lines);
        let readers = &self.readers;
        let found = wait_for(text, || {
            // Looked at first: when the readers are done, all that will ever be printed is there.
            let over = readers.iter().all(JoinHandle::is_finished);
            let line = lines.with(|l| l.iter().find(|(_, l)| l.contains(text)).cloned());
            line.map(|(_, line)| Some(line)).or(over.then_some(None))
        });
        found.ok().flatten().ok_or_else(|| {
            let said = self
                .lines
                .with(|l| l.iter().map(|(_, l)| format!("\n  {l}")).collect());
            HarnessError::Command {
                command: format!("waiting for \"{text}\""),
                said,
            }
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        for reader in self.readers.drain(..) {
            // A grandchild may hold the pipe open: its reader ends with it.
            if reader.is_finished() {
                let _ = reader.join();
            }
        }
    }
}

fn read_lines(from: impl Read + Send + 'static, stream: Stream, to: &Arc<Lines>) -> JoinHandle<()> {
    let to = Arc::clone(to);
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines() {
            let Ok(line) = line else { return };
            to.with(|lines| {
                if lines.len() == KEPT_LINES {
                    lines.remove(0);
                }
                lines.push((stream, line));
            });
        }
    })
}
