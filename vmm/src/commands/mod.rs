//! The commands of the `pollux` program.

mod log;
mod record;
mod replay;
mod run;
mod signals;

use std::error::Error;
use std::process::ExitCode;

use crate::cli::Command;

/// What a command comes to.
pub type Outcome = Result<ExitCode, Box<dyn Error>>;

/// Runs a command.
///
/// # Errors
/// Whatever it says.
pub fn run(command: Command) -> Outcome {
    match command {
        Command::Run(options) => run::run(options),
        Command::Record(options) => record::record(options),
        Command::Replay(options) => replay::replay(&options),
        Command::Restore(options) => run::restore(&options),
        Command::Preflight(options) => Ok(crate::preflight::run(options)),
        Command::Log(command) => log::log(&command),
    }
}
