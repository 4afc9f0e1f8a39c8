//! `pollux-bench state-transfer`: how long a VM stands still for a state transfer, by fork and by pre-copy.
//!
//! A guest without an operating system writes to one page after another, with a pause between two. Its state goes
//! over TCP to a process on another host, which loads it: as Pollux does it, by a child with a copy-on-write image
//! of memory; and by pre-copy with KVM's dirty log, as VMotion does it (Nelson et al., 2005): round after round
//! while the guest runs, the last one while it stands. For each also what it leaves the guest of its rate
//! meanwhile. All that belongs to the VM runs on CPU 0, the other host on CPU 1; every transfer has a new VM.

mod fork;
mod guest;
mod pages;
mod precopy;
mod sink;

use std::net::Ipv4Addr;
use std::time::Duration;

use harness::{Host, Link};
use hdrhistogram::Histogram;

use crate::Failure;
use crate::report::{Measure, Report};

use guest::Guest;
use sink::Sink;

/// What to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Guest memory in MiB, all of it in use.
    #[arg(long, default_value_t = 192, value_parser = clap::value_parser!(u16).range(16..=4096))]
    memory: u16,
    /// How much of it the guest writes to, in MiB.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=1022))]
    set: u16,
    /// Transfers of each kind at each rate.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
    runs: u16,
}

/// Pages that the guest writes to in a second where it has a CPU alone.
const RATES: [u32; 3] = [1_000, 10_000, 100_000];
/// How long the guest runs alone before a transfer: its rate then is what the rate meanwhile is compared with.
const ALONE: Duration = Duration::from_millis(200);

/// What one transfer came to.
struct Transferred {
    /// The longest time for which the transfer held the vCPU.
    stop: Duration,
    /// The longest time between two exits, which are a millisecond apart: also what others took of the CPU.
    gap: Duration,
    /// From the start until the other host has all.
    complete: Duration,
    /// Pages that the guest wrote to meanwhile.
    written: u64,
    /// Pages that were sent.
    sent: u64,
    /// Passes over memory.
    rounds: u64,
    arrived: Arrived,
}

/// Digests of the memory that the other host should have, and of what it has.
struct Arrived {
    expected: u64,
    found: u64,
}

type Transfer = fn(&mut Guest, Sink) -> Result<Transferred, Failure>;

/// What the transfers of a kind came to.
struct Kind {
    name: &'static str,
    transfer: Transfer,
    stops: Histogram<u64>,
    gaps: Histogram<u64>,
    completions: Histogram<u64>,
    /// The guest's rate against that alone.
    kept: Vec<f64>,
    /// That, in pages a second.
    alone: Vec<f64>,
    sent: Vec<f64>,
    rounds: Vec<f64>,
}

impl Kind {
    fn new(name: &'static str, transfer: Transfer) -> Result<Self, Failure> {
        Ok(Self {
            name,
            transfer,
            stops: Histogram::new(3)?,
            gaps: Histogram::new(3)?,
            completions: Histogram::new(3)?,
            kept: Vec::new(),
            alone: Vec::new(),
            sent: Vec::new(),
            rounds: Vec::new(),
        })
    }

    fn run(&mut self, guest: &mut Guest, sink: Sink) -> Result<(), Failure> {
        let alone = guest.rate(ALONE)?;
        let done = (self.transfer)(guest, sink)?;
        if done.arrived.expected != done.arrived.found {
            return Err(format!("{}: the other host has other memory", self.name).into());
        }
        self.stops.record(done.stop.as_nanos() as u64)?;
        self.gaps.record(done.gap.as_nanos() as u64)?;
        self.completions.record(done.complete.as_nanos() as u64)?;
        let meanwhile = done.written as f64 / done.complete.as_secs_f64();
        self.kept.push(meanwhile / alone);
        self.alone.push(alone);
        self.sent.push(done.sent as f64);
        self.rounds.push(done.rounds as f64);
        Ok(())
    }

    fn report(&self, rate: u32, report: &mut Report) {
        let name = |what: &str| format!("{}_{what}_{rate}", self.name);
        report.push(
            Measure::milliseconds(name("stop"), &self.stops)
                .noted("the longest time for which the transfer held the vCPU"),
        );
        report.push(
            Measure::milliseconds(name("gap"), &self.gaps)
                .noted("the longest time between two exits, which are 1 ms apart"),
        );
        report.push(
            Measure::milliseconds(name("complete"), &self.completions)
                .noted("until the other host had all"),
        );
        report.push(
            Measure::of_runs(name("rate"), "1", &self.kept)
                .noted("what the guest wrote to meanwhile, of what it does alone"),
        );
        report.push(
            Measure::of_runs(name("alone"), "pages/s", &self.alone)
                .noted("what it wrote to before the transfer"),
        );
        report.push(Measure::of_runs(name("sent"), "pages", &self.sent));
        report.push(Measure::of_runs(name("rounds"), "1", &self.rounds));
    }
}

/// Does it.
pub(crate) fn run(options: &Options, report: &mut Report) -> Result<(), Failure> {
    if options.set + 2 > options.memory {
        return Err("--set must be 2 smaller than --memory: there lie code and tables".into());
    }
    let (a, b) = (Host::new()?.on_cpu(0), Host::new()?.on_cpu(1));
    let link = Link::between(&a, &b)?;
    report.runs(options.runs.into());
    for rate in RATES {
        let mut kinds = [
            Kind::new("fork", fork::transfer)?,
            Kind::new("precopy", precopy::transfer)?,
        ];
        // The vCPU's thread is the closure's.
        a.run(|| {
            measure(options, rate, &mut kinds, (&b, link.b.v4)).map_err(|error| error.to_string())
        })?;
        for kind in &kinds {
            kind.report(rate, report);
        }
    }
    Ok(())
}

fn measure(
    options: &Options,
    rate: u32,
    kinds: &mut [Kind],
    (host, address): (&Host, Ipv4Addr),
) -> Result<(), Failure> {
    for number in 1..=options.runs {
        let of = options.runs;
        eprintln!("state-transfer: {rate} pages/s, {number} of {of}");
        for kind in &mut *kinds {
            // Before the guest is there: it is of another process's memory.
            let sink = Sink::on(host, address, options.memory)?;
            let mut guest = Guest::new(options.memory, options.set, rate)?;
            kind.run(&mut guest, sink)?;
        }
    }
    Ok(())
}
