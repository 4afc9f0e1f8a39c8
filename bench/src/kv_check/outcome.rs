//! What a check found, and how it is reported.
#![allow(dead_code)] // parts of it are for benchmarks to come

use hdrhistogram::Histogram;

use super::check::Verdict;
use super::live::Gap;
use crate::monotonic::Moment;
use crate::report::{Measure, Report};

/// A connection that broke.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Break {
    pub(crate) connection: u16,
    pub(crate) at: Moment,
    pub(crate) why: String,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// Repeats the choice of requests.
    pub(crate) seed: u64,
    pub(crate) started: Moment,
    /// For how long requests were sent.
    pub(crate) seconds: f64,
    pub(crate) answers: u64,
    /// Requests whose connection broke before their answer.
    pub(crate) unanswered: u64,
    /// Keys whose histories were checked.
    pub(crate) keys: u64,
    pub(crate) verdict: Verdict,
    /// Errors among the answers.
    pub(crate) refused: u64,
    /// The first of them.
    pub(crate) refusals: Vec<String>,
    pub(crate) broken: Vec<Break>,
    /// From request to answer, in nanoseconds.
    pub(crate) latency: Histogram<u64>,
    /// The longest gap of each connection.
    pub(crate) longest_gaps: Vec<Gap>,
}

impl Outcome {
    /// What must not be, in words; empty if the server did all right.
    pub(crate) fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut fault = |count: u64, what: &str| {
            if count > 0 {
                faults.push(format!("{count} {what}"));
            }
        };
        fault(self.verdict.lost, "acknowledged writes were lost");
        fault(self.verdict.contradictory, "answers contradict others");
        fault(self.refused, "requests were answered with an error");
        fault(self.broken.len() as u64, "connections broke");
        if self.answers == 0 {
            faults.push("no answer came".to_owned());
        }
        faults
    }

    /// The faults with the first of each kind in detail.
    pub(crate) fn details_of_faults(&self) -> impl Iterator<Item = String> {
        let broken = self.broken.iter().take(super::check::DESCRIBED).map(|b| {
            let after = b.at.seconds_since(self.started);
            format!("connection {} after {after:.3} s: {}", b.connection, b.why)
        });
        let refused = self.refusals.iter().map(|said| format!("refused: {said}"));
        let found = self.verdict.described.iter().cloned();
        found.chain(broken).chain(refused)
    }

    /// Length of the longest gap of all, in nanoseconds.
    pub(crate) fn longest_gap_ns(&self) -> u64 {
        let gaps = self.longest_gaps.iter().map(Gap::nanoseconds);
        gaps.max().unwrap_or(0)
    }

    /// Answers in a second.
    pub(crate) fn rate(&self) -> f64 {
        self.answers as f64 / self.seconds.max(f64::MIN_POSITIVE)
    }

    /// Adds all of it to a report.
    pub(crate) fn report(&self, report: &mut Report) {
        let mut gaps = Histogram::<u64>::new(3).expect("3 digits are legal");
        for gap in &self.longest_gaps {
            gaps.record(gap.nanoseconds()).expect("it grows as needed");
        }
        report.push(Measure::count("answers", self.answers));
        report.push(Measure::count("lost", self.verdict.lost));
        report.push(Measure::count("contradictory", self.verdict.contradictory));
        report.push(Measure::count("refused", self.refused));
        report.push(Measure::count(
            "broken_connections",
            self.broken.len() as u64,
        ));
        report.push(Measure::count("unanswered", self.unanswered));
        report.push(Measure::count("keys", self.keys));
        report.push(Measure::value("requests_per_s", "1/s", self.rate()));
        report.push(Measure::microseconds("latency", &self.latency));
        let of_each = "the longest time without an answer of each connection";
        report.push(Measure::milliseconds("longest_gap", &gaps).noted(of_each));
        for fault in self.faults() {
            report.fail(fault);
        }
        let details: Vec<String> = self.details_of_faults().collect();
        for detail in &details {
            eprintln!("kv-check: {detail}");
        }
        let gaps: Vec<f64> = self
            .longest_gaps
            .iter()
            .map(|g| g.nanoseconds() as f64 / 1e6)
            .collect();
        report.detail(
            "kv_check",
            serde_json::json!({
                "seed": self.seed,
                "longest_gap_ms": gaps,
                "faults": details,
            }),
        );
    }
}
