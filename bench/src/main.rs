//! Benchmarks of Pollux: each prints a table, or one JSON object with `--json`. Progress goes to
//! standard error. Exit code 0 means measured, whatever the figures.

mod channel;
mod cost;
mod demo;
mod endure;
mod failover;
mod heartbeat;
mod kv_check;
mod machine;
mod monotonic;
mod record;
mod report;
mod restore;
mod stage;
mod state_transfer;
mod storage;
mod wire;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

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
    /// Latency and throughput of the logging channel, beside bare TCP.
    Channel(channel::Options),
    /// A process with much memory and a channel, to be killed: part of `channel`.
    #[command(hide = true)]
    ChannelMember(channel::MemberOptions),
    /// Round trips of heartbeats on idle and on starved hosts, and times of detection.
    Heartbeat(heartbeat::Options),
    /// A process that joins a session and ticks until it is killed: part of `heartbeat`.
    #[command(hide = true)]
    HeartbeatMember(heartbeat::MemberOptions),
    /// Checks the answers of a Redis server, over connections that must not break.
    KvCheck(kv_check::Options),
    /// Shows a VM that outlives its host, twice, while a client checks every answer.
    Demo(demo::Options),
    /// What recording costs a guest, how much it writes, and how fast it replays.
    Record(record::Options),
    /// How long a snapshot takes to be a guest that answers.
    Restore(restore::Options),
    /// How long a VM stands still for a state transfer, by fork and by pre-copy.
    StateTransfer(state_transfer::Options),
    /// What protection costs a guest: against the same guest unprotected.
    Cost(cost::Options),
    /// A protected VM for long, under mixed load on a busy machine: nothing may fail or grow.
    Endure(endure::Options),
    /// Failure after failure at random moments under load, and whether the VM came through each.
    Failover(failover::Options),
    /// Puts several reports of `failover` together.
    FailoverMerge(failover::MergeOptions),
}

fn main() -> ExitCode {
    let Arguments { bench, json } = Arguments::parse();
    match bench {
        Bench::Channel(options) => {
            report::print("channel", json, |report| channel::run(&options, report))
        }
        Bench::ChannelMember(options) => channel::member(&options),
        Bench::Heartbeat(options) => {
            report::print("heartbeat", json, |report| heartbeat::run(&options, report))
        }
        Bench::HeartbeatMember(options) => heartbeat::member(&options),
        Bench::KvCheck(options) => {
            report::print("kv-check", json, |report| kv_check::run(&options, report))
        }
        Bench::Failover(options) => {
            report::print("failover", json, |report| failover::run(&options, report))
        }
        Bench::Record(options) => {
            report::print("record", json, |report| record::run(&options, report))
        }
        Bench::Restore(options) => {
            report::print("restore", json, |report| restore::run(&options, report))
        }
        Bench::StateTransfer(options) => report::print("state-transfer", json, |report| {
            state_transfer::run(&options, report)
        }),
        Bench::Endure(options) => {
            report::print("endure", json, |report| endure::run(&options, report))
        }
        Bench::Cost(options) => report::print("cost", json, |report| cost::run(&options, report)),
        Bench::FailoverMerge(options) => {
            report::print("failover", json, |report| failover::merge(&options, report))
        }
        Bench::Demo(options) => report::print("demo", json, |report| demo::run(&options, report)),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_command_line_is_well_formed() {
        <super::Arguments as clap::CommandFactory>::command().debug_assert();
    }
}
