//! The API of a VMM: HTTP over a Unix socket, one request a connection.
//!
//! HTTP/1.0 is spoken, so that an answer ends with its connection. A VMM that is stopped, or gone, does not
//! answer: that is no error here, as it is what this program causes.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::Failure;

/// How long an answer is waited for.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// The longest answer, in bytes.
const LONGEST_ANSWER: u64 = 16 << 20;

/// What a VMM says of itself: what is used here of it.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct Status {
    pub(crate) role: String,
    /// What it is doing in that role.
    #[serde(default)]
    pub(crate) state: String,
    pub(crate) epoch: Option<u64>,
    #[serde(default)]
    pub(crate) peer: Option<String>,
    pub(crate) protected: bool,
    /// The last time that this host took the VM over.
    #[serde(default)]
    pub(crate) last_failover: Option<Failover>,
    /// The last transfer of state to or from this host.
    #[serde(default)]
    pub(crate) last_transfer: Option<Transfer>,
    /// Replicas that went another way than their primary.
    #[serde(default)]
    pub(crate) divergences: u64,
    /// Sectors of the disk are kept elsewhere until an old primary is proven gone.
    #[serde(default)]
    pub(crate) quarantine: bool,
    /// How far the backup is behind.
    #[serde(default)]
    pub(crate) lag: Lag,
    /// What the log carries, in Mbit/s.
    #[serde(default)]
    pub(crate) log_mbit_s: f64,
    /// What an operator should do.
    #[serde(default)]
    pub(crate) advice: Vec<String>,
    /// How this host answers heartbeats.
    #[serde(default)]
    pub(crate) heartbeats: Option<Heartbeats>,
}

/// How a host answers heartbeats.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Heartbeats {
    answered_by: String,
}

impl Status {
    /// Who answers this host's heartbeats, as it says it.
    pub(crate) fn answered_by(&self) -> String {
        let said = self.heartbeats.as_ref().map(|h| h.answered_by.clone());
        said.unwrap_or_else(|| "unknown".to_owned())
    }
}

/// How far a backup is behind its primary.
#[derive(Debug, Clone, Copy, Default, Deserialize, serde::Serialize)]
pub(crate) struct Lag {
    pub(crate) exits: u64,
    pub(crate) ms: f64,
    /// The most since the backup caught up.
    #[serde(default)]
    pub(crate) most_ms: f64,
}

/// A host took the VM over.
#[derive(Debug, Clone, Deserialize, serde::Serialize)]
pub(crate) struct Failover {
    pub(crate) cause: String,
    /// When the loss was noticed, in ms since 1970.
    pub(crate) at_unix_ms: u64,
    pub(crate) timeline: Vec<Part>,
}

/// A part of a takeover, and when it was done, in ms from when the loss was noticed.
#[derive(Debug, Clone, PartialEq, Deserialize, serde::Serialize)]
pub(crate) struct Part {
    pub(crate) name: String,
    pub(crate) ms: f64,
}

/// A transfer of the VM's state.
#[derive(Debug, Clone, Deserialize, serde::Serialize)]
pub(crate) struct Transfer {
    #[serde(default)]
    pub(crate) bytes: u64,
    /// How long the VM stood still, in ms.
    pub(crate) stop_ms: f64,
    /// How long it took, in ms.
    pub(crate) total_ms: f64,
}

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Api(PathBuf);

impl Api {
    pub(super) fn new(socket: PathBuf) -> Self {
        Self(socket)
    }

    /// What the VMM says, if it answers.
    pub(crate) fn status(&self) -> Option<Status> {
        serde_json::from_slice(&request(&self.0, "GET", "/v1/status", "").ok()?).ok()
    }

    /// What has happened there lately, as it says it, if it answers.
    pub(crate) fn events(&self) -> Option<String> {
        let path = "/v1/events?recent=true&follow=false";
        let said = request(&self.0, "GET", path, "").ok()?;
        Some(String::from_utf8_lossy(&said).into_owned())
    }

    /// Has a command done that takes nothing: `switch-over`, `power-off`.
    pub(crate) fn command(&self, name: &str) -> Result<(), Failure> {
        request(&self.0, "PUT", &format!("/v1/{name}"), "").map(drop)
    }

    /// States that a host holds nothing of the VM.
    pub(crate) fn host_gone(&self, host: &str) -> Result<(), Failure> {
        let body = serde_json::json!({ "host": host }).to_string();
        request(&self.0, "PUT", "/v1/host-gone", &body).map(drop)
    }
}

/// The body of the answer.
fn request(socket: &Path, method: &str, path: &str, body: &str) -> Result<Vec<u8>, Failure> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    stream.set_write_timeout(Some(ANSWER_LIMIT))?;
    let length = body.len();
    let asked = format!(
        "{method} {path} HTTP/1.0\r\nHost: pollux\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(asked.as_bytes())?;
    let mut answer = Vec::new();
    stream.take(LONGEST_ANSWER).read_to_end(&mut answer)?;
    let (head, body) = split(&answer).ok_or("an answer that is no HTTP")?;
    let status = head.split(' ').nth(1).unwrap_or_default();
    if status == "200" || status == "204" {
        Ok(body.to_vec())
    } else {
        let said = String::from_utf8_lossy(body);
        Err(format!("{method} {path}: {status}: {said}").into())
    }
}

fn split(answer: &[u8]) -> Option<(&str, &[u8])> {
    const END: &[u8] = b"\r\n\r\n";
    let at = answer.windows(END.len()).position(|bytes| bytes == END)?;
    let head = std::str::from_utf8(&answer[..at]).ok()?;
    let head = head.starts_with("HTTP/1.").then_some(head)?;
    Some((head, &answer[at + END.len()..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// Serves one request with these bytes, and gives the answer's reading and what was asked.
    fn ask(answer: &'static [u8]) -> (Option<Status>, String) {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("api");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = Vec::new();
            while !asked.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                asked.extend(byte);
            }
            stream.write_all(answer).unwrap();
            String::from_utf8(asked).unwrap()
        });
        let status = Api::new(socket).status();
        (status, server.join().unwrap())
    }

    #[test]
    fn a_status_is_read_and_unknown_fields_are_left() {
        let (status, asked) = ask(b"HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n\
            {\"role\":\"primary\",\"epoch\":3,\"protected\":true,\"lag\":{\"exits\":1,\"ms\":2.5,\"most_ms\":3}}");
        let status = status.unwrap();
        assert_eq!((status.role.as_str(), status.epoch), ("primary", Some(3)));
        assert!(status.protected && status.peer.is_none());
        assert_eq!((status.lag.exits, status.lag.ms), (1, 2.5));
        assert!(asked.starts_with("GET /v1/status HTTP/1.0\r\n"), "{asked}");
    }

    #[test]
    fn other_answers_are_no_status() {
        for answer in [
            &b""[..],
            b"HTTP/1.0 503 Busy\r\n\r\n{\"role\":\"primary\",\"protected\":true}",
            b"HTTP/1.0 200 OK\r\n\r\n{\"role\":",
            b"nonsense\r\n\r\n{}",
        ] {
            assert!(ask(answer).0.is_none());
        }
        assert!(Api::new("/nowhere".into()).status().is_none());
    }
}
