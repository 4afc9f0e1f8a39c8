//! What a benchmark prints: one JSON object for machines, or a table for people.
//!
//! The names of results are stable, so that figures can be followed over time. Every baseline is a
//! result of its own in the same object.

use std::fmt::Write as _;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::machine::Machine;

/// One run of one benchmark.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) bench: &'static str,
    pub(crate) revision: String,
    pub(crate) machine: Machine,
    pub(crate) runs: u64,
    pub(crate) seconds: f64,
    pub(crate) complete: bool,
    pub(crate) results: Vec<Measure>,
}

/// One result: a distribution or a single value.
#[derive(Debug, Default, Serialize)]
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
    /// Lowest, middle and highest of the runs' medians.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) spread: Option<[f64; 3]>,
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
        let at = |quantile| Some(rounded(histogram.value_at_quantile(quantile) as f64 / by));
        Self {
            name: name.into(),
            unit,
            n: Some(histogram.len()),
            p50: at(0.5),
            p99: at(0.99),
            p999: at(0.999),
            max: Some(rounded(histogram.max() as f64 / by)),
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

fn line(columns: &[String; 8]) -> String {
    let [name, unit, rest @ ..] = columns;
    let rest: String = rest.iter().map(|c| format!(" {c:>10}")).collect();
    format!("{name:28} {unit:6}{rest}\n")
}

/// To four significant digits: the rest is noise.
fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let scale = 10_f64.powf(3.0 - value.abs().log10().floor());
    (value * scale).round() / scale
}

impl Report {
    /// As a table.
    pub(crate) fn table(&self) -> String {
        let mut text =
            line(&["", "", "n", "p50", "p99", "p99.9", "max", "ratio"].map(str::to_owned));
        for m in &self.results {
            let number = |value: Option<f64>| value.map_or_else(String::new, |v| v.to_string());
            text += &line(&[
                m.name.clone(),
                m.unit.to_owned(),
                m.n.map_or_else(String::new, |n| n.to_string()),
                number(m.p50.or(m.value)),
                number(m.p99),
                number(m.p999),
                number(m.max),
                number(m.ratio_p50.or(m.ratio)),
            ]);
            if let Some(note) = &m.note {
                let _ = writeln!(text, "    {note}");
            }
        }
        let _ = writeln!(
            text,
            "{} runs, {:.1} s, {}",
            self.runs, self.seconds, self.revision
        );
        text
    }
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
}
