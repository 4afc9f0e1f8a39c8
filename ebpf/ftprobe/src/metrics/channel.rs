//! The channel daemon's own numbers, asked for over its operator's socket.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;

const PATIENCE: Duration = Duration::from_secs(1);
/// Bytes of an answer at most.
const MAX_ANSWER: u64 = 1 << 20;

/// What the daemon answers, as far as it is exported.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct Answer {
    #[serde(default)]
    pub(super) queue_depth: u64,
    #[serde(default)]
    pub(super) delivery_backlog_bytes: u64,
    pub(super) counters: BTreeMap<String, u64>,
    #[serde(default)]
    pub(super) stages_ns: BTreeMap<String, Distribution>,
}

/// A histogram of the daemon.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct Distribution {
    #[serde(default)]
    pub(super) sum: u64,
    /// Upper bounds and how many values lie between the last one and this.
    #[serde(default)]
    pub(super) buckets: Vec<(u64, u64)>,
}

/// Asks a daemon.
pub(super) fn ask(socket: &Path) -> io::Result<Answer> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(b"{\"get\":\"metrics\"}\n")?;
    let mut line = String::new();
    BufReader::new(stream.take(MAX_ANSWER)).read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}
