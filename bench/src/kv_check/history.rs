//! What was asked of one key and answered, in the form that the checkers take.
//!
//! An answer that is none of this kind of key is a contradiction at once. What was not answered, or
//! refused, may have happened or not.

use super::check::{Span, Verdict, WriteId, register, sequence};
use super::resp::Answer;
use super::value;

/// What a key holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// One unique value at a time.
    Register,
    /// A number that is counted up.
    Counter,
    /// Unique tokens one after another.
    Log,
}

/// A request on a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    Set(WriteId),
    Get,
    Incr,
    Append(WriteId),
}

/// See the module.
#[derive(Debug)]
pub(super) struct History {
    kind: Kind,
    value_bytes: u32,
    of_register: Vec<register::Operation>,
    of_sequence: Vec<sequence::Operation>,
    /// What a log was last read to hold.
    content: Vec<WriteId>,
    verdict: Verdict,
    /// Something was not answered: what the key holds at last is not known for sure.
    is_open: bool,
}

/// What was answered does not fit what was asked.
struct Unfit;

impl History {
    pub(super) fn new(kind: Kind, value_bytes: u32) -> Self {
        Self {
            kind,
            value_bytes,
            of_register: Vec::new(),
            of_sequence: Vec::new(),
            content: Vec::new(),
            verdict: Verdict::default(),
            is_open: false,
        }
    }

    /// Takes in a request and its answer.
    pub(super) fn answered(&mut self, request: Request, span: Span, answer: &Answer) {
        let done = match self.kind {
            Kind::Register => self.register(request, span, answer),
            Kind::Counter | Kind::Log => self.sequence(request, span, answer),
        };
        if done.is_err() {
            self.verdict
                .contradict(|| format!("{request:?} was answered with {answer:?}"));
            self.unanswered(request, span);
        }
    }

    /// Takes in a request that got no answer, or an error.
    pub(super) fn unanswered(&mut self, request: Request, span: Span) {
        let span = Span {
            answer: crate::monotonic::Moment::NEVER,
            ..span
        };
        let add = |id| sequence::Operation {
            span,
            action: sequence::Action::Add { id, position: None },
        };
        match request {
            Request::Get => return,
            Request::Set(id) => self.of_register.push(register::Operation {
                span,
                action: register::Action::Write(id),
            }),
            Request::Incr => self.of_sequence.push(add(None)),
            Request::Append(id) => self.of_sequence.push(add(Some(id))),
        }
        self.is_open = true;
    }

    /// Whether something was not answered.
    pub(super) fn is_open(&self) -> bool {
        self.is_open
    }

    /// The verdict on all of it.
    pub(super) fn check(self) -> Verdict {
        let mut verdict = self.verdict;
        verdict.add(match self.kind {
            Kind::Register => register::check(&self.of_register),
            Kind::Counter | Kind::Log => sequence::check(&self.of_sequence, &self.content),
        });
        verdict
    }

    fn register(&mut self, request: Request, span: Span, answer: &Answer) -> Result<(), Unfit> {
        let action = match (request, answer) {
            (Request::Set(id), Answer::Status(said)) if said == "OK" => register::Action::Write(id),
            (Request::Get, Answer::Nil) => register::Action::Read(None),
            (Request::Get, Answer::Bulk(value)) => {
                let id = value::parse_register(value, self.value_bytes).ok_or(Unfit)?;
                register::Action::Read(Some(id))
            }
            _ => return Err(Unfit),
        };
        self.of_register.push(register::Operation { span, action });
        Ok(())
    }

    fn sequence(&mut self, request: Request, span: Span, answer: &Answer) -> Result<(), Unfit> {
        let add = |id, position| sequence::Action::Add {
            id,
            position: Some(position),
        };
        let action = match (request, answer) {
            (Request::Incr, Answer::Number(n)) => add(None, positive(*n)?),
            (Request::Append(id), Answer::Number(length)) => {
                let (length, token) = (positive(*length)?, value::TOKEN_LENGTH as u64);
                if length % token != 0 {
                    return Err(Unfit);
                }
                add(Some(id), length / token)
            }
            (Request::Get, Answer::Nil) => sequence::Action::Read(0),
            (Request::Get, Answer::Bulk(value)) => sequence::Action::Read(self.read(value)?),
            _ => return Err(Unfit),
        };
        self.of_sequence.push(sequence::Operation { span, action });
        Ok(())
    }

    /// How much a counter or a log was read to hold.
    fn read(&mut self, value: &[u8]) -> Result<u64, Unfit> {
        if self.kind == Kind::Counter {
            let text = std::str::from_utf8(value).map_err(|_| Unfit)?;
            return positive(text.parse().map_err(|_| Unfit)?);
        }
        let content = value::parse_log(value).ok_or(Unfit)?;
        let length = content.len() as u64;
        let common = content.len().min(self.content.len());
        if content[..common] != self.content[..common] {
            self.verdict
                .contradict(|| "a log was read with another beginning than before".to_owned());
            self.content = content;
        } else if content.len() > common {
            self.content = content;
        }
        Ok(length)
    }
}

fn positive(number: i64) -> Result<u64, Unfit> {
    u64::try_from(number).ok().filter(|n| *n > 0).ok_or(Unfit)
}
