//! The end of the demo: what was checked, and what each loss looked like from outside.

use std::fmt::Write as _;

use hdrhistogram::Histogram;

use crate::kv_check::Outcome;
use crate::report::{Measure, Report};
use crate::stage::SiteId;
use crate::stage::takeover::{Redundancy, Takeover};
use crate::wire;

/// The loss of a host.
pub(super) struct Loss {
    pub(super) of: SiteId,
    pub(super) takeover: Takeover,
    /// From the last frame of the old primary to the first of the new, in ms.
    pub(super) silence_ms: Option<f64>,
    pub(super) redundancy: Redundancy,
}

/// See the module.
pub(super) struct Summary {
    pub(super) outcome: Outcome,
    pub(super) wire: wire::Verdict,
    pub(super) losses: Vec<Loss>,
}

impl Summary {
    /// Adds all of it to the report.
    pub(super) fn report(&self, report: &mut Report) {
        self.outcome.report(report);
        self.wire.report(report);
        let of = |name: &str, ms: &mut dyn Iterator<Item = f64>| {
            let mut all = Histogram::<u64>::new(3).expect("3 digits are legal");
            ms.for_each(|ms| all.record((ms * 1e6) as u64).expect("it grows as needed"));
            Measure::milliseconds(name, &all)
        };
        let losses = || self.losses.iter();
        report.push(of("pause_host", &mut losses().map(|l| l.takeover.pause_ms)));
        report.push(of(
            "transfer_stop",
            &mut losses().filter_map(|l| l.redundancy.stop_ms),
        ));
        report.push(of(
            "redundant_again",
            &mut losses().map(|l| l.redundancy.after_ms),
        ));
        let details: Vec<serde_json::Value> = losses()
            .map(|l| {
                serde_json::json!({
                    "lost": l.of.to_string(),
                    "takeover": l.takeover,
                    "silence_ms": l.silence_ms,
                    "redundancy": l.redundancy,
                })
            })
            .collect();
        report.detail("losses", details.into());
        for loss in losses() {
            report.remark(loss.to_string());
        }
    }
}

impl std::fmt::Display for Loss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Takeover { to, pause_ms, .. } = &self.takeover;
        let mut line = format!(
            "{} lost, {to} goes on; longest pause {pause_ms:.0} ms",
            self.of
        );
        if let Some(silence) = self.silence_ms {
            let _ = write!(line, ", {silence:.0} ms without a frame");
        }
        if let Some(noticed) = self.takeover.noticed_ms {
            let _ = write!(line, "; noticed after {noticed:.0} ms");
        }
        for part in &self.takeover.timeline {
            let _ = write!(line, ", {} +{:.1}", part.name, part.ms);
        }
        let again = &self.redundancy;
        let _ = write!(line, "; redundant again after {:.0} ms", again.after_ms);
        if let Some(backup) = &again.backup {
            let _ = write!(line, " on {backup}");
        }
        if let (Some(stop), Some(total)) = (again.stop_ms, again.transfer_ms) {
            let _ = write!(line, " (transfer {total:.0} ms, the VM stood {stop:.1} ms)");
        }
        f.write_str(&line)
    }
}
