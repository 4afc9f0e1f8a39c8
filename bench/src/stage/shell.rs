//! The shell on the guest's console: runs a command and tells how long it took, as the host sees it.

use std::fs::File;
use std::io::Write;
use std::time::{Duration, Instant};

use harness::{Process, Stream};

use super::Patience;
use crate::Failure;

/// How long a command may take.
const LIMIT: Duration = Duration::from_secs(180);

/// See the module.
pub(crate) struct Shell {
    keyboard: File,
    commands: u32,
}

impl Shell {
    /// Types on this keyboard.
    pub(crate) fn new(keyboard: File) -> Self {
        Self {
            keyboard,
            commands: 0,
        }
    }

    /// Runs a command. The time is that between two lines on the console, before and after it.
    pub(crate) fn run(
        &mut self,
        vmm: &Process,
        patience: &Patience,
        command: &str,
    ) -> Result<Duration, Failure> {
        self.commands += 1;
        let number = self.commands;
        // What is typed comes back as an echo: the marks are not in it as they are printed.
        let line = format!("echo be''gun-{number}-; {command}; echo en''ded-{number}-$?-\n");
        self.keyboard.write_all(line.as_bytes())?;
        let seen = |mark: &str| {
            let printed = vmm.printed(Stream::Out);
            printed
                .lines()
                .find(|line| line.contains(mark))
                .map(str::to_owned)
        };
        let (begun, ended) = (format!("begun-{number}-"), format!("ended-{number}-"));
        patience.wait_until("a command in the guest", LIMIT, || {
            Ok(seen(&begun).is_some())
        })?;
        let since = Instant::now();
        let mut last = String::new();
        patience.wait_until("its end", LIMIT, || {
            last = seen(&ended).unwrap_or_default();
            Ok(!last.is_empty())
        })?;
        let took = since.elapsed();
        if last.contains(&format!("{ended}0-")) {
            Ok(took)
        } else {
            Err(format!("in the guest: {command}: {last}").into())
        }
    }
}
