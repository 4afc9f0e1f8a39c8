//! One TCP connection: what is to be sent, what is on its way, what has come. It is opened once; when it
//! breaks, it stays broken.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::check::Span;
use super::keyspace::Task;
use super::live::Gap;
use super::resp::{Answer, Decoder};
use crate::monotonic::Moment;

/// How long the opening of a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes read at a time.
const READ_SIZE: usize = 64 << 10;

/// See the module.
#[derive(Debug)]
pub(super) struct Connection {
    number: u16,
    stream: TcpStream,
    out: Vec<u8>,
    decoder: Decoder,
    /// Tasks in the order in which they were asked, each with when.
    in_flight: VecDeque<(Task, Moment)>,
    last_answer: Moment,
    longest: Gap,
}

/// An answer with the task that it answers.
pub(super) struct Answered {
    pub(super) task: Task,
    pub(super) span: Span,
    pub(super) answer: Answer,
    /// The time without answers that this one ended.
    pub(super) gap: Gap,
}

impl Connection {
    /// Opens connection `number`.
    pub(super) fn open(number: u16, addr: SocketAddr) -> std::io::Result<Self> {
        let stream = TcpStream::connect_timeout(&addr, CONNECT_TIMEOUT)?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Self {
            number,
            stream,
            out: Vec::new(),
            decoder: Decoder::default(),
            in_flight: VecDeque::new(),
            last_answer: Moment::START,
            longest: Gap {
                connection: number,
                from: Moment::START,
                to: Moment::START,
            },
        })
    }

    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// How many requests are on their way.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// The longest time without an answer that ended in one.
    pub(super) fn longest_gap(&self) -> Gap {
        self.longest
    }

    /// Whether the socket took less than there is to send.
    pub(super) fn is_blocked(&self) -> bool {
        !self.out.is_empty()
    }

    /// Puts a task among those to be sent; `encode` appends its command. It counts as called from now.
    pub(super) fn ask(&mut self, task: Task, encode: impl FnOnce(&mut Vec<u8>)) {
        self.in_flight.push_back((task, Moment::now()));
        encode(&mut self.out);
    }

    /// Sends as much as the socket takes.
    ///
    /// # Errors
    /// Why the connection is broken.
    pub(super) fn send(&mut self) -> Result<(), String> {
        while !self.out.is_empty() {
            match self.stream.write(&self.out) {
                Ok(sent) => {
                    self.out.drain(..sent);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(())
    }

    /// Reads what has come, and gives it to `take`, answer by answer.
    ///
    /// # Errors
    /// Why the connection is broken.
    pub(super) fn receive(&mut self, mut take: impl FnMut(Answered)) -> Result<(), String> {
        let mut bytes = [0; READ_SIZE];
        let count = match self.stream.read(&mut bytes) {
            Ok(0) => return Err("closed by the server".to_owned()),
            Ok(count) => count,
            Err(error)
                if [ErrorKind::WouldBlock, ErrorKind::Interrupted].contains(&error.kind()) =>
            {
                return Ok(());
            }
            Err(error) => return Err(error.to_string()),
        };
        let now = Moment::now();
        self.decoder.put(&bytes[..count]);
        while let Some(answer) = self.decoder.next_answer().map_err(|e| e.to_string())? {
            let Some((task, call)) = self.in_flight.pop_front() else {
                return Err(format!("{answer:?} came, and nothing had been asked"));
            };
            let gap = Gap {
                connection: self.number,
                from: self.last_answer.max(call),
                to: now,
            };
            if gap.nanoseconds() > self.longest.nanoseconds() {
                self.longest = gap;
            }
            self.last_answer = now;
            take(Answered {
                task,
                span: Span { call, answer: now },
                answer,
                gap,
            });
        }
        Ok(())
    }

    /// What was asked and will not be answered any more.
    pub(super) fn unanswered(self) -> impl Iterator<Item = (Task, Span)> {
        self.in_flight.into_iter().map(|(task, call)| {
            let answer = Moment::NEVER;
            (task, Span { call, answer })
        })
    }
}
