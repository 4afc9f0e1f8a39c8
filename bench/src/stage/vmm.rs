//! The programs of Pollux, as an operator starts them.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::Process;

use super::api::Api;
use super::{Files, GUEST_ADDRESS, SITES, SiteId, Start};
use crate::Failure;

/// Where the programs are.
#[derive(Debug, Clone)]
pub(crate) struct Programs {
    pub(super) pollux: PathBuf,
}

impl Programs {
    /// In this directory, or beside this program.
    pub(crate) fn find(directory: Option<&Path>) -> Result<Self, Failure> {
        let own = std::env::current_exe()?;
        let directory = match directory {
            Some(directory) => directory,
            None => own.parent().ok_or("this program is in no directory")?,
        };
        for name in ["pollux", "vhost-ftlog", "ftprobe"] {
            let program = directory.join(name);
            if !program.exists() {
                let build = "cargo build --release";
                return Err(format!("{} is missing: run {build}", program.display()).into());
            }
        }
        Ok(Self {
            pollux: directory.join("pollux"),
        })
    }

    #[cfg(test)]
    pub(super) fn none() -> Self {
        let pollux = PathBuf::from("/nowhere");
        Self { pollux }
    }

    /// Makes the shared storage ready, as an operator does.
    pub(super) fn init(&self, files: &Files) -> Result<(), Failure> {
        let mut init = Command::new(&self.pollux);
        init.arg("init").arg("--shared").arg(files.shared());
        let output = init.output()?;
        if output.status.success() {
            return Ok(());
        }
        Err(String::from_utf8_lossy(&output.stderr).into_owned().into())
    }

    pub(crate) fn pollux(&self) -> Command {
        let mut command = Command::new(&self.pollux);
        command.args(["--log", "info"]);
        command
    }

    /// The command of a primary.
    pub(super) fn primary(&self, id: SiteId, start: &Start, files: &Files, memory: u32) -> Command {
        let mut command = self.pollux();
        command.arg("run");
        match &start.snapshot {
            Some(snapshot) => {
                command.arg("--from-snapshot").arg(snapshot);
            }
            None => {
                command
                    .args(["--memory", &memory.to_string()])
                    .args(["--guest-ip", &format!("{GUEST_ADDRESS}/24")])
                    .arg("--kernel")
                    .arg(&start.kernel)
                    .arg("--initramfs")
                    .arg(&start.initramfs);
            }
        }
        command.arg("--protect");
        common(&mut command, id, files);
        command
    }

    /// The command of a standby.
    pub(super) fn standby(&self, id: SiteId, files: &Files) -> Command {
        let mut command = self.pollux();
        command.arg("standby");
        common(&mut command, id, files);
        command
    }
}

fn common(command: &mut Command, id: SiteId, files: &Files) {
    command
        .env("TMPDIR", files.temporary())
        .args(["--tap", "tap0", "--host", &id.to_string()])
        .args(["--listen", &id.listen().to_string()])
        .arg("--disk")
        .arg(files.disk_of(id))
        .arg("--console")
        .arg(files.console(id))
        .arg("--api")
        .arg(files.api(id))
        .arg("--key")
        .arg(files.key())
        .arg("--shared")
        .arg(files.shared_of(id));
    for other in SITES.into_iter().filter(|other| *other != id) {
        command.args(["--standby", &format!("{other}={}", other.listen())]);
    }
}

/// The same command with a pipe as its standard input, and the guest's console on both: without the option
/// that makes it a file. `path` is where the pipe is made. Returns the pipe's other end.
pub(crate) fn with_keyboard(command: &Command, path: &Path) -> Result<(Command, File), Failure> {
    rustix::fs::mkfifoat(rustix::fs::CWD, path, rustix::fs::Mode::RWXU)?;
    // Both ends, so that opening it does not wait for a reader.
    let keyboard = File::options().read(true).write(true).open(path)?;
    let mut shell = Command::new("sh");
    shell
        .args(["-c", r#"exec "$0" "$@" < "$KEYBOARD""#])
        .env("KEYBOARD", path);
    shell.arg(command.get_program());
    let mut arguments = command.get_args();
    while let Some(argument) = arguments.next() {
        if argument == "--console" {
            arguments.next();
        } else {
            shell.arg(argument);
        }
    }
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            shell.env(name, value);
        }
    }
    Ok((shell, keyboard))
}

/// A running VMM.
pub(crate) struct Vmm {
    process: Process,
    api: Api,
}

impl Vmm {
    pub(super) fn new(process: Process, api: Api) -> Self {
        Self { process, api }
    }

    /// Its process.
    pub(crate) fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Its API.
    pub(crate) fn api(&self) -> &Api {
        &self.api
    }
}
