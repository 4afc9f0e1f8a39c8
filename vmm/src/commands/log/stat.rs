//! `pollux log stat`: entries and bytes by kind.
//!
//! Exits and virtual time of a log never go back: one in which they do is refused, whatever its checksums say.

use std::collections::BTreeMap;

use format::{Entry, Event, FrameHeader, HEADER_LEN, Seq, TRAILER_LEN, Tail};
use replay::RecordingReader;
use serde::Serialize;

use super::{LogReadError, each_entry};
use crate::cli::LogStat;

const NS_PER_S: u64 = 1_000_000_000;

#[derive(Debug, Default, Clone, Copy, Serialize)]
struct KindStat {
    entries: u64,
    bytes: u64,
    bytes_per_exit: f64,
}

#[derive(Debug, Default, Serialize)]
struct Stat {
    complete: bool,
    frames: u64,
    exits: u64,
    bytes: u64,
    virtual_seconds: f64,
    /// None where no virtual time has passed.
    mbit_per_virtual_second: Option<f64>,
    kinds: BTreeMap<&'static str, KindStat>,
}

/// Counts as the entries come.
#[derive(Debug, Default)]
struct Count {
    stat: Stat,
    /// So much virtual time from the log's first one on is not counted.
    left_out_ns: u64,
    /// The log's first virtual time.
    birth_ns: Option<u64>,
    now_ns: u64,
    last: format::ExitNumber,
    /// The first exit and virtual time that are counted.
    first: Option<format::ExitNumber>,
    since_ns: Option<u64>,
    frame: Option<Seq>,
}

impl Count {
    fn entry(&mut self, header: &FrameHeader, entry: &Entry<'_>) -> Result<(), LogReadError> {
        self.move_on(entry)?;
        let left_out = |birth_ns| self.now_ns - birth_ns < self.left_out_ns;
        if self.left_out_ns > 0 && self.birth_ns.is_none_or(left_out) {
            return Ok(());
        }
        let stat = &mut self.stat;
        if self.frame != Some(header.first) {
            self.frame = Some(header.first);
            stat.frames += 1;
            stat.bytes += (HEADER_LEN + TRAILER_LEN) as u64;
        }
        let bytes = entry.encoded_len() as u64;
        let kind = stat.kinds.entry(entry.event.kind().name()).or_default();
        kind.entries += 1;
        kind.bytes += bytes;
        stat.bytes += bytes;
        self.first.get_or_insert(entry.exit);
        if let Event::Time { ns } = entry.event {
            self.since_ns.get_or_insert(ns);
        }
        Ok(())
    }

    /// Takes exit and time of an entry, neither of which may be below what they were.
    fn move_on(&mut self, entry: &Entry<'_>) -> Result<(), LogReadError> {
        let exit = entry.exit;
        if exit < self.last {
            return Err(LogReadError::ExitGoesBack {
                last: self.last,
                found: exit,
            });
        }
        self.last = exit;
        if let Event::Time { ns } = entry.event {
            if ns < self.now_ns {
                return Err(LogReadError::TimeGoesBack {
                    exit,
                    last_ns: self.now_ns,
                    found_ns: ns,
                });
            }
            self.now_ns = ns;
            self.birth_ns.get_or_insert(ns);
        }
        Ok(())
    }

    /// What it comes to: differences are of a later and an earlier value, as `move_on` has seen to.
    fn end(self, tail: &Tail) -> Stat {
        let mut stat = self.stat;
        stat.complete = *tail == Tail::Closed;
        stat.exits = self.first.map_or(0, |first| self.last.0 - first.0);
        let ns = self.since_ns.map_or(0, |since_ns| self.now_ns - since_ns);
        stat.virtual_seconds = ns as f64 / NS_PER_S as f64;
        stat.mbit_per_virtual_second =
            (ns > 0).then(|| stat.bytes as f64 * 8.0 / 1e6 / stat.virtual_seconds);
        for kind in stat.kinds.values_mut() {
            kind.bytes_per_exit = kind.bytes as f64 / stat.exits.max(1) as f64;
        }
        stat
    }
}

/// Counts the entries of a log, and prints what that comes to.
///
/// # Errors
/// The log cannot be read, or goes back.
pub(super) fn stat(options: &LogStat) -> Result<(), Box<dyn std::error::Error>> {
    let reader = RecordingReader::open(&options.recording)?;
    let mut count = Count {
        left_out_ns: options.after_s.saturating_mul(NS_PER_S),
        ..Count::default()
    };
    let tail = each_entry(&reader, |header, entry| count.entry(header, entry))?;
    let stat = count.end(&tail);
    if options.json {
        println!("{}", serde_json::to_string(&stat)?);
    } else {
        print_stat(&stat);
    }
    Ok(())
}

fn print_stat(stat: &Stat) {
    println!(
        "{:<10} {:>10} {:>12} {:>10}",
        "kind", "entries", "bytes", "bytes/exit"
    );
    for (name, kind) in &stat.kinds {
        println!(
            "{name:<10} {:>10} {:>12} {:>10.3}",
            kind.entries, kind.bytes, kind.bytes_per_exit
        );
    }
    let rate = stat
        .mbit_per_virtual_second
        .map_or_else(String::new, |rate| format!(", {rate:.3} Mbit/s"));
    println!(
        "{} exits in {} frames, {} bytes, {:.3} s of virtual time{rate}{}",
        stat.exits,
        stat.frames,
        stat.bytes,
        stat.virtual_seconds,
        if stat.complete {
            ""
        } else {
            "; cut: no end frame"
        }
    );
}
