//! The results of the runs of a series. They are computed from the runs as they stand in a report, so that
//! several series can be put together.

use hdrhistogram::Histogram;
use serde_json::Value;

use super::cause::CAUSES;
use crate::report::{Measure, Report};

/// Name of the result on the guest's clock.
pub(super) const CLOCK_DRIFT: &str = "guest_clock_drift";

/// Adds the results of all runs, and the runs.
pub(super) fn report(runs: &[Value], report: &mut Report) {
    report.runs(runs.len() as u64);
    let usual = distribution("pause_usual", runs, "/usual_ms");
    report.push(usual.noted("longest time without any answer in the second before a failure"));
    for cause in CAUSES {
        let of: Vec<Value> = runs
            .iter()
            .filter(|run| run["cause"] == cause.name())
            .cloned()
            .collect();
        if of.is_empty() {
            continue;
        }
        let moved = of
            .iter()
            .filter(|run| run["primary"] != run["takeover"]["to"]);
        report.push(
            Measure::count(format!("moved_{}", cause.name()), moved.count() as u64)
                .noted(format!("of {}: the VM went on on another host", of.len())),
        );
        for (what, place) in [
            ("pause", "/takeover/pause_ms"),
            ("wait", "/takeover/wait_ms"),
            ("live", "/live_ms"),
        ] {
            let measure = distribution(&format!("{what}_{}", cause.name()), &of, place);
            if measure.n != Some(0) {
                report.push(measure);
            }
        }
    }
    report.push(distribution("transfer_stop", runs, "/redundancy/stop_ms"));
    report.push(distribution(
        "redundant_again",
        runs,
        "/redundancy/after_ms",
    ));
    report.push(distribution("lag", runs, "/lag_ms").noted("of the backup, when it failed"));
    let divergences: u64 = runs
        .iter()
        .filter_map(|run| run["redundancy"]["divergences"].as_u64())
        .sum();
    report.push(Measure::count("divergences", divergences));
    if divergences > 0 {
        report.fail("replicas went another way than their primary");
    }
    report.detail("runs", runs.into());
}

/// Of the times in ms that the runs have at this place; those that have none are left out.
fn distribution(name: &str, runs: &[Value], place: &str) -> Measure {
    let mut all = Histogram::<u64>::new(3).expect("3 digits are legal");
    let ms = runs.iter().filter_map(|run| run.pointer(place)?.as_f64());
    ms.for_each(|ms| all.record((ms * 1e6) as u64).expect("it grows as needed"));
    Measure::milliseconds(name, &all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn runs_are_told_apart_by_their_cause() {
        let run = |cause: &str, pause: f64, live: Option<f64>| {
            json!({ "cause": cause, "usual_ms": 1, "lag_ms": 2, "live_ms": live,
                "takeover": { "pause_ms": pause, "wait_ms": 9 },
                "redundancy": { "after_ms": 1000, "stop_ms": null, "divergences": 0 } })
        };
        let runs = [
            run("vmm_killed", 30.0, Some(20.0)),
            run("vmm_killed", 50.0, Some(40.0)),
            run("link_cut", 300.0, None),
        ];
        let mut all = Report::new("failover");
        report(&runs, &mut all);
        let json = serde_json::to_value(&all).unwrap();
        let of = |name: &str| {
            let all = json["results"].as_array().unwrap();
            all.iter().find(|m| m["name"] == name).cloned()
        };
        assert_eq!(of("pause_vmm_killed").unwrap()["n"], 2);
        assert!(of("pause_vmm_killed").unwrap()["max"].as_f64().unwrap() > 49.0);
        assert!(of("live_link_cut").is_none() && of("pause_host_lost").is_none());
        assert_eq!(of("transfer_stop").unwrap()["n"], 0);
        assert_eq!(
            (
                json["runs"].as_u64(),
                json["details"]["runs"][2]["cause"].as_str()
            ),
            (Some(3), Some("link_cut"))
        );
    }
}
