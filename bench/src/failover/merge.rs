//! `pollux-bench failover-merge`: several reports of `failover` as one, for series that were not run in one go.
//!
//! Runs are put together, counts added up, failures kept. What cannot be had from that, as the distribution of
//! all latencies, is left out.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;

use super::results;
use crate::Failure;
use crate::report::{Measure, Report};

/// Results that are added up; `None` in one of the reports makes the sum unknown.
const SUMS: [&str; 10] = [
    "answers",
    "lost",
    "contradictory",
    "refused",
    "broken_connections",
    "unanswered",
    "keys",
    "double_primary",
    "double_primary_disk",
    "late_frames",
];

/// What to put together.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Reports of `pollux-bench failover --json`.
    #[arg(required = true)]
    reports: Vec<PathBuf>,
}

/// Does it.
pub(crate) fn run(options: &Options, report: &mut Report) -> Result<(), Failure> {
    let mut reports = Vec::new();
    for path in &options.reports {
        let of_file = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let text = fs::read_to_string(path).map_err(|error| of_file(&error))?;
        let one: Value = serde_json::from_str(&text).map_err(|error| of_file(&error))?;
        if one["bench"] != "failover" {
            return Err(of_file(&"is no report of `pollux-bench failover`").into());
        }
        reports.push(one);
    }
    merge(&reports, report);
    Ok(())
}

fn merge(reports: &[Value], report: &mut Report) {
    let runs: Vec<Value> = reports
        .iter()
        .filter_map(|one| one["details"]["runs"].as_array())
        .flatten()
        .cloned()
        .collect();
    results::report(&runs, report);
    for name in SUMS {
        let values: Vec<f64> = reports.iter().filter_map(|one| value(one, name)).collect();
        if values.len() == reports.len() {
            report.push(Measure::count(name, values.iter().sum::<f64>() as u64));
        }
    }
    let drifts: Vec<f64> = reports
        .iter()
        .filter_map(|one| value(one, results::CLOCK_DRIFT))
        .collect();
    report.push(Measure::of_runs(results::CLOCK_DRIFT, "ms", &drifts));
    let mut of = Vec::new();
    for one in reports {
        of.push(serde_json::json!({
            "revision": one["revision"],
            "seed": one["details"]["seed"],
            "runs": one["runs"],
            "seconds": one["seconds"],
        }));
        if one["complete"] != true {
            report.fail(format!(
                "the series with seed {} is not complete",
                one["details"]["seed"]
            ));
        }
        for why in one["failures"].as_array().into_iter().flatten() {
            report.fail(why.as_str().unwrap_or("a failure without words"));
        }
    }
    report.detail("of", of.into());
}

fn value(report: &Value, name: &str) -> Option<f64> {
    let results = report["results"].as_array()?;
    results.iter().find(|m| m["name"] == name)?["value"].as_f64()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn one(lost: u64, complete: bool) -> Value {
        json!({ "bench": "failover", "revision": "r", "runs": 1, "seconds": 5, "complete": complete,
            "results": [
                { "name": "answers", "value": 10 },
                { "name": "lost", "value": lost },
                { "name": "guest_clock_drift", "value": 3.0 + lost as f64 },
            ],
            "details": { "seed": 7, "runs": [{ "cause": "vmm_killed", "takeover": { "pause_ms": 40 } }] } })
    }

    fn results(report: &Report) -> Value {
        serde_json::to_value(report).unwrap()
    }

    #[test]
    fn counts_are_added_and_runs_put_together() {
        let mut report = Report::new("failover");
        merge(&[one(0, true), one(2, true)], &mut report);
        let json = results(&report);
        assert_eq!(json["runs"], 2);
        assert_eq!(
            (value(&json, "answers"), value(&json, "lost")),
            (Some(20.0), Some(2.0))
        );
        assert_eq!(value(&json, "double_primary"), None);
        assert!(json.get("failures").is_none());
    }

    #[test]
    fn what_is_not_complete_fails_the_whole() {
        let mut report = Report::new("failover");
        merge(&[one(0, true), one(0, false)], &mut report);
        let failures = results(&report)["failures"].clone();
        assert!(failures[0].as_str().unwrap().contains("not complete"));
    }
}
