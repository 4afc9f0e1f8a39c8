//! Benchmarks of Pollux: each prints a table, or one JSON object with `--json`. Progress goes to
//! standard error. Exit code 0 means measured, whatever the figures.

mod heartbeat;
mod machine;
mod report;

use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, Subcommand};

use machine::Machine;
use report::{Measure, Report};

/// Why a benchmark could not measure, or what it found broken.
pub(crate) type Failure = Box<dyn std::error::Error>;

#[derive(Parser)]
#[command(version, about = "Benchmarks of Pollux")]
struct Arguments {
    #[command(subcommand)]
    bench: Bench,
    /// Print one JSON object instead of a table.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum Bench {
    /// Round trips of heartbeats on idle and on starved hosts, and times of detection.
    Heartbeat(heartbeat::Options),
    /// A process that joins a session and ticks until it is killed: part of `heartbeat`.
    #[command(hide = true)]
    HeartbeatMember(heartbeat::MemberOptions),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let started = Instant::now();
    let (bench, runs, result) = match arguments.bench {
        Bench::Heartbeat(options) => ("heartbeat", 1, heartbeat::run(&options)),
        Bench::HeartbeatMember(options) => return heartbeat::member(&options),
    };
    match result {
        Ok(results) => {
            print(bench, runs, started, results, arguments.json);
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprintln!("pollux-bench {bench}: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn print(bench: &'static str, runs: u64, started: Instant, results: Vec<Measure>, json: bool) {
    let report = Report {
        bench,
        revision: machine::revision(),
        machine: Machine::here(),
        runs,
        seconds: started.elapsed().as_secs_f64(),
        complete: true,
        results,
    };
    if json {
        println!(
            "{}",
            serde_json::to_string(&report).expect("a report is plain data")
        );
    } else {
        print!("{}", report.table());
    }
}
