//! `pollux log`: what is in a log.

use std::collections::BTreeMap;
use std::process::ExitCode;

use format::{
    Assembler, Entry, EntryKind, EntryReader, Event, FrameHeader, HEADER_LEN, TRAILER_LEN, Tail,
};
use replay::{RecordingError, RecordingReader};
use serde::Serialize;
use thiserror::Error;

use super::Outcome;
use crate::cli::{LogCommand, LogGrep, LogStat};

#[derive(Debug, Error)]
enum LogReadError {
    #[error(transparent)]
    Recording(#[from] RecordingError),
    #[error("a frame's body does not decode: {0}")]
    Format(#[from] format::Error),
    #[error("cannot write: {0}")]
    Write(#[from] std::io::Error),
}

/// Runs one of the log commands.
///
/// # Errors
/// The log cannot be read.
pub fn log(command: &LogCommand) -> Outcome {
    match command {
        LogCommand::Dump(one) => {
            let reader = RecordingReader::open(&one.recording)?;
            print_matching(&reader, |_| true)?;
        }
        LogCommand::Grep(options) => grep(options)?,
        LogCommand::Stat(options) => stat(options)?,
        LogCommand::Diff { left, right } => {
            let left = RecordingReader::open(left)?;
            let right = RecordingReader::open(right)?;
            return diff(&left, &right);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The largest entry that the log commands put together, in bytes: a delta of all memory of a large
/// guest.
const MAX_ENTRY_BYTES: u64 = 80 << 30;

fn each_entry(
    reader: &RecordingReader,
    mut each: impl FnMut(&FrameHeader, &Entry<'_>) -> Result<(), LogReadError>,
) -> Result<Tail, LogReadError> {
    let mut parts = Assembler::new(MAX_ENTRY_BYTES);
    reader.for_each_body(|header, body| {
        for entry in EntryReader::new(body) {
            let entry = entry?;
            let Event::Part(part, data) = entry.event else {
                each(header, &entry)?;
                continue;
            };
            if parts.push(entry.exit, part, data)? {
                each(header, &parts.whole()?)?;
            }
        }
        Ok(())
    })
}

fn line(entry: &Entry<'_>) -> String {
    let kind = entry.event.kind().name();
    format!(
        "exit {:<10} {kind:<9} {}",
        entry.exit,
        replay::summary(entry)
    )
}

fn print_matching(
    reader: &RecordingReader,
    wanted: impl Fn(&Entry<'_>) -> bool,
) -> Result<(), LogReadError> {
    use std::io::Write;
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let tail = each_entry(reader, |_, entry| {
        if wanted(entry) {
            writeln!(out, "{}", line(entry))?;
        }
        Ok(())
    });
    let tail = match tail {
        // Whoever read the list has had enough of it.
        Err(LogReadError::Write(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => {
            return Ok(());
        }
        other => other?,
    };
    out.flush()?;
    if tail == Tail::Cut {
        eprintln!("pollux: the log was cut here: it has no end frame");
    }
    Ok(())
}

fn grep(options: &LogGrep) -> Result<(), Box<dyn std::error::Error>> {
    let kind = match &options.kind {
        None => None,
        Some(name) => Some(
            EntryKind::ALL
                .into_iter()
                .find(|kind| kind.name().eq_ignore_ascii_case(name))
                .ok_or_else(|| {
                    let known: Vec<_> = EntryKind::ALL.iter().map(|kind| kind.name()).collect();
                    format!("no entry kind {name:?}; there are {}", known.join(", "))
                })?,
        ),
    };
    let reader = RecordingReader::open(&options.recording)?;
    print_matching(&reader, |entry| {
        kind.is_none_or(|kind| entry.event.kind() == kind)
            && (options.from..=options.to).contains(&entry.exit.0)
            && options
                .text
                .as_ref()
                .is_none_or(|text| contains(entry, text.as_bytes()))
    })?;
    Ok(())
}

fn contains(entry: &Entry<'_>, text: &[u8]) -> bool {
    let data = match entry.event {
        Event::Entropy { data, .. }
        | Event::NetRx(data)
        | Event::ConsoleRx(data)
        | Event::DiskDone { data, .. }
        | Event::Delta(data)
        | Event::Control(_, data)
        | Event::Part(_, data) => data,
        Event::Time { .. } | Event::Output { .. } | Event::Reached { .. } => return false,
    };
    text.is_empty() || data.windows(text.len()).any(|window| window == text)
}

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
    mbit_per_virtual_second: f64,
    kinds: BTreeMap<&'static str, KindStat>,
}

fn stat(options: &LogStat) -> Result<(), Box<dyn std::error::Error>> {
    let reader = RecordingReader::open(&options.recording)?;
    let mut stat = Stat::default();
    let (mut first, mut last, mut since, mut until) = (None, 0, None, 0);
    let mut frame = None;
    let (left_out_ns, mut birth) = (options.after_s * 1_000_000_000, None);
    let tail = each_entry(&reader, |header, entry| {
        if let Event::Time { ns } = entry.event {
            until = ns;
            birth.get_or_insert(ns);
        }
        if left_out_ns > 0 && birth.is_none_or(|birth| until - birth < left_out_ns) {
            return Ok(());
        }
        if frame != Some(header.first) {
            frame = Some(header.first);
            stat.frames += 1;
            stat.bytes += (HEADER_LEN + TRAILER_LEN) as u64;
        }
        let kind = stat.kinds.entry(entry.event.kind().name()).or_default();
        kind.entries += 1;
        kind.bytes += entry.encoded_len() as u64;
        stat.bytes += entry.encoded_len() as u64;
        first.get_or_insert(entry.exit.0);
        last = entry.exit.0;
        if let Event::Time { ns } = entry.event {
            since.get_or_insert(ns);
        }
        Ok(())
    })?;
    stat.complete = tail == Tail::Closed;
    stat.exits = last - first.unwrap_or(0);
    stat.virtual_seconds = (until - since.unwrap_or(0)) as f64 / 1e9;
    stat.mbit_per_virtual_second = stat.bytes as f64 * 8.0 / 1e6 / stat.virtual_seconds;
    for kind in stat.kinds.values_mut() {
        kind.bytes_per_exit = kind.bytes as f64 / stat.exits.max(1) as f64;
    }
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
    println!(
        "{} exits in {} frames, {} bytes, {:.3} s of virtual time, {:.3} Mbit/s{}",
        stat.exits,
        stat.frames,
        stat.bytes,
        stat.virtual_seconds,
        stat.mbit_per_virtual_second,
        if stat.complete {
            ""
        } else {
            "; cut: no end frame"
        }
    );
}

fn diff(left: &RecordingReader, right: &RecordingReader) -> Outcome {
    let lines = |reader: &RecordingReader| -> Result<Vec<(u32, String)>, LogReadError> {
        let mut lines = Vec::new();
        each_entry(reader, |_, entry| {
            let mut bytes = Vec::new();
            entry.encode(&mut bytes);
            lines.push((format::crc32c(&bytes), line(entry)));
            Ok(())
        })?;
        Ok(lines)
    };
    let (left, right) = (lines(left)?, lines(right)?);
    let same = left.iter().zip(&right).take_while(|(l, r)| l == r).count();
    if same == left.len() && same == right.len() {
        println!("identical: {same} entries");
        return Ok(ExitCode::SUCCESS);
    }
    println!("{same} entries are the same, then:");
    for (sign, lines) in [('<', &left), ('>', &right)] {
        for (_, text) in lines.iter().skip(same).take(5) {
            println!("{sign} {text}");
        }
    }
    Ok(ExitCode::from(1))
}
