//! What the VMMs say over time: whether anybody was given up, and how far the backup was behind.

use std::time::Duration;

use hdrhistogram::Histogram;

use crate::report::{Measure, Report};
use crate::stage::{SITES, SiteId, Stage, Status};

/// See the module.
pub(super) struct Watch {
    primary: SiteId,
    epoch: Option<u64>,
    protected: bool,
    /// A backup took over from a live primary.
    failovers: u64,
    /// A primary gave a live backup up.
    backups_lost: u64,
    looks: u64,
    unprotected: u64,
    unanswered: u64,
    divergences: u64,
    lag: Histogram<u64>,
    lag_most_ms: f64,
    mbit: Vec<f64>,
    incidents: Vec<serde_json::Value>,
}

impl Watch {
    /// From a protected VM on.
    pub(super) fn new((primary, status): &(SiteId, Status)) -> Self {
        Self {
            primary: *primary,
            epoch: status.epoch,
            protected: true,
            failovers: 0,
            backups_lost: 0,
            looks: 0,
            unprotected: 0,
            unanswered: 0,
            divergences: 0,
            lag: Histogram::new(3).expect("3 digits are legal"),
            lag_most_ms: 0.0,
            mbit: Vec::new(),
            incidents: Vec::new(),
        }
    }

    /// Asks all VMMs.
    pub(super) fn look(&mut self, stage: &Stage, at: Duration) {
        self.looks += 1;
        let said: Vec<_> = SITES.map(|id| (id, stage.status(id))).into();
        let diverged = said.iter().filter_map(|(_, status)| status.as_ref());
        self.divergences = self.divergences.max(diverged.map(|s| s.divergences).sum());
        let primary = said
            .into_iter()
            .filter_map(|(id, status)| Some((id, status?)))
            .filter(|(_, status)| status.role == "primary")
            .max_by_key(|(_, status)| status.epoch);
        let Some((id, status)) = primary else {
            self.unanswered += 1;
            return;
        };
        if self.take(id, &status) {
            let events = stage.events(id).unwrap_or_default();
            let last: Vec<&str> = events.lines().rev().take(8).collect();
            eprintln!(
                "endure: after {:.0} s: {self}\n{}",
                at.as_secs_f64(),
                last.iter().rev().copied().collect::<Vec<_>>().join("\n")
            );
            self.incidents.push(serde_json::json!({
                "after_s": at.as_secs_f64(), "primary": id.to_string(), "epoch": status.epoch,
                "events": last,
            }));
        }
    }

    /// Whether something has happened: every loss begins an epoch, and so does the protection after it.
    fn take(&mut self, id: SiteId, status: &Status) -> bool {
        let ms = status.lag.ms;
        self.lag
            .record((ms * 1e6) as u64)
            .expect("it grows as needed");
        self.lag_most_ms = self.lag_most_ms.max(status.lag.most_ms).max(ms);
        self.mbit.push(status.log_mbit_s);
        self.unprotected += u64::from(!status.protected);
        let (moved, is_new) = (id != self.primary, status.epoch > self.epoch);
        // It may have been replaced between two looks.
        let lost = is_new && !moved && self.protected;
        (self.primary, self.epoch, self.protected) = (id, status.epoch, status.protected);
        self.failovers += u64::from(moved);
        self.backups_lost += u64::from(lost);
        moved || is_new
    }

    pub(super) fn report(&self, report: &mut Report) {
        report.push(Measure::count("false_failovers", self.failovers));
        report.push(Measure::count("false_backups_lost", self.backups_lost));
        report.push(Measure::count("divergences", self.divergences));
        let share = |part: u64| 100.0 * part as f64 / self.looks.max(1) as f64;
        report.push(Measure::value("unprotected", "%", share(self.unprotected)));
        report.push(Measure::value("unanswered", "%", share(self.unanswered)));
        let lag = Measure::milliseconds("lag", &self.lag);
        report.push(lag.noted("run time that the backup has yet to run"));
        report.push(Measure::value("lag_most", "ms", self.lag_most_ms));
        report.push(Measure::of_runs("log_mbit", "Mbit/s", &self.mbit));
        report.detail("incidents", self.incidents.clone().into());
        let failures = [
            (self.failovers, "failovers of a live primary"),
            (self.backups_lost, "live backups given up"),
            (self.divergences, "replicas went another way"),
        ];
        for (count, what) in failures.into_iter().filter(|(count, _)| *count > 0) {
            report.fail(format!("{count} {what}"));
        }
    }
}

impl std::fmt::Display for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} failovers, {} backups lost, {} divergences, lag at most {:.0} ms",
            self.failovers, self.backups_lost, self.divergences, self.lag_most_ms
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_are_told_apart_by_who_is_primary_after_them() {
        let [a, b, _] = SITES;
        let status = |epoch, protected| Status {
            epoch: Some(epoch),
            protected,
            ..Status::default()
        };
        let mut watch = Watch::new(&(a, status(2, true)));
        assert!(!watch.take(a, &status(2, true)));
        // The backup is lost, and replaced.
        assert!(watch.take(a, &status(3, false)));
        assert!(watch.take(a, &status(4, true)));
        // The primary.
        assert!(watch.take(b, &status(5, false)));
        assert!(watch.take(b, &status(6, true)));
        assert_eq!((watch.failovers, watch.backups_lost), (1, 1));
        // A loss that was over before anybody looked.
        assert!(watch.take(b, &status(8, true)));
        assert_eq!((watch.failovers, watch.backups_lost), (1, 2));
        assert_eq!((watch.looks, watch.unprotected), (0, 2));
    }
}
