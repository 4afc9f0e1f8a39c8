//! The end of the demo: what was checked, and what each loss looked like from outside, as results for machines;
//! what people read is in [`super::page`].

use hdrhistogram::Histogram;

use super::page::page;
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
        report.page(page(self));
    }
}
