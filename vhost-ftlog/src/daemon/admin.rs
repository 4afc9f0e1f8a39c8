//! The operator's socket: one line of JSON in, one line of JSON out.
//!
//! `{"get":"metrics"}` answers counters, histograms by stage and the state; `{"set":{…}}` changes
//! limits by name. The data thread only copies its numbers; they are put into words here.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::engine::{Command, EngineHandle, Snapshot};
use crate::config_space::AckMode;

/// The longest line that is read, in bytes.
const MAX_LINE: u64 = 4096;
/// Powers of two of the bounds in answers: 1 us to 69 s for times.
const BUCKETS: std::ops::RangeInclusive<u32> = 10..=36;
/// A client that says nothing for this long is let go.
const IDLE_LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Ask {
    Get(What),
    Set(Change),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum What {
    Metrics,
}

/// Limits to change; the others stay.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    batch_bytes: Option<u32>,
    batch_us: Option<u32>,
    spin_us: Option<u32>,
    spin_permille: Option<u32>,
    ack_mode: Option<AckMode>,
}

/// Serves clients one after the other, for ever.
pub fn serve(listener: &UnixListener, engine: &EngineHandle) {
    for stream in listener.incoming() {
        match stream {
            Ok(stream) => {
                if let Err(error) = talk(stream, engine) {
                    tracing::debug!(%error, "admin client");
                }
            }
            Err(error) => {
                tracing::warn!(%error, "admin socket");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

fn talk(stream: UnixStream, engine: &EngineHandle) -> io::Result<()> {
    stream.set_read_timeout(Some(IDLE_LIMIT))?;
    stream.set_write_timeout(Some(IDLE_LIMIT))?;
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if reader.by_ref().take(MAX_LINE).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let answer = match serde_json::from_str(&line) {
            Ok(ask) => respond(&ask, engine),
            Err(error) => json!({ "error": error.to_string() }),
        };
        writeln!(writer, "{answer}")?;
    }
}

fn respond(ask: &Ask, engine: &EngineHandle) -> Value {
    let snapshot = match engine.ask(Command::Snapshot) {
        Ok(snapshot) => snapshot,
        Err(error) => return json!({ "error": error.to_string() }),
    };
    match ask {
        Ask::Get(What::Metrics) => words(&snapshot),
        Ask::Set(change) => {
            let mut tuning = snapshot.tuning;
            change.apply(&mut tuning);
            let told = tuning
                .validate()
                .map_err(|error| error.to_string())
                .and_then(|()| {
                    engine
                        .tell(Command::Tune(tuning))
                        .map_err(|e| e.to_string())
                });
            match told {
                Ok(()) => json!({ "tuning": tuning }),
                Err(error) => json!({ "error": error }),
            }
        }
    }
}

impl Change {
    fn apply(&self, tuning: &mut crate::config_space::Tuning) {
        let set = |to: &mut u32, from: Option<u32>| *to = from.unwrap_or(*to);
        set(&mut tuning.batch_bytes, self.batch_bytes);
        set(&mut tuning.batch_us, self.batch_us);
        set(&mut tuning.spin_us, self.spin_us);
        set(&mut tuning.spin_permille, self.spin_permille);
        tuning.ack_mode = self.ack_mode.unwrap_or(tuning.ack_mode);
    }
}

fn words(snapshot: &Snapshot) -> Value {
    let histograms = &snapshot.stats.histograms;
    json!({
        "link": snapshot.status.link,
        "received": snapshot.status.received,
        "replayed": snapshot.status.replayed,
        "queue_depth": snapshot.queue_depth,
        "delivery_backlog_bytes": snapshot.delivery_backlog,
        "tuning": snapshot.tuning,
        "counters": snapshot.stats.counters,
        "stages_ns": {
            "queued": quantiles(&histograms.queued),
            "sent": quantiles(&histograms.sent),
            "acknowledged": quantiles(&histograms.acknowledged),
            "seen": quantiles(&histograms.seen),
        },
        "batch_appends": quantiles(&histograms.batch),
    })
}

fn quantiles(histogram: &Histogram<u64>) -> Value {
    json!({
        "n": histogram.len(),
        "p50": histogram.value_at_quantile(0.5),
        "p99": histogram.value_at_quantile(0.99),
        "p999": histogram.value_at_quantile(0.999),
        "max": histogram.max(),
        "sum": sum(histogram),
        "buckets": buckets(histogram),
    })
}

/// Of all values, each to the precision of the histogram.
fn sum(histogram: &Histogram<u64>) -> u64 {
    let counted = histogram.iter_recorded();
    counted
        .map(|v| {
            let value = histogram.median_equivalent(v.value_iterated_to());
            value.saturating_mul(v.count_since_last_iteration())
        })
        .fold(0, u64::saturating_add)
}

/// Upper bounds by powers of two, and how many values lie between the last bound and this.
fn buckets(histogram: &Histogram<u64>) -> Vec<(u64, u64)> {
    let mut buckets: Vec<(u64, u64)> = BUCKETS.map(|power| (1 << power, 0)).collect();
    for value in histogram.iter_recorded() {
        let bucket = buckets
            .iter_mut()
            .find(|(bound, _)| value.value_iterated_to() <= *bound);
        match bucket {
            Some((_, count)) => *count += value.count_since_last_iteration(),
            // Longer than what is timed: with the longest.
            None => {
                if let Some((_, count)) = buckets.last_mut() {
                    *count += value.count_since_last_iteration();
                }
            }
        }
    }
    buckets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_every_value_once() {
        let mut histogram = Histogram::new_with_bounds(1, 60_000_000_000, 2).unwrap();
        for ns in [1, 1_000, 3_000, 70_000, 70_100, 60_000_000_000] {
            histogram.saturating_record(ns);
        }
        let buckets = buckets(&histogram);
        let count: u64 = buckets.iter().map(|(_, count)| count).sum();
        assert_eq!(count, 6);
        assert_eq!(buckets[0], (1_024, 2));
        assert_eq!(
            buckets.iter().find(|(bound, _)| *bound == 131_072),
            Some(&(131_072, 2))
        );
        let exact: u64 = 1 + 1_000 + 3_000 + 70_000 + 70_100 + 60_000_000_000;
        assert!(sum(&histogram).abs_diff(exact) < exact / 100);
    }

    #[test]
    fn questions_are_read_and_unknown_limits_refused() {
        assert!(serde_json::from_str::<Ask>(r#"{"get":"metrics"}"#).is_ok());
        assert!(
            serde_json::from_str::<Ask>(r#"{"set":{"batch_us":5,"ack_mode":"Replayed"}}"#).is_ok()
        );
        assert!(serde_json::from_str::<Ask>(r#"{"set":{"batch":5}}"#).is_err());
    }
}
