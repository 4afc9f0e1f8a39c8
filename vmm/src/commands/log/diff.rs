//! `pollux log diff`: whether two recordings are the same, and from where on they are not.
//!
//! Compared are the machines' states at the start, the entries, and whether the logs were closed or cut. What
//! a state says beside the machine is left out: recordings of one machine have ids of their own.

use std::fs::File;
use std::io::BufReader;
use std::process::ExitCode;

use format::Tail;
use replay::RecordingReader;
use transfer::{Item, Reader};

use super::{LogReadError, Outcome, each_entry, line};
use crate::vm::META_TAG;

/// Entries of each side that are shown where the logs part.
const SHOWN: usize = 5;

/// One of the two.
struct Side {
    /// Of each entry a checksum, and what it says.
    lines: Vec<(u32, String)>,
    tail: Tail,
    /// Checksum of the machine's state.
    state: u32,
}

impl Side {
    fn read(reader: &RecordingReader) -> Result<Self, LogReadError> {
        let mut lines = Vec::new();
        let tail = each_entry(reader, |_, entry| {
            let mut bytes = Vec::new();
            entry.encode(&mut bytes);
            lines.push((format::crc32c(&bytes), line(entry)));
            Ok(())
        })?;
        Ok(Self {
            lines,
            tail,
            state: state_sum(reader)?,
        })
    }

    fn ending(&self) -> &'static str {
        match self.tail {
            Tail::Closed => "closed in order",
            Tail::Cut => "cut: it has no end frame",
        }
    }
}

/// Checksum of everything in the state but what is said beside the machine. The same machine is written in
/// the same way: pages of zeros are never in it.
fn state_sum(reader: &RecordingReader) -> Result<u32, LogReadError> {
    let path = reader.state_path();
    let sum = || -> Result<u32, transfer::Error> {
        let mut items = Reader::new(BufReader::with_capacity(1 << 20, File::open(&path)?))?;
        let mut sum = 0;
        while let Some(item) = items.next_item()? {
            match item {
                Item::Section(section) if section.tag == META_TAG => {}
                Item::Section(section) => {
                    sum = format::crc32c_append(sum, section.tag.as_bytes());
                    sum = format::crc32c_append(sum, &section.schema.to_le_bytes());
                    sum = format::crc32c_append(sum, section.bytes());
                }
                Item::Pages { first, bytes } => {
                    sum = format::crc32c_append(sum, &first.to_le_bytes());
                    sum = format::crc32c_append(sum, bytes);
                }
            }
        }
        Ok(sum)
    };
    sum().map_err(|source| LogReadError::State { path, source })
}

/// Prints where two recordings begin to differ; exit code 1 if they do.
///
/// # Errors
/// One cannot be read.
pub(super) fn diff(left: &RecordingReader, right: &RecordingReader) -> Outcome {
    let (left, right) = (Side::read(left)?, Side::read(right)?);
    let pairs = left.lines.iter().zip(&right.lines);
    let same = pairs.take_while(|(l, r)| l == r).count();
    let states = left.state == right.state;
    let entries = same == left.lines.len() && same == right.lines.len();
    let tails = left.tail == right.tail;
    if states && entries && tails {
        println!("identical: {same} entries, {}", left.ending());
        return Ok(ExitCode::SUCCESS);
    }
    if !states {
        println!("the states at the start differ");
    }
    if entries {
        println!("all {same} entries are the same");
    } else {
        println!("{same} entries are the same, then:");
        for (sign, side) in [('<', &left), ('>', &right)] {
            for (_, text) in side.lines.iter().skip(same).take(SHOWN) {
                println!("{sign} {text}");
            }
        }
    }
    if !tails {
        for (sign, side) in [('<', &left), ('>', &right)] {
            println!("{sign} the log is {}", side.ending());
        }
    }
    Ok(ExitCode::from(1))
}
