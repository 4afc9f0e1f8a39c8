//! The arbiter that is a directory on shared storage: does the steps of [`ft::directory`].
//!
//! Every error of the system is passed on to the steps as it is; nothing is retried here.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use ft::directory::{
    DirectoryCall, DirectoryStep, FileOp, FileResult, MARKER, record_epoch, temporary_prefix,
};
use ft::{ArbiterReply, ArbiterRequest, CallId, ENVELOPE_LEN, HostId, MAX_RECORD_LEN};
use thiserror::Error;

use crate::Arbiter;

/// Why a directory cannot be used.
#[derive(Debug, Error)]
pub enum DirectoryError {
    /// It cannot be made or marked.
    #[error("cannot make {path} a directory of epoch records")]
    Create {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A directory of epoch records.
#[derive(Debug)]
pub struct DirectoryArbiter {
    path: PathBuf,
    me: HostId,
}

impl DirectoryArbiter {
    /// Makes the directory where it is missing, and marks it as one of epoch records. To be done once
    /// for a VM, by a person: a directory without the mark, like an empty mount point, is taken for
    /// unreachable.
    ///
    /// # Errors
    /// The directory or its mark cannot be made durable.
    pub fn create(path: &Path) -> Result<(), DirectoryError> {
        let make = || {
            fs::create_dir_all(path)?;
            match File::create_new(path.join(MARKER)) {
                Ok(marker) => marker.sync_all()?,
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
            File::open(path)?.sync_all()
        };
        make().map_err(|source| DirectoryError::Create {
            path: path.to_owned(),
            source,
        })
    }

    /// Uses the directory in the name of host `me`, of which it is the only arbiter. Touches nothing
    /// yet: the storage may be out of reach.
    #[must_use]
    pub fn open(path: &Path, me: HostId) -> Self {
        Self {
            path: path.to_owned(),
            me,
        }
    }

    /// Removes temporary files that earlier processes of this host left.
    fn sweep(&self) {
        let prefix = temporary_prefix(self.me);
        let Ok(names) = fs::read_dir(&self.path) else {
            return;
        };
        for entry in names.flatten() {
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                self.remove(&entry.file_name().to_string_lossy());
            }
        }
    }

    fn remove(&self, name: &str) {
        if let Err(error) = fs::remove_file(self.path.join(name)) {
            tracing::debug!(name, %error, "a temporary file of a claim stays behind");
        }
    }

    fn perform(&self, op: &FileOp) -> io::Result<FileResult> {
        match op {
            FileOp::List => self.list().map(FileResult::Names),
            FileOp::Read(name) => self.read(name).map(FileResult::Content),
            FileOp::Create(name, bytes) => {
                let mut file = File::create_new(self.path.join(name))?;
                file.write_all(bytes)?;
                Ok(FileResult::Done)
            }
            FileOp::SyncFile(name) => {
                File::open(self.path.join(name))?.sync_all()?;
                Ok(FileResult::Done)
            }
            FileOp::Link(from, to) => {
                fs::hard_link(self.path.join(from), self.path.join(to))?;
                Ok(FileResult::Done)
            }
            FileOp::SyncDirectory => {
                File::open(&self.path)?.sync_all()?;
                Ok(FileResult::Done)
            }
        }
    }

    /// The marker and the newest record are all that matters; so the list is bounded however many
    /// epochs there were.
    fn list(&self) -> io::Result<Vec<String>> {
        let (mut marked, mut newest) = (None, None);
        for entry in fs::read_dir(&self.path)? {
            let Ok(name) = entry?.file_name().into_string() else {
                continue;
            };
            if name == MARKER {
                marked = Some(name);
            } else if record_epoch(&name) > newest.as_deref().and_then(record_epoch) {
                newest = Some(name);
            }
        }
        Ok(marked.into_iter().chain(newest).collect())
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let most = MAX_RECORD_LEN + ENVELOPE_LEN;
        let mut bytes = Vec::new();
        File::open(self.path.join(name))?
            .take(most as u64 + 1)
            .read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

impl Arbiter for DirectoryArbiter {
    fn answer(&mut self, id: CallId, request: ArbiterRequest) -> ArbiterReply {
        let mut call = DirectoryCall::new(self.me, id, request);
        let mut result = None;
        loop {
            match call.step(result.take()) {
                DirectoryStep::Do(op) => result = Some(outcome(self.perform(&op))),
                DirectoryStep::Answer { reply, leftover } => {
                    if leftover.is_some() {
                        self.sweep();
                    }
                    return reply;
                }
            }
        }
    }
}

fn outcome(result: io::Result<FileResult>) -> FileResult {
    match result {
        Ok(result) => result,
        Err(error) => match error.kind() {
            ErrorKind::NotFound => FileResult::NotFound,
            ErrorKind::AlreadyExists => FileResult::Exists,
            _ => FileResult::Failed(error.to_string()),
        },
    }
}
