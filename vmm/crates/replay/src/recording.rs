//! A recording: a directory with the machine's state at its start and the log from there on.
//!
//! It is written as `NAME.incomplete` and renamed at a clean close, so a name without that ending
//! stands for a whole recording. What a crash leaves behind still replays, up to its last whole frame; a
//! recording that fails keeps all that was appended before.
//!
//! A recording has an id of its own: it is the session of all of the log's frames, and stands in the state,
//! so that a log is never replayed from the state of another recording.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use format::{
    Epoch, Frame, FrameFlags, FrameHeader, FrameReader, MAX_APPEND_LEN, Seq, SessionId, Tail,
    encode_frame,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::recorder::{LogError, LogSink};

/// The file with the log.
const LOG_FILE: &str = "log";
/// The file with the machine's state at the start.
const STATE_FILE: &str = "state";
/// Ending of a recording that was not closed.
const INCOMPLETE: &str = "incomplete";

/// Names a recording: drawn at random when it begins, never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordingId(pub [u8; 16]);

impl fmt::Display for RecordingId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        SessionId(self.0).fmt(f)
    }
}

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
    /// A frame in the log is of another recording.
    #[error("{path}: the frame at byte {offset} is of recording {found}, the log of {expected}")]
    Mixed {
        /// Which file.
        path: PathBuf,
        /// Where.
        offset: usize,
        /// Whose frame it is.
        found: RecordingId,
        /// Whose log it is.
        expected: RecordingId,
    },
    /// The log and the state to replay it from do not belong together.
    #[error(
        "{log} is the log of recording {id}, but {state} {}: replay the log from its own recording's \
         state, or from one that a replay of it has saved",
        of(.found.as_ref())
    )]
    Foreign {
        /// The log.
        log: PathBuf,
        /// Whose it is.
        id: RecordingId,
        /// The state.
        state: PathBuf,
        /// Whose that is.
        found: Option<RecordingId>,
    },
}

fn of(found: Option<&RecordingId>) -> String {
    found.map_or_else(
        || "is the state of no recording".to_owned(),
        |id| format!("is the state of recording {id}"),
    )
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> RecordingError + '_ {
    move |source| RecordingError::Io {
        path: path.to_owned(),
        source,
    }
}

/// Writes a recording. Where it is dropped unclosed, what was appended goes to the file, which stays as an
/// incomplete recording.
#[derive(Debug)]
pub struct RecordingWriter {
    id: RecordingId,
    target: PathBuf,
    incomplete: PathBuf,
    log: File,
    /// A frame could not be written, perhaps in its middle: nothing may stand behind it.
    broken: bool,
    body: Vec<u8>,
    frame: Vec<u8>,
    first: Seq,
    count: u32,
}

impl RecordingWriter {
    /// Begins the recording `target`. The caller draws its id, and writes the machine's state with that to
    /// [`RecordingWriter::state_path`].
    ///
    /// # Errors
    /// It exists already, or files cannot be made.
    pub fn create(target: &Path, id: RecordingId) -> Result<Self, RecordingError> {
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
            id,
            target: target.to_owned(),
            incomplete,
            log,
            broken: false,
            body: Vec::with_capacity(2 * MAX_APPEND_LEN),
            frame: Vec::with_capacity(2 * MAX_APPEND_LEN),
            first: Seq(0),
            count: 0,
        })
    }

    /// The recording's id.
    #[must_use]
    pub fn id(&self) -> RecordingId {
        self.id
    }

    /// Where the state at the start belongs.
    #[must_use]
    pub fn state_path(&self) -> PathBuf {
        self.incomplete.join(STATE_FILE)
    }

    fn header(&self, flags: FrameFlags) -> FrameHeader {
        FrameHeader {
            flags,
            session: SessionId(self.id.0),
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
        self.write_frame()?;
        self.first = self.first.advance(self.count.into());
        self.count = 0;
        self.body.clear();
        Ok(())
    }

    fn write_frame(&mut self) -> io::Result<()> {
        if self.broken {
            return Err(io::Error::other("a frame before it could not be written"));
        }
        let written = self.log.write_all(&self.frame);
        self.broken = written.is_err();
        written
    }

    /// Closes the recording: the end frame, log and state to the disk, and its name without `.incomplete`.
    ///
    /// # Errors
    /// The files cannot be written; what is there stays as an incomplete recording.
    pub fn close(mut self) -> Result<PathBuf, RecordingError> {
        let path = self.incomplete.join(LOG_FILE);
        self.flush().map_err(at(&path))?;
        self.frame.clear();
        encode_frame(self.header(FrameFlags::END), &[], &mut self.frame);
        self.write_frame().map_err(at(&path))?;
        self.log.sync_all().map_err(at(&path))?;
        let state = self.state_path();
        match File::open(&state).and_then(|file| file.sync_all()) {
            // A log alone, as tests write it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            synced => synced.map_err(at(&state))?,
        }
        fs::rename(&self.incomplete, &self.target).map_err(at(&self.target))?;
        Ok(self.target.clone())
    }
}

impl Drop for RecordingWriter {
    fn drop(&mut self) {
        if !self.broken
            && let Err(error) = self.flush()
        {
            let path = self.incomplete.display();
            tracing::error!(%path, %error, "the end of the recording is lost");
        }
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

/// Where something is written that is to be `target` once it is whole: its whole name, and `.incomplete`.
#[must_use]
pub fn incomplete_path(target: &Path) -> PathBuf {
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

    /// Whose log it is: None where it has no whole frame.
    #[must_use]
    pub fn id(&self) -> Option<RecordingId> {
        let first = Frame::decode(&mut self.log.as_slice()).ok()?;
        Some(RecordingId(first.header.session.0))
    }

    /// Refuses to replay the log from `state`, which is of recording `found` as its metadata say, unless that is
    /// the log's own.
    ///
    /// # Errors
    /// [`RecordingError::Foreign`].
    pub fn check_state(
        &self,
        state: &Path,
        found: Option<RecordingId>,
    ) -> Result<(), RecordingError> {
        match self.id() {
            Some(id) if found != Some(id) => Err(RecordingError::Foreign {
                log: self.dir.join(LOG_FILE),
                id,
                state: state.to_owned(),
                found,
            }),
            _ => Ok(()),
        }
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
    /// Damage, a frame of another recording, or what `each` returns.
    pub fn for_each_body<E: From<RecordingError>>(
        &self,
        mut each: impl FnMut(&FrameHeader, &[u8]) -> Result<(), E>,
    ) -> Result<Tail, E> {
        let mut frames = self.frames();
        let mut id = None;
        loop {
            let offset = frames.offset();
            match frames.next_frame() {
                Ok(Some(frame)) => {
                    let found = RecordingId(frame.header.session.0);
                    let expected = *id.get_or_insert(found);
                    if found != expected {
                        return Err(RecordingError::Mixed {
                            path: self.dir.join(LOG_FILE),
                            offset,
                            found,
                            expected,
                        }
                        .into());
                    }
                    each(&frame.header, frame.body)?;
                }
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

    const ID: RecordingId = RecordingId([7; 16]);

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
        let mut writer = RecordingWriter::create(&target, ID).unwrap();
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
        let mut writer = RecordingWriter::create(&target, ID).unwrap();
        for exit in 1..=3 {
            writer.append(&entry(exit)).unwrap();
            writer.write_out().unwrap();
        }
        writer.append(&entry(4)).unwrap();
        // A process that is killed drops nothing.
        std::mem::forget(writer);
        let left = dir.path().join("run.incomplete");
        let log = left.join(LOG_FILE);
        let bytes = fs::read(&log).unwrap();
        fs::write(&log, &bytes[..bytes.len() - 5]).unwrap();
        let reader = RecordingReader::open(&left).unwrap();
        assert_eq!(exits(&reader), (vec![1, 2], Tail::Cut));
        assert!(matches!(
            RecordingWriter::create(&target, ID),
            Err(RecordingError::Exists(_))
        ));
    }

    #[test]
    fn a_recording_that_fails_keeps_all_that_was_appended_and_stays_incomplete() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("run");
        let mut writer = RecordingWriter::create(&target, ID).unwrap();
        writer.append(&entry(1)).unwrap();
        writer.write_out().unwrap();
        writer.append(&entry(2)).unwrap();
        drop(writer);
        assert!(!target.exists());
        let reader = RecordingReader::open(&dir.path().join("run.incomplete")).unwrap();
        assert_eq!(exits(&reader), (vec![1, 2], Tail::Cut));
    }

    /// Behind the frame that was cut a whole one would be damage.
    #[test]
    fn nothing_is_written_behind_a_frame_that_could_not_be() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("run");
        let mut writer = RecordingWriter::create(&target, ID).unwrap();
        writer.append(&entry(1)).unwrap();
        writer.write_out().unwrap();
        let path = dir.path().join("run.incomplete").join(LOG_FILE);
        let whole = fs::read(&path).unwrap();
        let log = std::mem::replace(&mut writer.log, File::open(&path).unwrap());
        writer.append(&entry(2)).unwrap();
        writer.write_out().unwrap_err();
        writer.log = log;
        writer.write_out().unwrap_err();
        drop(writer);
        assert_eq!(fs::read(&path).unwrap(), whole);
    }

    #[test]
    fn a_log_takes_no_state_but_its_own_recordings() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("run");
        RecordingWriter::create(&target, ID)
            .unwrap()
            .close()
            .unwrap();
        let reader = RecordingReader::open(&target).unwrap();
        assert_eq!(reader.id(), Some(ID));
        let state = Path::new("other/state");
        reader.check_state(state, Some(ID)).unwrap();
        let other = RecordingId([8; 16]);
        for (found, whose) in [(Some(other), &*other.to_string()), (None, "no recording")] {
            let said = reader.check_state(state, found).unwrap_err().to_string();
            for part in ["run/log", "other/state", &*ID.to_string(), whose] {
                assert!(said.contains(part), "{said}");
            }
        }
    }

    #[test]
    fn a_frame_of_another_recording_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let log = |name: &str, id| {
            let target = dir.path().join(name);
            let mut writer = RecordingWriter::create(&target, id).unwrap();
            for exit in 1..=2 {
                writer.append(&entry(exit)).unwrap();
                writer.write_out().unwrap();
            }
            writer.close().unwrap();
            fs::read(target.join(LOG_FILE)).unwrap()
        };
        let (a, b) = (log("a", ID), log("b", RecordingId([8; 16])));
        assert_eq!(a.len(), b.len());
        // Two frames of one entry each, and the end.
        let middle = RecordingReader::open(&dir.path().join("a")).unwrap();
        let mut frames = middle.frames();
        frames.next_frame().unwrap();
        let at = frames.offset();
        let mixed = [&a[..at], &b[at..]].concat();
        fs::write(dir.path().join("a").join(LOG_FILE), mixed).unwrap();
        let reader = RecordingReader::open(&dir.path().join("a")).unwrap();
        assert!(matches!(
            reader.for_each_body::<RecordingError>(|_, _| Ok(())),
            Err(RecordingError::Mixed { offset, .. }) if offset == at
        ));
    }
}
