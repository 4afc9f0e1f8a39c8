//! What people read at the end of the demo.

use std::fmt::Write as _;

use super::summary::{Loss, Summary};
use crate::kv_check::Live;

/// The page.
pub(super) fn page(summary: &Summary) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write(&mut text, summary);
    text
}

fn write(to: &mut String, summary: &Summary) -> std::fmt::Result {
    let Summary {
        outcome,
        wire,
        losses,
    } = summary;
    let verdict = &outcome.verdict;
    writeln!(to, "\nA VM that outlived {} hosts", losses.len())?;
    writeln!(to, "══════════════════════════")?;
    let mut line = |name: &str, value: u64, what: &str| {
        writeln!(to, "  {name:<26}{:>9}   {what}", grouped(value))
    };
    line(
        "answers checked",
        outcome.answers,
        "against all others: as of one copy of the data",
    )?;
    line(
        "  lost",
        verdict.lost,
        "writes that were acknowledged and gone afterwards",
    )?;
    line(
        "  contradictory",
        verdict.contradictory,
        "answers that no order of the requests explains",
    )?;
    line(
        "client connections",
        outcome.longest_gaps.len() as u64,
        "opened once, before the first loss",
    )?;
    line("  broken", outcome.broken.len() as u64, "")?;
    line(
        "frames of the guest",
        wire.frames,
        "seen on the client's network",
    )?;
    line(
        "  of a second primary",
        wire.double_primary,
        "sent by a host that had been replaced",
    )?;
    let divergences: u64 = losses.iter().map(|l| l.redundancy.divergences).sum();
    line(
        "divergences",
        divergences,
        "replicas that went another way than the primary",
    )?;

    writeln!(
        to,
        "\n  lost   goes on   no answer   longest wait     VM stood still   redundant"
    )?;
    writeln!(
        to,
        "  host   on        at all      of a request     for the copy     again after"
    )?;
    writeln!(
        to,
        "  ──────────────────────────────────────────────────────────────────────────"
    )?;
    for loss in losses {
        row(to, loss)?;
    }
    for loss in losses {
        timeline(to, loss)?;
    }
    let slow = outcome.latency.value_at_quantile(0.5) as f64 / 1e6;
    writeln!(
        to,
        "\n  The client asked {:.0} times a second; half of the answers took less than {}.",
        outcome.rate(),
        time(slow)
    )?;
    writeln!(
        to,
        "  The wait of a request holds the guest's own time for it, which the load makes long.\n"
    )
}

fn row(to: &mut String, loss: &Loss) -> std::fmt::Result {
    let (takeover, again) = (&loss.takeover, &loss.redundancy);
    writeln!(
        to,
        "  {:<6} {:<9} {:<11} {:<16} {:<16} {}{}",
        loss.of,
        takeover.to,
        time(takeover.pause_ms),
        time(takeover.wait_ms),
        again.stop_ms.map_or_else(|| "?".to_owned(), time),
        time(again.after_ms),
        again
            .backup
            .as_ref()
            .map_or_else(String::new, |host| format!(", with {host}")),
    )
}

fn timeline(to: &mut String, loss: &Loss) -> std::fmt::Result {
    let takeover = &loss.takeover;
    let Some(noticed) = takeover.noticed_ms else {
        return Ok(());
    };
    let cause = takeover.cause.as_deref().unwrap_or("lost");
    writeln!(to, "\n  How {} took over from {}:", takeover.to, loss.of)?;
    writeln!(
        to,
        "  {:>10}  host {} is cut off and killed",
        time(0.0),
        loss.of
    )?;
    writeln!(to, "  {:>10}  noticed: {cause}", time(noticed))?;
    for part in &takeover.timeline {
        writeln!(to, "  {:>10}  {}", time(noticed + part.ms), part.name)?;
    }
    Ok(())
}

/// A time in ms, as people read it.
fn time(ms: f64) -> String {
    match ms {
        ms if ms >= 1e4 => format!("{:.0} s", ms / 1e3),
        ms if ms >= 1e3 => format!("{:.1} s", ms / 1e3),
        ms if ms >= 10.0 => format!("{ms:.0} ms"),
        ms => format!("{ms:.1} ms"),
    }
}

/// A number with its thousands apart.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// One line on how the client stands, for those who look on.
pub(super) fn standing(live: &Live) -> String {
    let (lost, contradictory) = live.findings();
    format!(
        "{} answers checked so far: {lost} lost, {contradictory} contradictory, {} connections broken",
        grouped(live.answers()),
        live.broken()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_numbers_are_as_people_read_them() {
        let times = [0.62, 52.4, 1234.0, 12_345.0].map(time);
        assert_eq!(times, ["0.6 ms", "52 ms", "1.2 s", "12 s"]);
        let numbers = [7, 999, 1000, 1_234_567].map(grouped);
        assert_eq!(numbers, ["7", "999", "1,000", "1,234,567"]);
    }
}
