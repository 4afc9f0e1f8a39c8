//! Times in which a CPU of this machine does not run at all, whatever runs on it: the hypervisor below has
//! taken it, or the firmware. They are part of every figure measured here, and no program's doing.
//!
//! On each CPU a thread with real-time priority looks at the clock as fast as it can, in bursts, so that the
//! scheduler has no reason to take the CPU from it for the sake of others. What it misses is a stall.

use std::time::Duration;

use hdrhistogram::Histogram;
use heartbeat::clock::monotonic_ns;
use rustix::thread::{CpuSet, sched_setaffinity};

use super::scheduling::{Policy, set};
use crate::Failure;
use crate::report::{Measure, Report};

/// Shorter gaps are interrupts.
const STALL_NS: u64 = 50_000;
/// Above the probers and the kernel's threads.
const PRIORITY: i32 = 50;
/// Length of a burst, and of the pause after it: well below the share of real-time threads.
const BURST_NS: u64 = 20_000_000;
const PAUSE: Duration = Duration::from_millis(5);

/// From when to when, ns.
type Gap = (u64, u64);

/// Looks for stalls on every CPU at once.
pub(super) fn measure(length: Duration, report: &mut Report) -> Result<(), Failure> {
    eprintln!("stalls: {} s", length.as_secs());
    let cpus = std::thread::available_parallelism()?.get();
    let by_cpu: Vec<Vec<Gap>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cpus)
            .map(|cpu| scope.spawn(move || gaps_of(cpu, length)))
            .collect();
        let joined = threads.into_iter().map(|thread| match thread.join() {
            Ok(gaps) => gaps,
            Err(_) => Err(std::io::Error::other("the thread panicked")),
        });
        joined.collect::<Result<_, _>>()
    })?;
    let at_once = by_cpu.iter().skip(1).fold(
        by_cpu.first().cloned().unwrap_or_default(),
        |common, gaps| overlaps(&common, gaps),
    );
    let note = |what: &str, gaps: &[Gap], cpus: usize| {
        let stalled: u64 = gaps.iter().map(|(from, to)| to - from).sum();
        let share = stalled as f64 / (length.as_nanos() as f64 * cpus as f64);
        format!(
            "{what} for {} us and more, looked for during {} s; {:.3} % of the time",
            STALL_NS / 1_000,
            length.as_secs(),
            100.0 * share
        )
    };
    let any: Vec<Gap> = by_cpu.concat();
    let measure = |name: &str, gaps: &[Gap]| -> Result<Measure, Failure> {
        let mut histogram = Histogram::new(3)?;
        for (from, to) in gaps {
            histogram.record(to - from)?;
        }
        Ok(Measure::microseconds(name, &histogram))
    };
    let one = measure("machine_stalls", &any)?;
    report.push(one.noted(note("a CPU did not run", &any, cpus)));
    let all = measure("machine_stalls_all", &at_once)?;
    report.push(all.noted(note("no CPU ran", &at_once, 1)));
    Ok(())
}

fn gaps_of(cpu: usize, length: Duration) -> std::io::Result<Vec<Gap>> {
    let mut own = CpuSet::new();
    own.set(cpu);
    sched_setaffinity(None, &own)?;
    set(0, Policy::Fifo(PRIORITY))?;
    let mut gaps = Vec::new();
    let end = monotonic_ns() + length.as_nanos() as u64;
    while monotonic_ns() < end {
        let mut last = monotonic_ns();
        let burst = last + BURST_NS;
        while last < burst {
            let now = monotonic_ns();
            if now - last >= STALL_NS {
                gaps.push((last, now));
            }
            last = now;
        }
        std::thread::sleep(PAUSE);
    }
    Ok(gaps)
}

/// The times that lie in a gap of both; each list is in order and its gaps do not overlap.
fn overlaps(a: &[Gap], b: &[Gap]) -> Vec<Gap> {
    let mut common = Vec::new();
    let (mut i, mut j) = (0, 0);
    while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
        let (from, to) = (x.0.max(y.0), x.1.min(y.1));
        if from < to {
            common.push((from, to));
        }
        if x.1 < y.1 { i += 1 } else { j += 1 }
    }
    common
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_in_gaps_of_both_is_common() {
        let a = [(0, 10), (20, 40), (50, 60)];
        let b = [(5, 25), (30, 35), (60, 70)];
        assert_eq!(overlaps(&a, &b), [(5, 10), (20, 25), (30, 35)]);
        assert_eq!(overlaps(&a, &[]), []);
    }
}
