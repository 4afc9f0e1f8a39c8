//! Divergence: the replica is not where the log says that it ought to be. Always loud.

use std::collections::VecDeque;
use std::fmt;

use format::{Entry, ExitNumber};

/// How many entries before the divergence a report holds.
pub(crate) const CONTEXT_ENTRIES: usize = 24;

/// What differed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mismatch {
    /// The registers at some exit since the last agreement.
    Registers {
        /// The log's running digest.
        expected: u64,
        /// This machine's.
        found: u64,
    },
    /// The output of an exit.
    Output {
        /// The log's length in bytes and CRC32C.
        expected: (u32, u32),
        /// This machine's.
        found: (u32, u32),
    },
    /// The log has an entry that does not fit the place where this machine is.
    Entry {
        /// The entry's kind.
        kind: &'static str,
        /// Why it does not fit.
        why: String,
    },
    /// This machine cannot get to the exit that the log names.
    Stuck {
        /// What it would need.
        why: String,
    },
    /// The state at the end of the recording.
    End {
        /// Which part of the state.
        what: &'static str,
        /// The log's hash.
        expected: u64,
        /// This machine's.
        found: u64,
    },
}

impl Mismatch {
    /// What was expected and what was found, as numbers; zeros where there are none.
    #[must_use]
    pub fn numbers(&self) -> (u64, u64) {
        match self {
            Self::Registers { expected, found }
            | Self::End {
                expected, found, ..
            } => (*expected, *found),
            Self::Output { expected, found } => (expected.1.into(), found.1.into()),
            Self::Entry { .. } | Self::Stuck { .. } => (0, 0),
        }
    }
}

/// A report that names the point, what was expected, what came, and the entries around it.
#[derive(Debug, Clone)]
pub struct Divergence {
    /// The last exit of this machine.
    pub exit: ExitNumber,
    /// The exit at which both were last known to agree.
    pub agreed: ExitNumber,
    /// Where the guest is.
    pub rip: u64,
    /// The privilege level that it runs at.
    pub cpl: u8,
    /// What differed.
    pub mismatch: Mismatch,
    /// The entries before it, oldest first, as text; the last one is the one that does not fit.
    pub entries: Vec<String>,
    /// Those after it, as far as somebody knows them.
    pub after: Vec<String>,
}

impl std::error::Error for Divergence {}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "DIVERGENCE at exit {} (last agreed at exit {}), RIP {:#x}, CPL {}",
            self.exit, self.agreed, self.rip, self.cpl
        )?;
        match &self.mismatch {
            Mismatch::Registers { expected, found } => {
                writeln!(
                    f,
                    "  register digest: the log has {expected:016x}, here it is {found:016x}"
                )?;
            }
            Mismatch::Output { expected, found } => {
                writeln!(
                    f,
                    "  output: the log has {} bytes with CRC {:08x}, here it is {} bytes with CRC {:08x}",
                    expected.0, expected.1, found.0, found.1
                )?;
            }
            Mismatch::Entry { kind, why } => writeln!(f, "  entry {kind} does not fit: {why}")?,
            Mismatch::Stuck { why } => writeln!(f, "  cannot reach the next entry's exit: {why}")?,
            Mismatch::End {
                what,
                expected,
                found,
            } => {
                writeln!(
                    f,
                    "  {what} at the end: the log has {expected:016x}, here it is {found:016x}"
                )?;
            }
        }
        writeln!(f, "  entries before it, oldest first:")?;
        self.entries
            .iter()
            .try_for_each(|entry| writeln!(f, "    {entry}"))?;
        if !self.after.is_empty() {
            writeln!(f, "  entries after it:")?;
        }
        self.after
            .iter()
            .try_for_each(|entry| writeln!(f, "    {entry}"))?;
        write!(
            f,
            "  causes to look for: a program that executes RDRAND, RDSEED, RDPID, XGETBV or AVX \
             unasked (hidden by CPUID, but not trapped on every host), or a different host CPU"
        )
    }
}

/// The last entries, for the report.
#[derive(Debug, Default)]
pub(crate) struct Context {
    entries: VecDeque<String>,
}

impl Context {
    pub(crate) fn note(&mut self, entry: &Entry<'_>) {
        if self.entries.len() == CONTEXT_ENTRIES {
            self.entries.pop_front();
        }
        self.entries.push_back(line(entry));
    }

    pub(crate) fn lines(&self) -> Vec<String> {
        self.entries.iter().cloned().collect()
    }
}

/// An entry in a line of a report.
#[must_use]
pub fn line(entry: &Entry<'_>) -> String {
    let kind = entry.event.kind().name();
    format!("exit {:<10} {kind:<9} {}", entry.exit, summary(entry))
}

/// What an entry holds, in a few words.
fn summary(entry: &Entry<'_>) -> String {
    use format::Event::*;
    match entry.event {
        Time { ns } => format!("{}.{:09} s", ns / 1_000_000_000, ns % 1_000_000_000),
        Entropy { request, data } => format!("request {request}, {} bytes", data.len()),
        NetRx(data) | ConsoleRx(data) => format!("{} bytes", data.len()),
        Delta(data) => crate::delta::summary(data),
        DiskDone {
            request,
            status,
            data,
        } => {
            format!("request {request}, {status:?}, {} bytes", data.len())
        }
        Output { bytes, crc, digest } => {
            format!("{bytes} bytes, CRC {crc:08x}, digest {digest:016x}")
        }
        Reached { digest } => format!("digest {digest:016x}"),
        Control(op, data) => format!("{op:?}, {} bytes", data.len()),
        Part(part, data) => format!("{} bytes at {} of {}", data.len(), part.offset, part.total),
    }
}
