//! The commands of the `pollux` program.

mod ctl;
mod init;
mod log;
mod profiling;
mod protect;
mod record;
mod replay;
mod run;
mod saves;
mod signals;
mod snapshot;

pub use ctl::CtlOptions;

use std::error::Error;
use std::process::ExitCode;

use crate::cli::Command;

/// What a command comes to.
pub type Outcome = Result<ExitCode, Box<dyn Error>>;

/// Exit code of a VM whose guest asked for a reset: whoever looks after it starts it again.
pub const EXIT_RESET: u8 = 3;

/// Runs a command.
///
/// # Errors
/// Whatever it says.
pub fn run(command: Command) -> Outcome {
    match command {
        Command::Run(options) => run::run(options),
        Command::Init(options) => init::init(&options),
        Command::Standby(options) => protect::standby(options),
        Command::Record(options) => record::record(options),
        Command::Replay(options) => replay::replay(&options),
        Command::Snapshot(options) => snapshot::snapshot(options),
        Command::Restore(options) => run::restore(&options),
        Command::Preflight(options) => Ok(crate::preflight::run(options)),
        Command::Ctl(options) => ctl::ctl(options),
        Command::Log(command) => log::log(&command),
    }
}
