//! `pollux log`: what is in a log.

mod diff;
mod stat;

use std::path::PathBuf;
use std::process::ExitCode;

use format::{Assembler, Entry, EntryKind, EntryReader, Event, ExitNumber, FrameHeader, Tail};
use replay::{RecordingError, RecordingReader, line};
use thiserror::Error;

use super::Outcome;
use crate::cli::{LogCommand, LogGrep};

#[derive(Debug, Error)]
enum LogReadError {
    #[error(transparent)]
    Recording(#[from] RecordingError),
    #[error("a frame's body does not decode: {0}")]
    Format(#[from] format::Error),
    #[error("cannot write: {0}")]
    Write(#[from] std::io::Error),
    #[error("{path}: {source}")]
    State {
        path: PathBuf,
        source: transfer::Error,
    },
    #[error("the log is not in order: an entry of exit {found} stands after one of exit {last}")]
    ExitGoesBack { last: ExitNumber, found: ExitNumber },
    #[error(
        "the log is not in order: at exit {exit} virtual time goes back from {last_ns} to {found_ns} ns"
    )]
    TimeGoesBack {
        exit: ExitNumber,
        last_ns: u64,
        found_ns: u64,
    },
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
        LogCommand::Stat(options) => stat::stat(options)?,
        LogCommand::Diff { left, right } => {
            let left = RecordingReader::open(left)?;
            let right = RecordingReader::open(right)?;
            return diff::diff(&left, &right);
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
