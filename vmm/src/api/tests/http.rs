//! HTTP/1.1 by hand: what goes over the socket is what the test says.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

/// How long a test waits for what must come.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) head: String,
    pub(super) body: String,
}

impl Answer {
    pub(super) fn json(&self) -> Value {
        assert!(self.head.contains("application/json"), "{}", self.head);
        serde_json::from_str(&self.body).unwrap()
    }
}

pub(super) fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Sends bytes as they are, and reads the answer until the server hangs up.
pub(super) fn raw(path: &Path, bytes: &[u8]) -> Answer {
    let mut stream = connect(path);
    // A server that has seen enough may hang up before it has all.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    Answer {
        status: head.split(' ').nth(1).unwrap().parse().unwrap(),
        head: head.to_ascii_lowercase(),
        body: body.to_owned(),
    }
}

pub(super) fn request(path: &Path, method: &str, route: &str, body: &str) -> Answer {
    let len = body.len();
    let head = format!(
        "{method} {route} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
         Content-Length: {len}\r\n\r\n{body}"
    );
    raw(path, head.as_bytes())
}

pub(super) fn get(path: &Path, route: &str) -> Answer {
    request(path, "GET", route, "")
}

pub(super) fn put(path: &Path, route: &str, body: &str) -> Answer {
    request(path, "PUT", route, body)
}
