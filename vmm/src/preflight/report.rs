//! Findings, and how they are printed.

use std::fmt::Write as _;

use hypervisor::probe::HostProfile;
use serde::Serialize;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Status {
    /// As it should be.
    Ok,
    /// Works, with a drawback.
    Warn,
    /// Pollux cannot do without it.
    Missing,
}

impl Status {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Missing => "MISSING",
        }
    }
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    /// What it belongs to.
    pub(super) area: &'static str,
    /// What was looked at.
    pub(super) name: &'static str,
    pub(super) status: Status,
    /// What was found.
    pub(super) finding: String,
    /// What that means for the user.
    pub(super) meaning: &'static str,
    /// What to do about it; nothing if all is well or nothing helps.
    pub(super) remedy: Option<&'static str>,
}

impl Finding {
    pub(super) fn ok(
        area: &'static str,
        name: &'static str,
        finding: impl Into<String>,
        meaning: &'static str,
    ) -> Self {
        Self {
            area,
            name,
            status: Status::Ok,
            finding: finding.into(),
            meaning,
            remedy: None,
        }
    }

    pub(super) fn warn(
        area: &'static str,
        name: &'static str,
        finding: impl Into<String>,
        meaning: &'static str,
        remedy: &'static str,
    ) -> Self {
        let remedy = Some(remedy);
        Self {
            area,
            name,
            status: Status::Warn,
            finding: finding.into(),
            meaning,
            remedy,
        }
    }

    pub(super) fn missing(
        area: &'static str,
        name: &'static str,
        finding: impl Into<String>,
        meaning: &'static str,
        remedy: &'static str,
    ) -> Self {
        let remedy = Some(remedy);
        Self {
            area,
            name,
            status: Status::Missing,
            finding: finding.into(),
            meaning,
            remedy,
        }
    }
}

/// Everything that was found.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Whether nothing is missing.
    usable: bool,
    kernel: String,
    findings: Vec<Finding>,
    /// What the probes of KVM have measured, for programs.
    profile: Option<HostProfile>,
}

/// Column at which findings begin.
const INDENT: usize = 34;
/// Narrowest text that is still wrapped.
const MIN_TEXT_COLUMNS: usize = 30;

impl Report {
    pub(super) fn new(
        kernel: String,
        findings: Vec<Finding>,
        profile: Option<HostProfile>,
    ) -> Self {
        let usable = findings
            .iter()
            .all(|finding| finding.status != Status::Missing);
        Self {
            usable,
            kernel,
            findings,
            profile,
        }
    }

    pub(super) fn is_usable(&self) -> bool {
        self.usable
    }

    pub(super) fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("only strings, numbers and plain structures")
    }

    /// The table, wrapped to so many columns.
    pub(super) fn to_table(&self, columns: usize) -> String {
        let width = columns.saturating_sub(INDENT).max(MIN_TEXT_COLUMNS);
        let mut table = format!("Kernel {}\n", self.kernel);
        let longest = self
            .findings
            .iter()
            .map(|one| one.name.chars().count())
            .max();
        assert!(
            longest.is_none_or(|name| name + 11 <= INDENT),
            "the names' column is too narrow"
        );
        let mut area = "";
        for finding in &self.findings {
            if finding.area != area {
                area = finding.area;
                let _ = writeln!(table, "\n{area}");
            }
            let head = format!("  {:<8}{}", finding.status.word(), finding.name);
            push_wrapped(&mut table, &head, &finding.finding, width);
            push_wrapped(&mut table, "", finding.meaning, width);
            if let Some(remedy) = finding.remedy {
                push_wrapped(&mut table, "", &format!("→ {remedy}"), width);
            }
        }
        let count = |status| {
            self.findings
                .iter()
                .filter(|one| one.status == status)
                .count()
        };
        let _ = writeln!(
            table,
            "\n{} ok, {} warnings, {} missing: {}",
            count(Status::Ok),
            count(Status::Warn),
            count(Status::Missing),
            if self.usable {
                "this host can run Pollux"
            } else {
                "this host cannot run Pollux"
            }
        );
        table
    }
}

/// Appends `text` in lines of `width` characters, the first one behind `head`.
fn push_wrapped(table: &mut String, head: &str, text: &str, width: usize) {
    let mut line = String::new();
    let mut head = head;
    let mut flush = |line: &mut String| {
        let _ = writeln!(table, "{head:<INDENT$}{line}");
        head = "";
        line.clear();
    };
    for word in text.split_whitespace() {
        if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > width {
            flush(&mut line);
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    flush(&mut line);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(statuses: &[Status]) -> Report {
        let findings = statuses.iter().map(|status| Finding {
            area: "Area",
            name: "thing",
            status: *status,
            finding: "one two three four five six seven eight nine ten eleven twelve".into(),
            meaning: "what it means",
            remedy: (*status != Status::Ok).then_some("do this"),
        });
        Report::new("6.1.0".into(), findings.collect(), None)
    }

    #[test]
    fn only_what_is_missing_makes_a_host_unusable() {
        assert!(report(&[]).is_usable());
        assert!(report(&[Status::Ok, Status::Warn]).is_usable());
        assert!(!report(&[Status::Ok, Status::Missing, Status::Warn]).is_usable());
    }

    #[test]
    fn table_is_wrapped_and_names_everything_once() {
        let table = report(&[Status::Ok, Status::Missing]).to_table(70);
        assert!(
            table.lines().all(|line| line.chars().count() <= 70),
            "{table}"
        );
        assert_eq!(table.matches("Area").count(), 1);
        assert_eq!(table.matches("what it means").count(), 2);
        assert_eq!(table.matches("→ do this").count(), 1);
        assert!(table.contains("  MISSING thing"), "{table}");
        assert!(table.ends_with("1 ok, 0 warnings, 1 missing: this host cannot run Pollux\n"));
    }

    #[test]
    fn table_stays_readable_without_a_terminal_width() {
        for columns in [0, 10, 1000] {
            let table = report(&[Status::Warn]).to_table(columns);
            assert!(
                table.contains("eleven") && table.contains("twelve"),
                "{table}"
            );
        }
    }

    #[test]
    fn json_carries_every_field() {
        let json: serde_json::Value =
            serde_json::from_str(&report(&[Status::Warn]).to_json()).unwrap();
        assert_eq!(json["usable"], true);
        assert_eq!(json["kernel"], "6.1.0");
        assert_eq!(json["findings"][0]["status"], "warn");
        assert_eq!(json["findings"][0]["remedy"], "do this");
        assert!(json["profile"].is_null());
    }
}
