//! The loop of the checking client: one thread that waits for answers on all connections, and asks the next
//! thing where one came.
//!
//! ```text
//! Working ── time is up, or told to stop ──> Closing ── all answered, or patience is over ──> done
//! ```
//! While closing, what is on its way is waited for, every key is read once more, and nothing else is asked.

use std::os::fd::AsFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hdrhistogram::Histogram;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rustix::event::{Timespec, epoll};

use super::check::Span;
use super::connection::{Answered, Connection};
use super::journal::Journal;
use super::keyspace::{Keyspace, Task};
use super::live::{Gap, Live};
use super::outcome::{Break, Outcome};
use super::resp::Answer;
use super::{KvError, Options};
use crate::monotonic::Moment;

/// Longest wait for an answer before the clock and the wish to stop are looked at.
const LOOK_EVERY: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};
/// Refusals that are kept in words.
const REFUSALS_KEPT: usize = 8;

/// See the module.
pub(super) struct Client<'a> {
    options: &'a Options,
    live: &'a Live,
    seed: u64,
    rng: ChaCha8Rng,
    epoll: std::os::fd::OwnedFd,
    /// `None` where a connection broke.
    connections: Vec<Option<Connection>>,
    keyspace: Keyspace,
    journal: Option<Journal>,
    started: Moment,
    is_closing: bool,
    latency: Histogram<u64>,
    longest: Vec<Gap>,
    broken: Vec<Break>,
    refused: u64,
    refusals: Vec<String>,
    unanswered: u64,
}

impl<'a> Client<'a> {
    /// Opens all connections.
    pub(super) fn connect(options: &'a Options, live: &'a Live) -> Result<Self, KvError> {
        let seed = options.seed.unwrap_or_else(|| rand::rng().random());
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(wait_failed)?;
        let journal = options.history.as_deref().map(Journal::create);
        let mut connections = Vec::new();
        for number in 0..options.connections {
            let addr = options.addr;
            let connection = Connection::open(number, addr)
                .map_err(|source| KvError::Connect { addr, source })?;
            let data = epoll::EventData::new_u64(number.into());
            epoll::add(&epoll, connection.stream(), data, epoll::EventFlags::IN)
                .map_err(wait_failed)?;
            connections.push(Some(connection));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        // New on any server, even if the seed is not.
        let prefix = format!("kv:{:x}:{seed:x}", now.map_or(0, |n| n.as_nanos()));
        let empty = |connection| Gap {
            connection,
            from: Moment::START,
            to: Moment::START,
        };
        Ok(Self {
            options,
            live,
            seed,
            rng: ChaCha8Rng::seed_from_u64(seed),
            epoll,
            connections,
            keyspace: Keyspace::new(prefix, options.connections, options.value_bytes),
            journal: journal.transpose().map_err(KvError::Journal)?,
            started: Moment::now(),
            is_closing: false,
            latency: Histogram::new(3).expect("3 digits are legal"),
            longest: (0..options.connections).map(empty).collect(),
            broken: Vec::new(),
            refused: 0,
            refusals: Vec::new(),
            unanswered: 0,
        })
    }

    /// Asks until the time is up, waits for the last answers, and checks them all.
    pub(super) fn run(mut self) -> Result<Outcome, KvError> {
        let deadline = self.started.plus(seconds(self.options.seconds));
        let mut asked_until = None;
        let mut last_progress = (0, self.started);
        loop {
            let now = Moment::now();
            if self.live.is_aborted() {
                return Err(KvError::Aborted);
            }
            if !self.is_closing && (now >= deadline || self.live.is_stopped()) {
                self.is_closing = true;
                asked_until = Some(now);
                self.keyspace.close();
            }
            self.ask_all()?;
            if self.is_over() {
                break;
            }
            if last_progress.0 != self.live.answers() || !self.is_closing {
                last_progress = (self.live.answers(), now);
            }
            if now >= last_progress.1.plus(seconds(self.options.patience)) {
                self.break_all("no answer came, and patience was over")?;
                break;
            }
            self.receive()?;
        }
        self.finish(asked_until.unwrap_or_else(Moment::now))
    }

    /// Whether nothing can come any more: all is closed and answered, or broken.
    fn is_over(&self) -> bool {
        let open = || self.connections.iter().flatten();
        open().next().is_none() || (self.is_closing && open().all(|c| c.in_flight() == 0))
    }

    /// Gives each connection as many requests as it may have on their way.
    fn ask_all(&mut self) -> Result<(), KvError> {
        for number in 0..self.connections.len() {
            if let Err(why) = self.ask(number) {
                self.break_one(number, &why)?;
            }
        }
        Ok(())
    }

    fn ask(&mut self, number: usize) -> Result<(), String> {
        let Some(connection) = &mut self.connections[number] else {
            return Ok(());
        };
        let was_blocked = connection.is_blocked();
        let rests = self.live.is_resting() && !self.is_closing;
        while !rests && connection.in_flight() < self.options.pipeline.into() {
            let id = u16::try_from(number).expect("as many connections as a u16 counts");
            let task = if self.is_closing {
                let Some(errand) = self.keyspace.next_errand() else {
                    break;
                };
                errand
            } else {
                self.keyspace.next_task(id, &mut self.rng)
            };
            connection.ask(task, |out| self.keyspace.encode(task, out));
        }
        connection.send()?;
        if connection.is_blocked() != was_blocked {
            let mut flags = epoll::EventFlags::IN;
            flags.set(epoll::EventFlags::OUT, connection.is_blocked());
            let data = epoll::EventData::new_u64(number as u64);
            epoll::modify(&self.epoll, connection.stream(), data, flags)
                .map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    /// Waits for answers, and takes in those that came.
    fn receive(&mut self) -> Result<(), KvError> {
        let mut events = Vec::with_capacity(self.connections.len());
        let spare = rustix::buffer::spare_capacity(&mut events);
        match epoll::wait(self.epoll.as_fd(), spare, Some(&LOOK_EVERY)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(wait_failed(error)),
        }
        for event in events {
            let number = usize::try_from(event.data.u64()).expect("the number of a connection");
            let Some(connection) = &mut self.connections[number] else {
                continue;
            };
            let mut came = Vec::new();
            let received = connection.receive(|answered| came.push(answered));
            for answered in came {
                self.take(number, &answered)?;
            }
            if let Err(why) = received {
                self.break_one(number, &why)?;
            }
        }
        Ok(())
    }

    fn take(&mut self, number: usize, answered: &Answered) -> Result<(), KvError> {
        let Answered {
            task,
            span,
            answer,
            gap,
        } = answered;
        self.latency
            .record(span.answer.since(span.call).max(1))
            .expect("it grows as needed");
        self.live.answer(*gap);
        self.write(number, *task, *span, Some(answer))?;
        if let Answer::Error(said) = answer {
            self.refused += 1;
            if self.refusals.len() < REFUSALS_KEPT {
                self.refusals.push(said.clone());
            }
            self.keyspace.unanswered(*task, *span);
        } else {
            self.keyspace.answered(*task, *span, answer);
        }
        self.live.find(self.keyspace.findings());
        Ok(())
    }

    fn break_one(&mut self, number: usize, why: &str) -> Result<(), KvError> {
        let Some(connection) = self.connections[number].take() else {
            return Ok(());
        };
        let gap = connection.longest_gap();
        self.longest[number] = gap;
        self.live.break_one(gap.connection);
        self.broken.push(Break {
            connection: gap.connection,
            at: Moment::now(),
            why: why.to_owned(),
        });
        for (task, span) in connection.unanswered() {
            self.unanswered += 1;
            self.write(number, task, span, None)?;
            self.keyspace.unanswered(task, span);
        }
        Ok(())
    }

    fn break_all(&mut self, why: &str) -> Result<(), KvError> {
        for number in 0..self.connections.len() {
            let waits = self.connections[number]
                .as_ref()
                .is_some_and(|c| c.in_flight() > 0);
            if waits {
                self.break_one(number, why)?;
            }
        }
        Ok(())
    }

    fn write(
        &mut self,
        number: usize,
        task: Task,
        span: Span,
        answer: Option<&Answer>,
    ) -> Result<(), KvError> {
        let Some(journal) = &mut self.journal else {
            return Ok(());
        };
        let connection = u16::try_from(number).expect("as many connections as a u16 counts");
        let key = self.keyspace.name(task.key);
        journal
            .write(connection, key, task.what, span, answer)
            .map_err(KvError::Journal)
    }

    fn finish(mut self, asked_until: Moment) -> Result<Outcome, KvError> {
        for connection in self.connections.iter().flatten() {
            let gap = connection.longest_gap();
            self.longest[usize::from(gap.connection)] = gap;
        }
        if let Some(journal) = self.journal.take() {
            journal.close().map_err(KvError::Journal)?;
        }
        let (keys, verdict) = self.keyspace.finish();
        self.live.find((verdict.lost, verdict.contradictory));
        Ok(Outcome {
            seed: self.seed,
            started: self.started,
            seconds: asked_until.seconds_since(self.started),
            answers: self.latency.len(),
            unanswered: self.unanswered,
            keys,
            verdict,
            refused: self.refused,
            refusals: self.refusals,
            broken: self.broken,
            latency: self.latency,
            longest_gaps: self.longest,
        })
    }
}

fn wait_failed(error: rustix::io::Errno) -> KvError {
    KvError::Wait(error.into())
}

fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}
