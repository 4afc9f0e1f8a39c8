//! `pollux-bench restore`: how long a snapshot takes to be a guest that answers.
//!
//! Each time a new process goes on from the snapshot, with a disk of its own. Counted from the start of the
//! program: until the vCPU runs, and until the guest's kernel has answered an ICMP echo request or its Redis
//! server a PING over a new connection. A restore is asked one of the two, so that neither waits for the other.

mod guest;

use std::time::Duration;

use hdrhistogram::Histogram;

use crate::Failure;
use crate::report::{Measure, Report};
use crate::stage::{Interrupt, Patience, StageOptions};

use guest::{Question, Stand};

/// What to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    stage: StageOptions,
    /// How often the snapshot is restored for each of the two questions.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1000))]
    runs: u16,
}

/// When something had happened, counted from the start of the program.
struct Restored {
    vcpu_runs: Duration,
    answered: Duration,
}

/// Does it.
pub(crate) fn run(options: &Options, report: &mut Report) -> Result<(), Failure> {
    let stand = Stand::new(&options.stage, Patience::new(Interrupt::install()?))?;
    let mut vcpu_runs = Histogram::<u64>::new(3)?;
    let mut answers = [Histogram::<u64>::new(3)?, Histogram::new(3)?];
    let questions = [Question::Echo, Question::Ping];
    for number in 1..=options.runs {
        eprintln!("restore: run {number} of {}", options.runs);
        for (question, answers) in questions.into_iter().zip(&mut answers) {
            let restored = stand.restore(question)?;
            vcpu_runs.record(restored.vcpu_runs.as_nanos() as u64)?;
            answers.record(restored.answered.as_nanos() as u64)?;
        }
    }
    report.runs(options.runs.into());
    let [echo, ping] = answers;
    report.push(Measure::milliseconds("vcpu_runs", &vcpu_runs));
    report.push(Measure::milliseconds("first_echo", &echo).noted("the guest's kernel, over ICMP"));
    report.push(
        Measure::milliseconds("first_pong", &ping)
            .noted("the guest's Redis server, over a new connection"),
    );
    Ok(())
}
