//! The logging channel daemon: options in, daemon out.

use std::process::ExitCode;

use clap::Parser;
use vhost_ftlog::daemon::options::Options;
use vhost_ftlog::daemon::run;

fn main() -> ExitCode {
    let options = Options::parse();
    usdt::sample_as_environment_says();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("FTLOG_LOG")
                .unwrap_or_else(|_| "info".into()),
        )
        .with_writer(std::io::stderr)
        // It would tell them on standard error, and panic where that is what is gone: whoever reads the
        // messages may die with the VMM, whose log is still to be delivered.
        .log_internal_errors(false)
        .init();
    match run::run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = error.to_string();
            let mut source = std::error::Error::source(&error);
            while let Some(inner) = source {
                text = format!("{text}: {inner}");
                source = inner.source();
            }
            tracing::error!("{text}");
            ExitCode::FAILURE
        }
    }
}
