//! `pollux preflight`: what this host offers, what each finding means, and what to do about it.
//!
//! Each check tries the thing itself where that leaves nothing behind, and reads what the kernel
//! says where it would. Nothing is changed on the host.

mod clock;
mod ebpf;
mod host;
mod kvm;
mod memory;
mod network;
mod report;
mod sys;
mod uring;

use std::process::ExitCode;

use host::Host;
use report::Report;

/// Tells whether this host can run Pollux, and how well.
///
/// Prints a table of what was found, what it means and what to do about it. The exit code is 0
/// unless something is missing that Pollux cannot do without.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct PreflightArgs {
    /// Print one JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

/// Runs all checks and prints them.
pub(crate) fn run(args: PreflightArgs) -> ExitCode {
    let report = examine(&Host::this());
    if args.json {
        println!("{}", report.to_json());
    } else {
        print!("{}", report.to_table(sys::terminal_columns()));
    }
    if report.is_usable() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn examine(host: &Host) -> Report {
    let (mut findings, profile) = kvm::check();
    findings.extend(memory::check(host));
    findings.extend(uring::check(host));
    findings.extend(network::check(host));
    findings.extend(ebpf::check(host));
    findings.extend(clock::check(host));
    Report::new(host.kernel_release(), findings, profile)
}
