//! A report as a table for people.

use std::fmt::Write as _;

use super::Report;

fn line(columns: &[String; 8]) -> String {
    let [name, unit, rest @ ..] = columns;
    let rest: String = rest.iter().map(|c| format!(" {c:>10}")).collect();
    format!("{name:28} {unit:6}{rest}\n")
}

impl Report {
    /// As a table, or as the page that takes its place.
    pub(crate) fn table(&self) -> String {
        let mut text = self.page.clone().unwrap_or_else(|| self.results());
        for remark in &self.remarks {
            let _ = writeln!(text, "{remark}");
        }
        let _ = writeln!(
            text,
            "{} runs, {:.1} s, {}",
            self.runs, self.seconds, self.revision
        );
        for failure in &self.failures {
            let _ = writeln!(text, "FAILED: {failure}");
        }
        if !self.complete {
            text += "not complete\n";
        }
        text
    }

    fn results(&self) -> String {
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
        text
    }
}
