//! A recording: a directory with the machine's state at its start and the log from there on.
//!
//! It is written as `NAME.incomplete` and renamed at a clean close, so a name without that ending
//! stands for a whole recording. What a crash leaves behind still replays, up to its last whole frame.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use format::{
    Epoch, FrameFlags, FrameHeader, FrameReader, MAX_APPEND_LEN, Seq, SessionId, Tail, encode_frame,
};
use thiserror::Error;

use crate::recorder::{LogError, LogSink};

/// The file with the log.
const LOG_FILE: &str = "log";
/// The file with the machine's state at the start.
const STATE_FILE: &str = "state";
/// Ending of a recording that was not closed.
const INCOMPLETE: &str = "incomplete";

/// Why a recording cannot be written or read.
#[derive(Debug, Error)]
pub enum RecordingError {
    /// A file.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is one already.
    #[error("{0} exists already: remove it or choose another name")]
    Exists(PathBuf),
    /// The log's bytes are bad.
    #[error("{path}: damaged log at byte {offset}: {source}")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Where.
        offset: usize,
        /// Why.
        source: format::Error,
    },
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> RecordingError + '_ {
    move |source| RecordingError::Io {
        path: path.to_owned(),
        source,
    }
}

/// Writes a recording.
#[derive(Debug)]
pub struct RecordingWriter {
    target: PathBuf,
    incomplete: PathBuf,
    log: File,
    body: Vec<u8>,
    frame: Vec<u8>,
    first: Seq,
    count: u32,
}

impl RecordingWriter {
    /// Begins the recording `target`. The caller writes the machine's state to
    /// [`RecordingWriter::state_path`].
    ///
    /// # Errors
    /// It exists already, or files cannot be made.
    pub fn create(target: &Path) -> Result<Self, RecordingError> {
        let incomplete = incomplete_path(target);
        for path in [target, incomplete.as_path()] {
            if path.exists() {
                return Err(RecordingError::Exists(path.to_owned()));
            }
        }
        fs::create_dir(&incomplete).map_err(at(&incomplete))?;
        let path = incomplete.join(LOG_FILE);
        let log = File::create_new(&path).map_err(at(&path))?;
        Ok(Self {
            target: target.to_owned(),
            incomplete,
            log,
            body: Vec::with_capacity(2 * MAX_APPEND_LEN),
            frame: Vec::with_capacity(2 * MAX_APPEND_LEN),
            first: Seq(0),
            count: 0,
        })
    }

    /// Where the state at the start belongs.
    #[must_use]
    pub fn state_path(&self) -> PathBuf {
        self.incomplete.join(STATE_FILE)
    }

    fn header(&self, flags: FrameFlags) -> FrameHeader {
        FrameHeader {
            flags,
            session: SessionId::default(),
            epoch: Epoch(0),
            first: self.first,
            count: self.count,
            body_len: 0,
            stamp_ns: 0,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.count == 0 {
            return Ok(());
        }
        self.frame.clear();
        encode_frame(self.header(FrameFlags::NONE), &self.body, &mut self.frame);
        self.log.write_all(&self.frame)?;
        self.first = self.first.advance(self.count.into());
        self.count = 0;
        self.body.clear();
        Ok(())
    }

    /// Closes the recording: the end frame, to the disk, and its name without `.incomplete`.
    ///
    /// # Errors
    /// The files cannot be written; what is there stays as an incomplete recording.
    pub fn close(mut self) -> Result<PathBuf, RecordingError> {
        let path = self.incomplete.join(LOG_FILE);
        self.flush().map_err(at(&path))?;
        self.frame.clear();
        encode_frame(self.header(FrameFlags::END), &[], &mut self.frame);
        self.log.write_all(&self.frame).map_err(at(&path))?;
        self.log.sync_all().map_err(at(&path))?;
        fs::rename(&self.incomplete, &self.target).map_err(at(&self.target))?;
        Ok(self.target)
    }
}

impl LogSink for RecordingWriter {
    fn append(&mut self, bytes: &[u8]) -> Result<Seq, LogError> {
        assert!(
            bytes.len() <= MAX_APPEND_LEN,
            "an append is {MAX_APPEND_LEN} bytes at the most"
        );
        if self.body.len() + bytes.len() > MAX_APPEND_LEN {
            self.flush().map_err(|error| self.lost(&error))?;
        }
        self.body.extend_from_slice(bytes);
        self.count += 1;
        Ok(self.first.advance(u64::from(self.count) - 1))
    }

    fn urgent(&mut self) {}

    fn is_on(&self) -> bool {
        true
    }
}

impl RecordingWriter {
    fn lost(&self, error: &io::Error) -> LogError {
        LogError(format!(
            "{}: {error}",
            self.incomplete.join(LOG_FILE).display()
        ))
    }

    /// Writes what was appended so far to the file, so that a crash of this process keeps it.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_out(&mut self) -> Result<(), LogError> {
        self.flush().map_err(|error| self.lost(&error))
    }
}

fn incomplete_path(target: &Path) -> PathBuf {
    let mut name = target.as_os_str().to_owned();
    name.push(".");
    name.push(INCOMPLETE);
    PathBuf::from(name)
}

/// A recording that is read.
#[derive(Debug)]
pub struct RecordingReader {
    dir: PathBuf,
    log: Vec<u8>,
}

impl RecordingReader {
    /// Opens the recording `path`, also an incomplete one.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn open(path: &Path) -> Result<Self, RecordingError> {
        let log_path = path.join(LOG_FILE);
        let log = fs::read(&log_path).map_err(at(&log_path))?;
        Ok(Self {
            dir: path.to_owned(),
            log,
        })
    }

    /// Where the state at the start is.
    #[must_use]
    pub fn state_path(&self) -> PathBuf {
        self.dir.join(STATE_FILE)
    }

    /// The frames of the log.
    #[must_use]
    pub fn frames(&self) -> FrameReader<'_> {
        FrameReader::new(&self.log)
    }

    /// Bytes of the log.
    #[must_use]
    pub fn log_bytes(&self) -> usize {
        self.log.len()
    }

    /// Calls `each` with every whole frame's body in order, and says how the log ends.
    ///
    /// # Errors
    /// Damage, or what `each` returns.
    pub fn for_each_body<E: From<RecordingError>>(
        &self,
        mut each: impl FnMut(&FrameHeader, &[u8]) -> Result<(), E>,
    ) -> Result<Tail, E> {
        let mut frames = self.frames();
        loop {
            let offset = frames.offset();
            match frames.next_frame() {
                Ok(Some(frame)) => each(&frame.header, frame.body)?,
                Ok(None) => break,
                Err(source) => {
                    let path = self.dir.join(LOG_FILE);
                    return Err(RecordingError::Damaged {
                        path,
                        offset,
                        source,
                    }
                    .into());
                }
            }
        }
        Ok(frames.tail().cloned().unwrap_or(Tail::Cut))
    }
}

#[cfg(test)]
mod tests {
    use format::{Entry, EntryReader, Event, ExitNumber};

    use super::*;

    fn entry(exit: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        let event = Event::Time { ns: exit };
        Entry {
            exit: ExitNumber(exit),
            event,
        }
        .encode(&mut bytes);
        bytes
    }

    fn exits(reader: &RecordingReader) -> (Vec<u64>, Tail) {
        let mut seen = Vec::new();
        let tail = reader
            .for_each_body::<RecordingError>(|_, body| {
                seen.extend(EntryReader::new(body).map(|entry| entry.unwrap().exit.0));
                Ok(())
            })
            .unwrap();
        (seen, tail)
    }

    #[test]
    fn a_closed_recording_has_its_name_and_reads_whole() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("run");
        let mut writer = RecordingWriter::create(&target).unwrap();
        assert_eq!(writer.append(&entry(1)).unwrap(), Seq(0));
        writer.write_out().unwrap();
        assert_eq!(writer.append(&entry(2)).unwrap(), Seq(1));
        assert!(!target.exists());
        writer.close().unwrap();
        let reader = RecordingReader::open(&target).unwrap();
        assert_eq!(exits(&reader), (vec![1, 2], Tail::Closed));
    }

    #[test]
    fn a_crash_leaves_an_incomplete_recording_up_to_its_last_whole_frame() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("run");
        let mut writer = RecordingWriter::create(&target).unwrap();
        for exit in 1..=3 {
            writer.append(&entry(exit)).unwrap();
            writer.write_out().unwrap();
        }
        writer.append(&entry(4)).unwrap();
        drop(writer);
        let left = dir.path().join("run.incomplete");
        let log = left.join(LOG_FILE);
        let bytes = fs::read(&log).unwrap();
        fs::write(&log, &bytes[..bytes.len() - 5]).unwrap();
        let reader = RecordingReader::open(&left).unwrap();
        assert_eq!(exits(&reader), (vec![1, 2], Tail::Cut));
        assert!(matches!(
            RecordingWriter::create(&target),
            Err(RecordingError::Exists(_))
        ));
    }
}
