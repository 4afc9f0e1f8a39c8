//! The ways of appends as a trace that Perfetto and chrome://tracing show: format "Trace Event Format",
//! JSON object form.
//!
//! A process for each host, and in it a track for each append whose stages lie one after the other (async
//! nestable events, so that appends that overlap do not hide each other); arrows where the way leads from
//! host to host. Times are us on the clock of the first recording, from its first event on.

use std::io::{self, Write};

use serde_json::{Value, json};
use usdt::Station;

use super::join::{Chain, Joined};
use super::recording::Recording;

/// Writes the trace.
///
/// # Errors
/// Whatever the writer says.
pub fn chrome(to: &mut impl Write, recordings: &[Recording], joined: &Joined) -> io::Result<()> {
    let clock = match joined.clock_error_ns {
        Some(0) => "one clock".to_owned(),
        Some(ns) => format!("right to {:.1} us between hosts", ns as f64 / 1e3),
        None => "NOT COMPARED: times between hosts mean nothing".to_owned(),
    };
    let about = json!({
        "clock": clock,
        "clock_error_us": joined.clock_error_ns.map(|ns| ns as f64 / 1e3),
        "sample_one_in": joined.sample_one_in,
        "events_lost": joined.lost,
    });
    write!(
        to,
        "{{\"displayTimeUnit\":\"ns\",\"otherData\":{about},\"traceEvents\":["
    )?;
    let mut events = Events { to, first: true };
    for (index, recording) in recordings.iter().enumerate() {
        let part = part_of(index, joined);
        let name = format!("{}: {part} ({clock})", recording.header.host);
        events.put(&json!({
            "ph": "M", "name": "process_name", "pid": index + 1, "tid": 0, "args": {"name": name},
        }))?;
    }
    let begin = joined.chains.iter().filter_map(Chain::begin).min();
    for chain in &joined.chains {
        events.chain(chain, begin.unwrap_or(0))?;
    }
    events.to.write_all(b"]}\n")
}

impl Chain {
    fn begin(&self) -> Option<u64> {
        self.at_ns.iter().flatten().min().copied()
    }
}

/// What a host is, by the stations that it tells.
fn part_of(recording: usize, joined: &Joined) -> &'static str {
    let tells = |station: Station| {
        let by = |chain: &Chain| chain.told_by[station as usize] == Some(recording);
        joined.chains.iter().any(by)
    };
    match (tells(Station::Appended), tells(Station::Received)) {
        (true, false) => "primary",
        (false, true) => "backup",
        (true, true) => "primary and backup",
        (false, false) => "nothing heard",
    }
}

struct Events<'a, W> {
    to: &'a mut W,
    first: bool,
}

impl<W: Write> Events<'_, W> {
    fn put(&mut self, event: &Value) -> io::Result<()> {
        let separator: &[u8] = if self.first { b"\n" } else { b",\n" };
        self.first = false;
        self.to.write_all(separator)?;
        serde_json::to_writer(&mut *self.to, event).map_err(io::Error::from)
    }

    /// The stages of one append, each on the host that told its end.
    fn chain(&mut self, chain: &Chain, begin: u64) -> io::Result<()> {
        let passed: Vec<(Station, u64, usize)> = Station::ALL
            .into_iter()
            .filter_map(|station| {
                let told_by = chain.told_by[station as usize]?;
                Some((station, chain.at(station)?, told_by))
            })
            .collect();
        let us = |ns: u64| ns.saturating_sub(begin) as f64 / 1e3;
        let id = format!("{:x}:{}", chain.session, chain.position);
        for pair in passed.windows(2) {
            let ((from, start, host), (to, end, next)) = (pair[0], pair[1]);
            let name = format!("{} to {}", from.name(), to.name());
            let session = format!("{:016x}", chain.session);
            let args = json!({"session": session, "position": chain.position});
            for (phase, at) in [("b", start), ("e", end)] {
                self.put(&json!({
                    "ph": phase, "cat": "append", "name": name, "id": id, "pid": next + 1, "tid": 0,
                    "ts": us(at), "args": args,
                }))?;
            }
            if host != next {
                for (phase, at, on) in [("s", start, host), ("f", end, next)] {
                    self.put(&json!({
                        "ph": phase, "bp": "e", "cat": "host", "name": name,
                        "id": format!("{id}:{}", from.name()), "pid": on + 1, "tid": 0, "ts": us(at),
                    }))?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::recording::Header;
    use super::*;

    #[test]
    fn stages_begin_where_the_last_one_ended_on_the_host_that_told_them() {
        let mut chain = Chain {
            session: 0xab,
            position: 64,
            at_ns: [None; 8],
            told_by: [None; 8],
        };
        for (station, at, by) in [
            (Station::Appended, 1_000_000, 0),
            (Station::Sent, 1_005_000, 0),
            (Station::Received, 1_030_000, 1),
            (Station::Acknowledged, 1_080_500, 0),
        ] {
            chain.at_ns[station as usize] = Some(at);
            chain.told_by[station as usize] = Some(by);
        }
        let joined = Joined {
            chains: vec![chain],
            sample_one_in: 64,
            lost: 0,
            clock_error_ns: Some(2_500),
        };
        let recordings = [
            Recording::new(Header::here(64)),
            Recording::new(Header::here(64)),
        ];
        let mut text = Vec::new();
        chrome(&mut text, &recordings, &joined).unwrap();
        let trace: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(trace["otherData"]["clock_error_us"], 2.5);
        let events = trace["traceEvents"].as_array().unwrap();
        let of =
            |phase: &str| -> Vec<&Value> { events.iter().filter(|e| e["ph"] == phase).collect() };
        let names: Vec<_> = of("M").iter().map(|e| e["args"]["name"].clone()).collect();
        assert!(names[0].as_str().unwrap().contains("primary"));
        assert!(names[1].as_str().unwrap().contains("backup"));
        let begins: Vec<_> = of("b").iter().map(|e| e["ts"].as_f64().unwrap()).collect();
        let ends: Vec<_> = of("e").iter().map(|e| e["ts"].as_f64().unwrap()).collect();
        assert_eq!(begins, [0.0, 5.0, 30.0]);
        assert_eq!(ends, [5.0, 30.0, 80.5]);
        assert_eq!((of("s").len(), of("f").len()), (2, 2));
        assert_eq!(of("e")[1]["pid"], 2);
    }
}
