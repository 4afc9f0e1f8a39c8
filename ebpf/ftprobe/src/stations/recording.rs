//! What was heard on one host, kept in a file: JSON lines, so that anything can read it.
//!
//! ```text
//! {"pollux_stations":1,"host":"a","boot":"…","sample_one_in":64,"start_ns":…}
//! {"e":[time_ns,station,session,from,upto,process]}
//! {"c":[session,at_ns,offset_ns,error_ns]}
//! {"lost":0,"end_ns":…}
//! ```
//!
//! Times are ns of the host's CLOCK_MONOTONIC. A file without its last line was cut off: what is there
//! is still good.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use ebpf_events::stations::StationEvent;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Version of the format.
pub const VERSION: u32 = 1;

/// The first line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// [`VERSION`].
    pub pollux_stations: u32,
    /// Name of the host, for people.
    pub host: String,
    /// The boot of the machine: recordings with the same one are on the same clock.
    pub boot: String,
    /// Distance between the appends that are shown.
    pub sample_one_in: u64,
    /// When the recording began.
    pub start_ns: u64,
}

/// The peer's clock minus this host's, as one heartbeat has measured it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockSample {
    /// The session of the heartbeat.
    pub session: u64,
    /// When its reply arrived.
    pub at_ns: u64,
    /// The difference.
    pub offset_ns: i64,
    /// It may be off by this much: half of the round trip.
    pub error_ns: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    Event { e: (u64, u32, u64, u64, u64, u32) },
    Clock { c: (u64, u64, i64, u64) },
    End { lost: u64, end_ns: u64 },
}

/// Why a recording cannot be read.
#[derive(Debug, Error)]
pub enum RecordingError {
    /// The file.
    #[error("{}: {source}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A line is not what this version writes.
    #[error("{}, line {line}: {what}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
}

/// What was heard on one host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recording {
    /// Of which host.
    pub header: Header,
    /// In the order in which they were told.
    pub events: Vec<StationEvent>,
    /// In the order of their times.
    pub clock: Vec<ClockSample>,
    /// Events that found no room, and when the recording ended; none if it was cut off.
    pub end: Option<(u64, u64)>,
}

impl Header {
    /// Of this host, now.
    pub fn here(sample_one_in: u64) -> Self {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        Self {
            pollux_stations: VERSION,
            host: read("/proc/sys/kernel/hostname").trim().to_owned(),
            boot: read("/proc/sys/kernel/random/boot_id").trim().to_owned(),
            sample_one_in,
            start_ns: heartbeat::clock::monotonic_ns(),
        }
    }
}

impl Recording {
    /// Nothing heard yet.
    pub const fn new(header: Header) -> Self {
        Self {
            header,
            events: Vec::new(),
            clock: Vec::new(),
            end: None,
        }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`RecordingError`].
    pub fn read(path: &Path) -> Result<Self, RecordingError> {
        let failed = |source| RecordingError::File {
            path: path.to_owned(),
            source,
        };
        let wrong = |line: usize, what: String| RecordingError::Format {
            path: path.to_owned(),
            line: line + 1,
            what,
        };
        let mut lines = BufReader::new(File::open(path).map_err(failed)?).lines();
        let first = lines.next().unwrap_or_else(|| Ok(String::new()));
        let header: Header = serde_json::from_str(&first.map_err(failed)?)
            .map_err(|error| wrong(0, format!("no recording of stations: {error}")))?;
        if header.pollux_stations != VERSION {
            let found = header.pollux_stations;
            return Err(wrong(0, format!("version {found}, not {VERSION}")));
        }
        let mut recording = Self::new(header);
        let mut lines = lines.enumerate().peekable();
        while let Some((number, line)) = lines.next() {
            let line = line.map_err(failed)?;
            match serde_json::from_str(&line) {
                Ok(line) => recording.take(line),
                // Cut off in the middle of its last line.
                Err(_) if lines.peek().is_none() => {}
                Err(error) => return Err(wrong(number + 1, error.to_string())),
            }
        }
        Ok(recording)
    }

    fn take(&mut self, line: Line) {
        match line {
            Line::Event { e } => self.events.push(StationEvent {
                time_ns: e.0,
                station: e.1,
                session: e.2,
                from: e.3,
                upto: e.4,
                process: e.5,
            }),
            Line::Clock { c } => self.clock.push(ClockSample {
                session: c.0,
                at_ns: c.1,
                offset_ns: c.2,
                error_ns: c.3,
            }),
            Line::End { lost, end_ns } => self.end = Some((lost, end_ns)),
        }
    }
}

/// Writes a file as things are heard.
pub struct Writer {
    to: BufWriter<File>,
}

impl Writer {
    /// Begins a file.
    ///
    /// # Errors
    /// Whatever the system says.
    pub fn create(path: &Path, header: &Header) -> io::Result<Self> {
        let mut to = BufWriter::new(File::create(path)?);
        line(&mut to, header)?;
        Ok(Self { to })
    }

    /// Adds an event.
    ///
    /// # Errors
    /// Whatever the system says.
    pub fn event(&mut self, event: &StationEvent) -> io::Result<()> {
        let e = (
            event.time_ns,
            event.station,
            event.session,
            event.from,
            event.upto,
            event.process,
        );
        line(&mut self.to, &Line::Event { e })
    }

    /// Adds a sample of the clocks.
    ///
    /// # Errors
    /// Whatever the system says.
    pub fn clock(&mut self, sample: &ClockSample) -> io::Result<()> {
        let c = (
            sample.session,
            sample.at_ns,
            sample.offset_ns,
            sample.error_ns,
        );
        line(&mut self.to, &Line::Clock { c })
    }

    /// Ends the file.
    ///
    /// # Errors
    /// Whatever the system says.
    pub fn finish(mut self, lost: u64, end_ns: u64) -> io::Result<()> {
        line(&mut self.to, &Line::End { lost, end_ns })?;
        self.to.flush()
    }
}

fn line(to: &mut impl Write, what: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *to, what)?;
    to.write_all(b"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_a_cut_file_as_far_as_it_goes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.stations");
        let header = Header::here(8);
        let event = StationEvent {
            time_ns: 1,
            session: u64::MAX,
            from: 2,
            upto: 3,
            station: 4,
            process: 5,
        };
        let sample = ClockSample {
            session: 6,
            at_ns: 7,
            offset_ns: -8,
            error_ns: 9,
        };
        let mut writer = Writer::create(&path, &header).unwrap();
        writer.event(&event).unwrap();
        writer.clock(&sample).unwrap();
        writer.finish(10, 11).unwrap();
        let whole = Recording::read(&path).unwrap();
        let expected = Recording {
            header,
            events: vec![event],
            clock: vec![sample],
            end: Some((10, 11)),
        };
        assert_eq!(whole, expected);

        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 5]).unwrap();
        let cut = Recording::read(&path).unwrap();
        assert_eq!((cut.events.len(), cut.clock.len(), cut.end), (1, 1, None));
        std::fs::write(&path, format!("nonsense\n{text}")).unwrap();
        assert!(Recording::read(&path).is_err());
    }
}
