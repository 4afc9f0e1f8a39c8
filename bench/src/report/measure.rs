//! One result of a benchmark: a distribution, or a single value.
//!
//! What was not measured has no figure: an empty distribution has only its `n`, a ratio to 0 is left out.

use hdrhistogram::Histogram;
use serde::Serialize;

/// See the module.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Measure {
    pub(crate) name: String,
    pub(crate) unit: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) n: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) p50: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) p99: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) p999: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max: Option<f64>,
    /// Lowest, middle and highest of the runs' medians, or of the runs' values.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) spread: Option<[f64; 3]>,
    /// The same of the runs' 99th percentiles: whether a tail is one run's or every run's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) spread_p99: Option<[f64; 3]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) value: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) baseline: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ratio: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ratio_p50: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ratio_p99: Option<f64>,
    /// What a reader must know to read it right.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) note: Option<String>,
}

impl Measure {
    /// A distribution of nanoseconds, given in microseconds.
    pub(crate) fn microseconds(name: impl Into<String>, ns: &Histogram<u64>) -> Self {
        Self::scaled(name, "us", ns, 1e3)
    }

    /// A distribution of nanoseconds, given in milliseconds.
    pub(crate) fn milliseconds(name: impl Into<String>, ns: &Histogram<u64>) -> Self {
        Self::scaled(name, "ms", ns, 1e6)
    }

    fn scaled(
        name: impl Into<String>,
        unit: &'static str,
        histogram: &Histogram<u64>,
        by: f64,
    ) -> Self {
        let figure = |ns: u64| (!histogram.is_empty()).then(|| rounded(ns as f64 / by));
        let at = |quantile| figure(histogram.value_at_quantile(quantile));
        Self {
            name: name.into(),
            unit,
            n: Some(histogram.len()),
            p50: at(0.5),
            p99: at(0.99),
            p999: at(0.999),
            max: figure(histogram.max()),
            ..Self::default()
        }
    }

    /// A single value.
    pub(crate) fn value(name: impl Into<String>, unit: &'static str, value: f64) -> Self {
        Self {
            name: name.into(),
            unit,
            value: Some(rounded(value)),
            ..Self::default()
        }
    }

    /// A number of things.
    pub(crate) fn count(name: impl Into<String>, count: u64) -> Self {
        Self {
            // Not rounded: that one of a million is lost must show.
            value: Some(count as f64),
            ..Self::value(name, "1", 0.0)
        }
    }

    /// The median of one value of each run, and the spread.
    pub(crate) fn of_runs(name: impl Into<String>, unit: &'static str, runs: &[f64]) -> Self {
        let spread = spread(runs);
        Self {
            name: name.into(),
            unit,
            value: spread.map(|s| s[1]),
            spread,
            ..Self::default()
        }
    }

    /// The distribution over all runs, in microseconds, with the spread of the runs' medians.
    pub(crate) fn microseconds_of_runs(name: impl Into<String>, runs: &[Histogram<u64>]) -> Self {
        let mut all = Histogram::new(3).expect("3 digits are legal");
        let (mut medians, mut tails) = (Vec::new(), Vec::new());
        for run in runs.iter().filter(|run| !run.is_empty()) {
            all.add(run).expect("grows as it needs");
            medians.push(run.value_at_quantile(0.5) as f64 / 1e3);
            tails.push(run.value_at_quantile(0.99) as f64 / 1e3);
        }
        Self {
            spread: spread(&medians),
            spread_p99: spread(&tails),
            ..Self::microseconds(name, &all)
        }
    }

    pub(crate) fn noted(mut self, note: impl Into<String>) -> Self {
        self.note = Some(note.into());
        self
    }

    /// Names the baseline, which must be a distribution or value in the same unit.
    pub(crate) fn against(mut self, name: &'static str, baseline: &Self) -> Self {
        let ratio = |own: Option<f64>, base: Option<f64>| match (own, base) {
            (Some(own), Some(base)) if base != 0.0 => Some(rounded(own / base)),
            _ => None,
        };
        self.baseline = Some(name);
        self.ratio = ratio(self.value, baseline.value);
        self.ratio_p50 = ratio(self.p50, baseline.p50);
        self.ratio_p99 = ratio(self.p99, baseline.p99);
        self
    }
}

/// Lowest, middle and highest.
fn spread(values: &[f64]) -> Option<[f64; 3]> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let highest = *sorted.last()?;
    let middle = sorted[(sorted.len() - 1) / 2];
    Some([sorted[0], middle, highest].map(rounded))
}

/// To four significant digits: the rest is noise.
fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let scale = 10_f64.powf(3.0 - value.abs().log10().floor());
    (value * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    fn histogram(values: &[u64]) -> Histogram<u64> {
        let mut histogram = Histogram::new(3).unwrap();
        for value in values {
            histogram.record(*value).unwrap();
        }
        histogram
    }

    #[test]
    fn ratios_are_of_like_with_like() {
        let base = Measure::microseconds("base", &histogram(&[1_000, 2_000]));
        let own = Measure::microseconds("own", &histogram(&[3_000, 4_000])).against("base", &base);
        let close =
            |value: Option<f64>, to: f64| value.is_some_and(|v| (v / to - 1.0).abs() < 0.01);
        assert!(close(own.p50, 3.0) && close(own.max, 4.0), "{own:?}");
        assert!(close(own.ratio_p50, 3.0), "{own:?}");
        assert_eq!((own.n, own.ratio), (Some(2), None));
        let value =
            Measure::value("v", "1/s", 30.0).against("w", &Measure::value("w", "1/s", 20.0));
        assert_eq!(value.ratio, Some(1.5));
    }

    #[test]
    fn absent_fields_are_left_out_of_the_json() {
        let json = serde_json::to_string(&Measure::value("lost", "1", 0.0)).unwrap();
        assert_eq!(json, r#"{"name":"lost","unit":"1","value":0.0}"#);
    }

    #[test]
    fn four_digits_are_kept() {
        assert_eq!(rounded(123_456.0), 123_500.0);
        assert_eq!(rounded(0.001_234_56), 0.001_235);
        assert_eq!(rounded(0.0), 0.0);
    }

    #[test]
    fn nothing_measured_gives_no_figures() {
        let empty = Measure::milliseconds("pause", &histogram(&[]));
        assert_eq!((empty.n, empty.p50, empty.max), (Some(0), None, None));
        assert_eq!(Measure::of_runs("x", "us", &[]).value, None);
        assert_eq!(Measure::of_runs("x", "us", &[]).spread, None);
    }

    #[test]
    fn runs_give_their_spread() {
        let of_runs = Measure::of_runs("x", "MB/s", &[3.0, 1.0, 2.0]);
        assert_eq!(
            (of_runs.value, of_runs.spread),
            (Some(2.0), Some([1.0, 2.0, 3.0]))
        );
        let runs = [
            histogram(&[1_000]),
            histogram(&[]),
            histogram(&[3_000, 3_000]),
        ];
        let of_runs = Measure::microseconds_of_runs("ack", &runs);
        assert_eq!(
            (of_runs.n, of_runs.p50),
            (Some(3), of_runs.spread.map(|s| s[2]))
        );
    }

    #[test]
    fn counts_are_exact() {
        assert_eq!(
            Measure::count("answers", 1_234_567).value,
            Some(1_234_567.0)
        );
    }
}
