//! The file of all requests and answers, one JSON object a line:
//! `{"connection":0,"key":"kv:...","do":"Set(0000.0000002a)","call":1,"answer":2,"got":"+OK"}`. Times are
//! nanoseconds of CLOCK_MONOTONIC; without an answer there is neither `answer` nor `got`.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use super::check::Span;
use super::resp::Answer;

#[derive(serde::Serialize)]
struct Line<'a> {
    connection: u16,
    key: &'a str,
    #[serde(rename = "do")]
    what: String,
    call: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    answer: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    got: Option<String>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Journal(BufWriter<File>);

impl Journal {
    pub(super) fn create(path: &Path) -> std::io::Result<Self> {
        Ok(Self(BufWriter::new(File::create(path)?)))
    }

    /// Writes one request, with its answer if one came.
    pub(super) fn write(
        &mut self,
        connection: u16,
        key: &str,
        what: impl std::fmt::Debug,
        span: Span,
        got: Option<&Answer>,
    ) -> std::io::Result<()> {
        let line = Line {
            connection,
            key,
            what: format!("{what:?}"),
            call: span.call.0,
            answer: got.map(|_| span.answer.0),
            got: got.map(text),
        };
        serde_json::to_writer(&mut self.0, &line)?;
        self.0.write_all(b"\n")
    }

    pub(super) fn close(mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

fn text(answer: &Answer) -> String {
    match answer {
        Answer::Status(text) => format!("+{text}"),
        Answer::Error(text) => format!("-{text}"),
        Answer::Number(number) => format!(":{number}"),
        Answer::Bulk(value) => format!("${}", String::from_utf8_lossy(value)),
        Answer::Nil => "nil".to_owned(),
    }
}
