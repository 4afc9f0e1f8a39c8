//! Figures of the runs, by name, in the order in which they first came.

use hdrhistogram::Histogram;

use crate::report::{Measure, Report};

/// What a name stands for.
enum Figures {
    /// Distributions of nanoseconds, one a run.
    Times(Vec<Histogram<u64>>),
    /// One value a run, and its unit.
    Values(&'static str, Vec<f64>),
}

struct Named {
    name: String,
    figures: Figures,
    baseline: Option<&'static str>,
    note: Option<String>,
}

/// See the module.
#[derive(Default)]
pub(super) struct Series {
    all: Vec<Named>,
}

impl Series {
    fn named(&mut self, name: &str, empty: impl FnOnce() -> Figures) -> &mut Named {
        let at = self.all.iter().position(|named| named.name == name);
        let at = at.unwrap_or_else(|| {
            self.all.push(Named {
                name: name.to_owned(),
                figures: empty(),
                baseline: None,
                note: None,
            });
            self.all.len() - 1
        });
        &mut self.all[at]
    }

    /// Adds a run's times in nanoseconds.
    pub(super) fn times(&mut self, name: &str, run: Histogram<u64>) -> About<'_> {
        let named = self.named(name, || Figures::Times(Vec::new()));
        if let Figures::Times(runs) = &mut named.figures {
            runs.push(run);
        }
        About(named)
    }

    /// Adds a run's value.
    pub(super) fn value(&mut self, name: &str, unit: &'static str, run: f64) -> About<'_> {
        let named = self.named(name, || Figures::Values(unit, Vec::new()));
        if let Figures::Values(_, runs) = &mut named.figures {
            runs.push(run);
        }
        About(named)
    }

    /// All figures, with their ratios to their baselines.
    pub(super) fn report(&self, report: &mut Report) {
        for named in &self.all {
            let mut measure = named.measure();
            if let Some(baseline) = named.baseline
                && let Some(base) = self.all.iter().find(|other| other.name == baseline)
            {
                measure = measure.against(baseline, &base.measure());
            }
            report.push(measure);
        }
    }
}

impl Named {
    fn measure(&self) -> Measure {
        let measure = match &self.figures {
            Figures::Times(runs) => Measure::microseconds_of_runs(&self.name, runs),
            Figures::Values(unit, runs) => Measure::of_runs(&self.name, unit, runs),
        };
        match &self.note {
            Some(note) => measure.noted(note),
            None => measure,
        }
    }
}

/// What more there is to say of a figure.
pub(super) struct About<'a>(&'a mut Named);

impl About<'_> {
    pub(super) fn against(self, baseline: &'static str) -> Self {
        self.0.baseline = Some(baseline);
        self
    }

    pub(super) fn noted(self, note: &str) -> Self {
        self.0.note = Some(note.to_owned());
        self
    }
}

/// An empty histogram of nanoseconds.
pub(super) fn histogram() -> Histogram<u64> {
    Histogram::new(3).expect("3 digits are legal")
}

/// Adds one time.
pub(super) fn record(histogram: &mut Histogram<u64>, ns: u64) {
    histogram.record(ns.max(1)).expect("grows as it needs");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_compared_with_its_baseline_wherever_that_came() {
        let mut series = Series::default();
        for run in [10.0, 20.0, 30.0] {
            series.value("own", "MB/s", run).against("base");
            series.value("base", "MB/s", 2.0 * run);
        }
        let mut report = Report::new("channel");
        series.report(&mut report);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["results"][0]["name"], "own");
        assert_eq!(json["results"][0]["ratio"], 0.5);
        assert_eq!(json["results"][1]["spread"][2], 60.0);
    }
}
