//! Status, limits and events for people.

use std::fmt::Write;

use crate::api::{EventRecord, Limits, Severity, StatusReport};

/// Width of the left column.
const LABEL: usize = 14;

struct Table(String);

impl Table {
    fn row(&mut self, label: &str, value: impl std::fmt::Display) {
        let _ = writeln!(self.0, "{label:LABEL$}{value}");
    }
}

/// The status as a table, at this time in ms since 1970.
pub(super) fn status(report: &StatusReport, now_unix_ms: u64) -> String {
    let mut table = Table(String::new());
    table.row("role", role(report));
    let paused = if report.paused { ", paused" } else { "" };
    table.row("state", format!("{}{paused}", report.state));
    if let Some(host) = report.host {
        let up = span(report.uptime_s);
        table.row(
            "host",
            format!("{host}, up {up}, version {}", report.version),
        );
    }
    if let Some(epoch) = report.epoch {
        table.row("epoch", epoch);
    }
    table.row(
        "guest",
        format!(
            "{} exits, {} of its time",
            count(report.exits),
            span(report.virtual_time_s)
        ),
    );
    session(&mut table, report);
    for (n, standby) in report.standbys.iter().enumerate() {
        let label = if n == 0 { "standbys" } else { "" };
        table.row(
            label,
            format!(
                "{:12} {:24} {}",
                standby.host, standby.address, standby.state
            ),
        );
    }
    history(&mut table, report, now_unix_ms);
    for (n, advice) in report.advice.iter().enumerate() {
        table.row(if n == 0 { "TO DO" } else { "" }, advice);
    }
    table.0
}

fn role(report: &StatusReport) -> String {
    let peer = match (report.peer, report.role.name()) {
        (Some(peer), "primary") => format!(", backup {peer}"),
        (Some(peer), "backup") => format!(" of {peer}"),
        _ => String::new(),
    };
    let protected = match (report.role.name(), report.protected) {
        ("primary", true) => ", PROTECTED",
        ("primary", false) => ", NOT PROTECTED",
        ("backup", true) => ", ready to take over",
        ("backup", false) => ", not ready to take over",
        _ => "",
    };
    format!("{}{peer}{protected}", report.role.name())
}

/// What concerns the session with the other host.
fn session(table: &mut Table, report: &StatusReport) {
    let output = &report.output;
    let oldest = if output.held == 0 {
        String::new()
    } else {
        format!(", the oldest for {:.1} ms", output.oldest_ms)
    };
    table.row(
        "output",
        format!(
            "{} held{oldest}; {} released",
            output.held,
            count(output.released)
        ),
    );
    if report.peer.is_none() {
        return;
    }
    table.row(
        "lag",
        format!(
            "{} exits, {:.1} ms (at most {:.1} ms); the guest may run {:.0} % of its time, held {} ms so far",
            count(report.lag.exits),
            report.lag.ms,
            report.lag.most_ms,
            report.pacing.share * 100.0,
            count(report.pacing.held_ms as u64)
        ),
    );
    if let Some(ack) = report.ack_us {
        table.row(
            "ACK",
            format!("p50 {:.0} us, p99 {:.0} us", ack.p50, ack.p99),
        );
    }
    table.row("log", format!("{:.2} Mbit/s", report.log_mbit_s));
}

fn history(table: &mut Table, report: &StatusReport, now_unix_ms: u64) {
    if let Some(failover) = &report.last_failover {
        let ago = now_unix_ms.saturating_sub(failover.at_unix_ms) as f64 / 1e3;
        table.row(
            "last failover",
            format!(
                "{} ({} ago): {:.1} ms, because {}",
                utc(failover.at_unix_ms),
                span(ago),
                failover.total_ms,
                failover.cause
            ),
        );
        let parts: Vec<String> = failover
            .timeline
            .iter()
            .map(|part| format!("{} at {:.1}", part.name, part.ms))
            .collect();
        if !parts.is_empty() {
            table.row("", format!("{} ms", parts.join(", ")));
        }
    }
    if let Some(transfer) = &report.last_transfer {
        let with = transfer
            .peer
            .map_or(String::new(), |peer| format!("with {peer}: "));
        table.row(
            "last transfer",
            format!(
                "{with}{:.1} MiB in {}, the VM stopped for {:.1} ms",
                transfer.bytes as f64 / f64::from(1 << 20),
                span(transfer.total_ms / 1e3),
                transfer.stop_ms
            ),
        );
    }
    if let Some(beats) = &report.heartbeats {
        let reason = match beats.reason.as_str() {
            "" => String::new(),
            reason => format!(" ({reason})"),
        };
        table.row(
            "heartbeats",
            format!("answered by {}{reason}", beats.answered_by),
        );
    }
    table.row("divergences", report.divergences);
    if report.quarantine {
        table.row(
            "quarantine",
            "sectors are read from side files, until late writes are impossible",
        );
    }
}

/// The limits as a table.
pub(super) fn limits(limits: &Limits) -> String {
    // Their names are those of the API, so that what is shown can be set.
    let value = serde_json::to_value(limits).expect("limits are numbers and words");
    let mut text = String::new();
    for (name, value) in value.as_object().into_iter().flatten() {
        let shown = value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned);
        let _ = writeln!(text, "--{:18} {shown}", name.replace('_', "-"));
    }
    text
}

/// One event as a line.
pub(super) fn event(event: &EventRecord) -> String {
    let severity = match event.severity {
        Severity::Info => "info",
        Severity::Warning => "WARNING",
        Severity::Error => "ERROR",
    };
    let at = utc(event.at_unix_ms);
    format!("{at} {severity:7} {:20} {}", event.kind, event.message)
}

/// A count with its thousands apart.
fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A span of time, for people.
fn span(seconds: f64) -> String {
    let whole = seconds.max(0.0) as u64;
    match whole {
        0..60 => format!("{seconds:.1} s"),
        60..3_600 => format!("{} min {} s", whole / 60, whole % 60),
        3_600..86_400 => format!("{} h {} min", whole / 3_600, whole / 60 % 60),
        _ => format!("{} d {} h", whole / 86_400, whole / 3_600 % 24),
    }
}

/// A time in ms since 1970 as RFC 3339, in UTC.
fn utc(unix_ms: u64) -> String {
    let (seconds, ms) = (unix_ms / 1000, unix_ms % 1000);
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms": years begin in March, eras have
    // 400 years.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{ms:03}Z",
        second / 3_600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{
        Failover, Lag, Output, Pacing, Part, Quantiles, Role, StandbyReport, Transfer,
    };

    fn report() -> StatusReport {
        StatusReport {
            version: "0.1.0".to_owned(),
            role: Role::Primary,
            state: "Protected".to_owned(),
            paused: false,
            host: "castor".parse().ok(),
            epoch: Some(7),
            peer: "pollux".parse().ok(),
            protected: true,
            lag: Lag {
                exits: 1234,
                ms: 4.06,
                most_ms: 61.5,
            },
            pacing: Pacing {
                share: 0.95,
                held_ms: 1312.4,
            },
            output: Output {
                held: 3,
                oldest_ms: 0.41,
                released: 1_203_310,
            },
            ack_us: Some(Quantiles {
                p50: 92.4,
                p99: 240.0,
            }),
            log_mbit_s: 12.345,
            exits: 999,
            virtual_time_s: 183.2,
            standbys: vec![StandbyReport {
                host: "helen".parse().unwrap(),
                address: "192.0.2.3:7700".to_owned(),
                state: "ready".to_owned(),
            }],
            last_failover: Some(Failover {
                cause: "its VMM died".to_owned(),
                at_unix_ms: 1_700_000_000_123,
                total_ms: 41.2,
                timeline: [("drained", 3.06), ("won", 15.0), ("live", 41.2)]
                    .map(|(name, ms)| Part {
                        name: name.to_owned(),
                        ms,
                    })
                    .to_vec(),
            }),
            last_transfer: Some(Transfer {
                peer: "pollux".parse().ok(),
                bytes: 201 << 20,
                stop_ms: 38.04,
                total_ms: 2_100.0,
            }),
            uptime_s: 192.0,
            quarantine: true,
            advice: vec!["start a third host".to_owned()],
            ..StatusReport::default()
        }
    }

    #[test]
    fn a_person_can_read_the_status() {
        let shown = status(&report(), 1_700_000_060_123);
        let expected = "\
role          primary, backup pollux, PROTECTED
state         Protected
host          castor, up 3 min 12 s, version 0.1.0
epoch         7
guest         999 exits, 3 min 3 s of its time
output        3 held, the oldest for 0.4 ms; 1,203,310 released
lag           1,234 exits, 4.1 ms (at most 61.5 ms); the guest may run 95 % of its time, held 1,312 ms so far
ACK           p50 92 us, p99 240 us
log           12.35 Mbit/s
standbys      helen        192.0.2.3:7700           ready
last failover 2023-11-14T22:13:20.123Z (1 min 0 s ago): 41.2 ms, because its VMM died
              drained at 3.1, won at 15.0, live at 41.2 ms
last transfer with pollux: 201.0 MiB in 2.1 s, the VM stopped for 38.0 ms
divergences   0
quarantine    sectors are read from side files, until late writes are impossible
TO DO         start a third host
";
        assert_eq!(shown, expected);
    }

    #[test]
    fn what_is_not_there_is_not_shown() {
        let shown = status(&StatusReport::default(), 0);
        for absent in ["host ", "epoch", "lag", "last", "TO DO", "quarantine"] {
            assert!(!shown.contains(absent), "{absent}:\n{shown}");
        }
        let alone = StatusReport {
            role: Role::Primary,
            ..StatusReport::default()
        };
        assert!(status(&alone, 0).contains("NOT PROTECTED"));
    }

    #[test]
    fn limits_are_shown_as_they_are_set() {
        use clap::Parser;
        #[derive(Parser)]
        struct Line {
            #[command(flatten)]
            change: crate::api::LimitsChange,
        }
        let limits = Limits::default();
        let shown = super::limits(&limits);
        let words = std::iter::once("ctl").chain(shown.split_whitespace());
        let change = Line::try_parse_from(words)
            .map_err(|e| e.to_string())
            .unwrap()
            .change;
        assert_eq!(change.apply(&limits).unwrap(), limits);
        assert!(change.spin_permille.is_some() && change.ack_at.is_some());
    }

    #[test]
    fn dates_are_right_at_the_seams_of_the_calendar() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, "2000-02-28T23:59:59.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (951_868_800, "2000-03-01T00:00:00.000Z"),
            (4_107_542_399, "2100-02-28T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(utc(seconds * 1000), expected);
        }
    }

    #[test]
    fn counts_and_spans_are_readable() {
        for (n, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (1_234_567, "1,234,567"),
        ] {
            assert_eq!(count(n), text);
        }
        for (s, text) in [(0.0, "0.0 s"), (59.94, "59.9 s"), (3_599.0, "59 min 59 s")] {
            assert_eq!(span(s), text);
        }
        assert_eq!(
            (span(90_000.0), span(7_260.0)),
            ("1 d 1 h".into(), "2 h 1 min".into())
        );
    }
}
