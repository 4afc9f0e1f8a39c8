//! The `pollux` command.

mod preflight;

use std::process::ExitCode;

use clap::Parser;

/// Keeps a virtual machine running through the loss of its host.
#[derive(Debug, Parser)]
#[command(version, about)]
enum Command {
    Preflight(preflight::PreflightArgs),
}

fn main() -> ExitCode {
    match Command::parse() {
        Command::Preflight(args) => preflight::run(args),
    }
}
