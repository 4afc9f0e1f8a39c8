//! The `pollux` command: a KVM VMM that keeps a virtual machine running through the loss of its host.
//!
//! Here are only the command line and its dispatch; each command is a module of `commands`.

mod api;
mod cli;
mod commands;
mod config;
mod config_ft;
mod console;
mod io;
mod link;
mod preflight;
mod session;
mod vm;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    usdt::sample_as_environment_says();
    cli::start_log(&cli.log);
    match commands::run(cli.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("pollux: {error}");
            let mut source = error.source();
            while let Some(cause) = source {
                if !error.to_string().contains(&cause.to_string()) {
                    eprintln!("  because: {cause}");
                }
                source = cause.source();
            }
            ExitCode::FAILURE
        }
    }
}
