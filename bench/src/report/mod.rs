//! What a benchmark prints: one JSON object for machines, or a table for people.
//!
//! The names of results are stable, so that figures can be followed over time. Every baseline is a
//! result of its own in the same object. Nothing else goes to standard output: progress goes to standard
//! error. A benchmark that could not measure prints what it has, with `"complete": false` and why.
#![allow(dead_code)] // parts of it are for benchmarks to come

mod measure;
mod table;

use std::process::ExitCode;
use std::time::Instant;

use serde::Serialize;

pub(crate) use measure::Measure;

use crate::Failure;
use crate::machine::{self, Machine};

/// One run of one benchmark.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    bench: &'static str,
    revision: String,
    machine: Machine,
    runs: u64,
    seconds: f64,
    complete: bool,
    results: Vec<Measure>,
    /// What could not be measured, and invariants that did not hold.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    failures: Vec<String>,
    /// Whatever else a program may want to read: a list of runs, a timeline.
    #[serde(skip_serializing_if = "serde_json::Map::is_empty")]
    details: serde_json::Map<String, serde_json::Value>,
    /// Lines for people, below the table.
    #[serde(skip)]
    remarks: Vec<String>,
    /// What people read instead of the table.
    #[serde(skip)]
    page: Option<String>,
}

impl Report {
    /// An empty report of one run.
    pub(crate) fn new(bench: &'static str) -> Self {
        Self {
            bench,
            revision: machine::revision(),
            machine: Machine::here(),
            runs: 1,
            seconds: 0.0,
            complete: false,
            results: Vec::new(),
            failures: Vec::new(),
            details: serde_json::Map::new(),
            remarks: Vec::new(),
            page: None,
        }
    }

    /// Adds a result.
    pub(crate) fn push(&mut self, measure: Measure) {
        self.results.push(measure);
    }

    /// Says of how many runs this is.
    pub(crate) fn runs(&mut self, runs: u64) {
        self.runs = runs;
    }

    /// Says what a reader must know of the engine that was measured.
    pub(crate) fn engine_note(&mut self, note: impl Into<String>) {
        self.machine.engine_notes.push(note.into());
    }

    /// Adds what a program may want to read.
    pub(crate) fn detail(&mut self, name: &str, detail: serde_json::Value) {
        self.details.insert(name.to_owned(), detail);
    }

    /// Adds a line for people, below the table.
    pub(crate) fn remark(&mut self, remark: impl Into<String>) {
        self.remarks.push(remark.into());
    }

    /// Gives people this to read instead of the table of all results.
    pub(crate) fn page(&mut self, page: String) {
        self.page = Some(page);
    }

    /// Says that an invariant did not hold: whatever else was measured, this is no success.
    pub(crate) fn fail(&mut self, why: impl Into<String>) {
        self.failures.push(why.into());
    }

    /// Whether all was measured and every invariant held.
    fn is_success(&self) -> bool {
        self.complete && self.failures.is_empty()
    }
}

/// Runs a benchmark, prints its report, and gives the exit code: success if it was measured, whatever the
/// figures, and every invariant held.
pub(crate) fn print(
    bench: &'static str,
    json: bool,
    run: impl FnOnce(&mut Report) -> Result<(), Failure>,
) -> ExitCode {
    let started = Instant::now();
    let mut report = Report::new(bench);
    match run(&mut report) {
        Ok(()) => report.complete = true,
        Err(failure) => report.fail(failure.to_string()),
    }
    report.seconds = started.elapsed().as_secs_f64();
    for failure in &report.failures {
        eprintln!("pollux-bench {bench}: {failure}");
    }
    if json {
        let text = serde_json::to_string(&report).expect("a report is plain data");
        println!("{text}");
    } else {
        print!("{}", report.table());
    }
    if report.is_success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_has_the_fields_that_followers_read() {
        let mut report = Report::new("channel");
        report.engine_note("ring 0 is emulated");
        report.push(Measure::value("throughput_1500", "MB/s", 812.0));
        let json = serde_json::to_value(&report).unwrap();
        for field in [
            "bench", "revision", "machine", "runs", "seconds", "complete",
        ] {
            assert!(!json[field].is_null(), "{field}");
        }
        assert_eq!(json["machine"]["engine_notes"][0], "ring 0 is emulated");
        assert_eq!(json["results"][0]["value"], 812.0);
        assert!(json.get("failures").is_none() && json.get("details").is_none());
    }

    #[test]
    fn unfinished_or_failed_is_no_success() {
        let mut report = Report::new("failover");
        assert!(!report.is_success());
        assert!(report.table().contains("not complete"));
        report.complete = true;
        assert!(report.is_success());
        report.fail("2 answers lost");
        assert!(!report.is_success());
        assert!(report.table().contains("FAILED: 2 answers lost"));
    }
}
