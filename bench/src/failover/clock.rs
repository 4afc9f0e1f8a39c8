//! How far the guest's clock is from the host's.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use harness::Host;

use super::results::CLOCK_DRIFT;
use crate::Failure;
use crate::report::{Measure, Report};
use crate::stage::GUEST_REDIS;

/// How long an answer is waited for.
const LIMIT: Duration = Duration::from_secs(20);
/// How often the clock is read: the quickest answer says most.
const READINGS: usize = 5;
/// What a reader of the drift must know.
const NOTE: &str =
    "of the guest's clock against the host's, from before the first failure to after the last";
/// A guest's clock that is further off than this has lost time.
const MAY_DRIFT_MS: f64 = 1000.0;

/// Adds the drift to a report.
pub(super) fn report(drift_ms: f64, report: &mut Report) {
    report.push(Measure::value(CLOCK_DRIFT, "ms", drift_ms).noted(NOTE));
    if drift_ms > MAY_DRIFT_MS {
        report.fail(format!(
            "the guest's clock is off by {drift_ms:.0} ms more than before"
        ));
    }
}

/// How many ms the guest's clock is ahead.
pub(super) fn guest_is_off_ms(client: &Host) -> Result<f64, Failure> {
    let mut stream = client.run(|| TcpStream::connect_timeout(&GUEST_REDIS, LIMIT))?;
    stream.set_read_timeout(Some(LIMIT))?;
    let mut best: Option<(Duration, f64)> = None;
    for _ in 0..READINGS {
        let asked = Instant::now();
        stream.write_all(b"TIME\r\n")?;
        let guest_ms = read_time(&mut stream)?;
        let took = asked.elapsed();
        let now_ms = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64() * 1e3;
        let off = guest_ms - (now_ms - took.as_secs_f64() * 1e3 / 2.0);
        if best.is_none_or(|(quickest, _)| took < quickest) {
            best = Some((took, off));
        }
    }
    Ok(best.map_or(0.0, |(_, off)| off))
}

/// An answer to TIME: an array of two strings, seconds and microseconds.
fn read_time(stream: &mut impl Read) -> Result<f64, Failure> {
    let mut text = String::new();
    while text.lines().count() < 5 || !text.ends_with("\r\n") {
        let mut buffer = [0; 256];
        let len = stream.read(&mut buffer)?;
        if len == 0 {
            return Err("the guest's server has closed the connection".into());
        }
        text += std::str::from_utf8(&buffer[..len])?;
    }
    let lines: Vec<&str> = text.lines().collect();
    let (seconds, micros): (f64, f64) = (lines[2].parse()?, lines[4].parse()?);
    Ok(seconds * 1e3 + micros / 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_is_read_from_the_answer() {
        let mut answer = &b"*2\r\n$10\r\n1700000000\r\n$6\r\n250000\r\n"[..];
        let ms = read_time(&mut answer).unwrap();
        assert!((ms - 1_700_000_000_250.0).abs() < 0.5);
        assert!(read_time(&mut &b"*2\r\n"[..]).is_err());
    }
}
