//! The VMM's own metrics, asked for over its API and fitted to the format of the others.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(1);
/// Bytes of an answer at most.
const MAX_ANSWER: u64 = 1 << 20;

/// Asks a VMM.
pub(super) fn ask(socket: &Path) -> io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream
        .write_all(b"GET /v1/metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(MAX_ANSWER).read_to_string(&mut answer)?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .ok_or_else(|| io::Error::other("no whole answer"))?;
    let status = head.split(' ').nth(1).unwrap_or_default();
    if status != "200" {
        return Err(io::Error::other(format!("status {status}")));
    }
    Ok(fitted(body))
}

/// In OpenMetrics the name of a counter ends with `_total` in its samples and not in its description.
fn fitted(text: &str) -> String {
    let counters: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"))
        .collect();
    let mut fitted = String::new();
    for line in text
        .lines()
        .filter(|line| *line != "# EOF" && !line.is_empty())
    {
        let described = line
            .strip_prefix("# TYPE ")
            .or_else(|| line.strip_prefix("# HELP "))
            .and_then(|rest| rest.split(' ').next())
            .filter(|name| counters.contains(name));
        match described.and_then(|name| Some((name, name.strip_suffix("_total")?))) {
            Some((name, base)) => fitted += &line.replacen(name, base, 1),
            None => fitted += line,
        }
        fitted.push('\n');
    }
    fitted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_described_without_their_suffix() {
        let text = "# HELP pollux_exits_total exits\n# TYPE pollux_exits_total counter\n\
                    pollux_exits_total 7\n# TYPE pollux_x gauge\npollux_x 1\n# EOF\n";
        assert_eq!(
            fitted(text),
            "# HELP pollux_exits exits\n# TYPE pollux_exits counter\npollux_exits_total 7\n\
             # TYPE pollux_x gauge\npollux_x 1\n"
        );
    }

    #[test]
    fn a_vmm_that_refuses_or_is_not_there_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api");
        assert!(ask(&path).is_err());
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let serve = std::thread::spawn(move || {
            for answer in ["503 Busy\r\n\r\n", "200 OK\r\nX: y\r\n\r\npollux_x 1\n"] {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 512];
                let _ = stream.read(&mut request).unwrap();
                write!(stream, "HTTP/1.1 {answer}").unwrap();
            }
        });
        assert!(ask(&path).is_err());
        assert_eq!(ask(&path).unwrap(), "pollux_x 1\n");
        serve.join().unwrap();
    }
}
