//! Which keys there are, what is asked of them, and when their histories are checked.
//!
//! ```text
//!          limit reached          nothing in flight        answered
//! Working ───────────────> Closing ───────────────> Audited ───────> Retired <──> Read again
//!                                                                       └ too many: read, deleted
//! ```
//! Each connection has a register, a counter and a log of its own; some of each are shared by all. A slot
//! always has one working key; when that is closed a new one takes its place. A retired key has no history
//! any more, only what it held; it is read again at the end, or before it is deleted.

use std::collections::{BTreeMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

use rand::{Rng, RngExt};

use super::check::{Span, Verdict, WriteId};
use super::history::{History, Kind, Request};
use super::resp::{Answer, put_command};
use super::value;

/// Operations after which a key is closed, and its history checked and dropped.
pub(super) const OPERATIONS_OF_A_KEY: u32 = 1024;
/// The same for a log, which each of its reads carries whole.
const OPERATIONS_OF_A_LOG: u32 = 128;
/// How often the server is asked again to read a key, after errors.
const ATTEMPTS: u8 = 3;
/// Retired keys that are kept on the server.
pub(super) const RETIRED_KEPT: usize = 512;
/// Shared keys of each kind.
const SHARED: usize = 2;

const KINDS: [Kind; 3] = [Kind::Register, Kind::Counter, Kind::Log];

/// Number of a key: no two ever have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct KeyId(u64);

/// One thing to send.
#[derive(Debug, Clone, Copy)]
pub(super) struct Task {
    pub(super) key: KeyId,
    pub(super) what: What,
}

/// What a task does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// An operation of the key's history.
    Ask(Request),
    /// Reads a retired key again.
    ReadAgain,
    /// Deletes a retired key.
    Delete,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Working,
    Closing,
    Audited,
    /// What it held: a digest of the answer to the audit.
    Retired(u64),
    /// The same, and to be deleted once it has been read again.
    Doomed(u64),
}

#[derive(Debug)]
struct Key {
    name: String,
    kind: Kind,
    phase: Phase,
    begun: u32,
    in_flight: u32,
    /// Reads of the whole that failed.
    failed: u8,
    history: History,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Keyspace {
    prefix: String,
    value_bytes: u32,
    keys: BTreeMap<KeyId, Key>,
    /// The working keys: those of connection 0, of 1, ..., then the shared ones.
    slots: Vec<KeyId>,
    /// Reads and deletions to be sent before anything else.
    errands: VecDeque<Task>,
    retired: VecDeque<KeyId>,
    next_key: u64,
    next_write: Vec<u32>,
    checked: u64,
    verdict: Verdict,
}

impl Keyspace {
    /// Keys for so many connections. The prefix must be new on the server: keys are taken to be empty.
    pub(super) fn new(prefix: String, connections: u16, value_bytes: u32) -> Self {
        let mut keyspace = Self {
            prefix,
            value_bytes,
            keys: BTreeMap::new(),
            slots: Vec::new(),
            errands: VecDeque::new(),
            retired: VecDeque::new(),
            next_key: 0,
            next_write: vec![0; connections.into()],
            checked: 0,
            verdict: Verdict::default(),
        };
        for slot in 0..(usize::from(connections) + SHARED) * KINDS.len() {
            let id = keyspace.new_key(KINDS[slot % KINDS.len()]);
            keyspace.slots.push(id);
        }
        keyspace
    }

    fn new_key(&mut self, kind: Kind) -> KeyId {
        let id = KeyId(self.next_key);
        self.next_key += 1;
        let key = Key {
            name: format!("{}:{:?}:{}", self.prefix, kind, id.0),
            kind,
            phase: Phase::Working,
            begun: 0,
            in_flight: 0,
            failed: 0,
            history: History::new(kind, self.value_bytes),
        };
        self.keys.insert(id, key);
        id
    }

    fn key(&mut self, id: KeyId) -> &mut Key {
        self.keys
            .get_mut(&id)
            .expect("a key stays as long as anything of it is in flight")
    }

    /// What this connection is to send next.
    pub(super) fn next_task(&mut self, connection: u16, rng: &mut impl Rng) -> Task {
        if let Some(errand) = self.next_errand() {
            return errand;
        }
        let own = usize::from(connection) * KINDS.len();
        let shared = self.slots.len() - SHARED * KINDS.len();
        let slot = if rng.random_bool(0.5) {
            own + rng.random_range(0..KINDS.len())
        } else {
            rng.random_range(shared..self.slots.len())
        };
        let id = self.slots[slot];
        let is_write = rng.random_bool(0.5);
        let request = match (self.key(id).kind, is_write) {
            (_, false) => Request::Get,
            (Kind::Register, true) => Request::Set(self.new_write(connection)),
            (Kind::Counter, true) => Request::Incr,
            (Kind::Log, true) => Request::Append(self.new_write(connection)),
        };
        let key = self.key(id);
        key.begun += 1;
        key.in_flight += 1;
        let limit = match key.kind {
            Kind::Log => OPERATIONS_OF_A_LOG,
            Kind::Register | Kind::Counter => OPERATIONS_OF_A_KEY,
        };
        if key.begun == limit {
            key.phase = Phase::Closing;
            let kind = key.kind;
            self.slots[slot] = self.new_key(kind);
        }
        Task {
            key: id,
            what: What::Ask(request),
        }
    }

    /// A read or deletion that is due, if there is one.
    pub(super) fn next_errand(&mut self) -> Option<Task> {
        let task = self.errands.pop_front()?;
        self.key(task.key).in_flight += 1;
        Some(task)
    }

    fn new_write(&mut self, connection: u16) -> WriteId {
        let next = &mut self.next_write[usize::from(connection)];
        let sequence = *next;
        *next = next
            .checked_add(1)
            .expect("fewer than 2^32 writes in a run");
        WriteId {
            connection,
            sequence,
        }
    }

    /// Appends the command of a task to what is to be sent.
    pub(super) fn encode(&self, task: Task, out: &mut Vec<u8>) {
        let name = self.name(task.key).as_bytes();
        match task.what {
            What::Ask(Request::Set(id)) => {
                put_command(out, &[b"SET", name, &value::register(id, self.value_bytes)]);
            }
            What::Ask(Request::Append(id)) => {
                put_command(out, &[b"APPEND", name, &value::token(id)])
            }
            What::Ask(Request::Incr) => put_command(out, &[b"INCR", name]),
            What::Ask(Request::Get) | What::ReadAgain => put_command(out, &[b"GET", name]),
            What::Delete => put_command(out, &[b"DEL", name]),
        }
    }

    /// The key's name.
    pub(super) fn name(&self, key: KeyId) -> &str {
        self.keys.get(&key).map_or("", |k| &k.name)
    }

    /// A task was answered, and not by an error.
    pub(super) fn answered(&mut self, task: Task, span: Span, answer: &Answer) {
        let key = self.key(task.key);
        key.in_flight -= 1;
        match task.what {
            What::Ask(request) => {
                key.history.answered(request, span, answer);
                if key.phase == Phase::Audited {
                    self.retire(task.key, digest(answer));
                } else {
                    self.audit_if_idle(task.key);
                }
            }
            What::ReadAgain => self.compare(task.key, digest(answer)),
            What::Delete => self.deleted(task.key, answer),
        }
    }

    /// A task got no answer, or an error.
    pub(super) fn unanswered(&mut self, task: Task, span: Span) {
        let key = self.key(task.key);
        key.in_flight -= 1;
        match task.what {
            What::Ask(request) => {
                key.history.unanswered(request, span);
                if key.phase == Phase::Audited {
                    // The audit itself: another connection may have more luck.
                    key.phase = Phase::Closing;
                    key.failed += 1;
                }
                self.audit_if_idle(task.key);
            }
            What::ReadAgain => {
                key.failed += 1;
                if key.failed < ATTEMPTS {
                    self.errands.push_back(task);
                }
            }
            What::Delete => {
                self.keys.remove(&task.key);
            }
        }
    }

    fn audit_if_idle(&mut self, id: KeyId) {
        let key = self.key(id);
        if key.phase == Phase::Closing && key.in_flight == 0 && key.failed < ATTEMPTS {
            key.phase = Phase::Audited;
            self.errands.push_back(Task {
                key: id,
                what: What::Ask(Request::Get),
            });
        }
    }

    /// The history of a key is complete: checks and drops it.
    fn retire(&mut self, id: KeyId, held: u64) {
        let key = self.key(id);
        key.phase = Phase::Retired(held);
        let empty = History::new(key.kind, 0);
        let history = std::mem::replace(&mut key.history, empty);
        let is_known = !history.is_open();
        self.judge(id, history.check());
        self.checked += 1;
        if is_known {
            self.retired.push_back(id);
        } else {
            // A request that was not answered may still take effect: nothing is expected of this key.
            self.keys.remove(&id);
        }
        if self.retired.len() > RETIRED_KEPT
            && let Some(oldest) = self.retired.pop_front()
        {
            let key = self.key(oldest);
            key.failed = 0;
            if let Phase::Retired(held) = key.phase {
                key.phase = Phase::Doomed(held);
            }
            let what = What::ReadAgain;
            self.errands.push_back(Task { key: oldest, what });
        }
    }

    /// What a retired key holds must not change.
    fn compare(&mut self, id: KeyId, holds: u64) {
        let phase = self.key(id).phase;
        if phase != Phase::Retired(holds) && phase != Phase::Doomed(holds) {
            let mut verdict = Verdict::default();
            verdict.lose(|| "what it held when it was closed is gone".to_owned());
            self.judge(id, verdict);
        }
        if matches!(phase, Phase::Doomed(_)) {
            let what = What::Delete;
            self.errands.push_back(Task { key: id, what });
        }
    }

    fn deleted(&mut self, id: KeyId, answer: &Answer) {
        if *answer != Answer::Number(1) {
            let mut verdict = Verdict::default();
            verdict.contradict(|| format!("DEL was answered with {answer:?}"));
            self.judge(id, verdict);
        }
        self.keys.remove(&id);
    }

    fn judge(&mut self, id: KeyId, mut verdict: Verdict) {
        let name = self.name(id).to_owned();
        for line in &mut verdict.described {
            *line = format!("{name}: {line}");
        }
        self.verdict.add(verdict);
    }

    /// No more is asked of any key: all are to be audited, and the retired ones read again.
    pub(super) fn close(&mut self) {
        let working: Vec<KeyId> = self.slots.drain(..).collect();
        for id in working {
            self.key(id).phase = Phase::Closing;
            self.audit_if_idle(id);
        }
        for key in self.retired.drain(..) {
            self.errands.push_back(Task {
                key,
                what: What::ReadAgain,
            });
        }
    }

    /// Checks what could not be audited, at the very end. The number of keys whose histories were checked,
    /// and the verdict on all.
    pub(super) fn finish(mut self) -> (u64, Verdict) {
        let rest: Vec<KeyId> = self.keys.keys().copied().collect();
        for id in rest {
            let Some(key) = self.keys.remove(&id) else {
                continue;
            };
            if !matches!(key.phase, Phase::Retired(_) | Phase::Doomed(_)) {
                let mut verdict = key.history.check();
                for line in &mut verdict.described {
                    *line = format!("{}: {line}", key.name);
                }
                self.verdict.add(verdict);
                self.checked += 1;
            }
        }
        (self.checked, self.verdict)
    }

    /// Lost and contradictory so far.
    pub(super) fn findings(&self) -> (u64, u64) {
        (self.verdict.lost, self.verdict.contradictory)
    }
}

fn digest(answer: &Answer) -> u64 {
    let mut hasher = DefaultHasher::new();
    match answer {
        Answer::Bulk(value) => value.hash(&mut hasher),
        other => format!("{other:?}").hash(&mut hasher),
    }
    hasher.finish()
}
