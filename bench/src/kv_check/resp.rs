//! The part of the Redis protocol (RESP 2) that a checking client needs: commands out, answers in.
//!
//! Source: <https://redis.io/docs/latest/develop/reference/protocol-spec/>. What comes in is not trusted:
//! an answer that is not well formed or larger than [`LARGEST_ANSWER`] is an error, and the connection it
//! came over is of no more use. Arrays are not read: no command that is sent here is answered by one.

/// Longest answer that is read, in bytes.
pub(crate) const LARGEST_ANSWER: usize = 1 << 20;
/// Longest line: of a status, an error, a number, a length.
const LONGEST_LINE: usize = 4096;

/// An answer of the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    /// `+OK` and the like.
    Status(String),
    /// `-ERR ...`
    Error(String),
    /// `:1`
    Number(i64),
    /// `$5 hello`
    Bulk(Vec<u8>),
    /// `$-1`
    Nil,
}

/// Bytes that are no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RespError {
    /// An answer begins with none of the known bytes.
    #[error("an answer begins with byte {0:#04x}")]
    UnknownType(u8),
    /// A line does not end, or has no number where one must be.
    #[error("a line of an answer is not well formed")]
    BadLine,
    /// A length is negative or too large.
    #[error("an answer says that it is {0} bytes long")]
    BadLength(i64),
    /// A bulk string does not end with a line end.
    #[error("a bulk string does not end where it should")]
    BadEnd,
}

/// Appends a command to what is to be sent.
pub(crate) fn put_command(out: &mut Vec<u8>, words: &[&[u8]]) {
    out.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words {
        out.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        out.extend_from_slice(word);
        out.extend_from_slice(b"\r\n");
    }
}

/// Puts answers together from bytes as they come.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    bytes: Vec<u8>,
    /// What of `bytes` has been returned.
    done: usize,
}

impl Decoder {
    /// Takes in bytes.
    pub(crate) fn put(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.done);
        self.done = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole answer, if there is one.
    ///
    /// # Errors
    /// What came is no answer; nothing after it can be read.
    pub(crate) fn next_answer(&mut self) -> Result<Option<Answer>, RespError> {
        let Some((answer, used)) = parse(&self.bytes[self.done..])? else {
            return Ok(None);
        };
        self.done += used;
        Ok(Some(answer))
    }
}

/// The first answer in `bytes`, and how long it is.
fn parse(bytes: &[u8]) -> Result<Option<(Answer, usize)>, RespError> {
    let Some(&kind) = bytes.first() else {
        return Ok(None);
    };
    if !b"+-:$".contains(&kind) {
        return Err(RespError::UnknownType(kind));
    }
    let Some((line, used)) = line(&bytes[1..])? else {
        return Ok(None);
    };
    let used = used + 1;
    let text = || String::from_utf8_lossy(line).into_owned();
    match kind {
        b'+' => Ok(Some((Answer::Status(text()), used))),
        b'-' => Ok(Some((Answer::Error(text()), used))),
        b':' => Ok(Some((Answer::Number(number(line)?), used))),
        _ => bulk(number(line)?, &bytes[used..])
            .map(|found| found.map(|(answer, more)| (answer, used + more))),
    }
}

/// The line at the start, without its end, and how long it is with it.
fn line(bytes: &[u8]) -> Result<Option<(&[u8], usize)>, RespError> {
    let Some(end) = bytes.iter().position(|&b| b == b'\n') else {
        return if bytes.len() > LONGEST_LINE {
            Err(RespError::BadLine)
        } else {
            Ok(None)
        };
    };
    let line = bytes[..end].strip_suffix(b"\r").ok_or(RespError::BadLine)?;
    Ok(Some((line, end + 1)))
}

fn number(line: &[u8]) -> Result<i64, RespError> {
    let text = std::str::from_utf8(line).map_err(|_| RespError::BadLine)?;
    text.parse().map_err(|_| RespError::BadLine)
}

fn bulk(length: i64, rest: &[u8]) -> Result<Option<(Answer, usize)>, RespError> {
    if length == -1 {
        return Ok(Some((Answer::Nil, 0)));
    }
    let size = usize::try_from(length).map_err(|_| RespError::BadLength(length))?;
    if size > LARGEST_ANSWER {
        return Err(RespError::BadLength(length));
    }
    match rest.get(size..size + 2) {
        None => Ok(None),
        Some(b"\r\n") => Ok(Some((Answer::Bulk(rest[..size].to_vec()), size + 2))),
        Some(_) => Err(RespError::BadEnd),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &[u8] = b"+OK\r\n:42\r\n$-1\r\n$5\r\nhe\r\no\r\n-ERR no\r\n$0\r\n\r\n";

    fn answers() -> Vec<Answer> {
        vec![
            Answer::Status("OK".into()),
            Answer::Number(42),
            Answer::Nil,
            Answer::Bulk(b"he\r\no".to_vec()),
            Answer::Error("ERR no".into()),
            Answer::Bulk(Vec::new()),
        ]
    }

    #[test]
    fn answers_are_the_same_however_the_bytes_come() {
        for step in 1..=STREAM.len() {
            let mut decoder = Decoder::default();
            let mut got = Vec::new();
            for part in STREAM.chunks(step) {
                decoder.put(part);
                while let Some(answer) = decoder.next_answer().unwrap() {
                    got.push(answer);
                }
            }
            assert_eq!(got, answers(), "in parts of {step}");
        }
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        let refuse = |bytes: &[u8]| {
            let mut decoder = Decoder::default();
            decoder.put(bytes);
            decoder.next_answer().unwrap_err()
        };
        assert_eq!(refuse(b"hello"), RespError::UnknownType(b'h'));
        assert_eq!(refuse(b":4x\r\n"), RespError::BadLine);
        assert_eq!(refuse(b"+OK\n"), RespError::BadLine);
        assert_eq!(refuse(b"$-2\r\n"), RespError::BadLength(-2));
        assert_eq!(
            refuse(b"$99999999999\r\n"),
            RespError::BadLength(99_999_999_999)
        );
        assert_eq!(refuse(b"$2\r\nabcd"), RespError::BadEnd);
        assert_eq!(refuse(&[b'+'; LONGEST_LINE + 2]), RespError::BadLine);
    }

    #[test]
    fn commands_are_arrays_of_bulk_strings() {
        let mut out = Vec::new();
        put_command(&mut out, &[b"SET", b"k", b"a\r\nb"]);
        assert_eq!(out, b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$4\r\na\r\nb\r\n");
    }
}
