//! A small Redis server that can be told to lie.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::super::Live;

/// What is wrong with a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    Nothing,
    /// Acknowledges a write and does not do it.
    LosesWrites,
    /// Answers a read with what was there one write before.
    AnswersStale,
    /// Acknowledges a write and does it some commands later.
    WritesLate,
    /// Answers two commands that came together in the wrong order.
    SwapsAnswers,
    /// Does a write twice.
    WritesTwice,
    /// Goes back to all that it held some time before, once.
    GoesBack,
    /// Changes a byte of a value that it returns.
    Garbles,
    /// Answers a read with what another key holds.
    MixesKeys,
    /// Answers with an error.
    Refuses,
    /// Closes a connection, once.
    HangsUp,
    /// Sends what is no answer, once.
    Babbles,
    /// Sends an answer that nobody asked for, once.
    Volunteers,
    /// Stops answering one connection.
    FallsSilent,
}

/// A fault strikes each so many commands; a prime, so that it meets all kinds of them.
const STRIKES_EVERY: u64 = 97;
/// How many commands pass before a late write is done.
const LATE: u64 = 40;
/// How many commands the state is old to which a server goes back.
const BACK: u64 = 50;

type Keys = BTreeMap<Vec<u8>, Vec<u8>>;

#[derive(Default)]
struct Store {
    keys: Keys,
    before: Keys,
    saved: Keys,
    commands: u64,
    late: Vec<(u64, Vec<Vec<u8>>)>,
    has_struck: bool,
}

pub(super) struct Server {
    pub(super) addr: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    fault: Fault,
    store: Mutex<Store>,
    served: AtomicU64,
    live: Arc<Live>,
    stop_after: u64,
}

impl Server {
    /// A server for so many connections, that ends the check after so many commands.
    pub(super) fn start(fault: Fault, connections: u16, stop_after: u64, live: &Arc<Live>) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let addr = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            fault,
            store: Mutex::default(),
            served: AtomicU64::new(0),
            live: Arc::clone(live),
            stop_after,
        });
        let server = Self {
            addr,
            shared: Arc::clone(&shared),
        };
        // Threads end with their connections.
        std::thread::spawn(move || {
            for _ in 0..connections {
                let (stream, _) = listener.accept().unwrap();
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || shared.serve(&stream));
            }
        });
        server
    }

    pub(super) fn keys_held(&self) -> usize {
        self.shared.store.lock().unwrap().keys.len()
    }
}

impl Shared {
    fn serve(&self, stream: &TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream);
        let mut held: Option<Vec<u8>> = None;
        loop {
            let command = read_command(&mut reader)?;
            let (answer, strikes) = self.execute(&command);
            if self.served.fetch_add(1, Ordering::Relaxed) + 1 == self.stop_after {
                self.live.stop();
            }
            let more = !reader.buffer().is_empty();
            let mut out = answer;
            match self.fault {
                Fault::HangsUp if strikes => return None,
                Fault::Babbles if strikes => out = b"?what\r\n".to_vec(),
                Fault::Volunteers if strikes => out.extend_from_slice(b"+OK\r\n"),
                Fault::FallsSilent if strikes => {
                    while read_command(&mut reader).is_some() {}
                    return None;
                }
                Fault::SwapsAnswers if strikes && more && held.is_none() => {
                    held = Some(out);
                    continue;
                }
                _ => {}
            }
            out.extend(held.take().unwrap_or_default());
            (&*stream).write_all(&out).ok()?;
        }
    }

    /// The answer, and whether the fault is to strike now.
    fn execute(&self, command: &[Vec<u8>]) -> (Vec<u8>, bool) {
        let mut store = self.store.lock().unwrap();
        store.commands += 1;
        let now = store.commands;
        let mut strikes = now.is_multiple_of(STRIKES_EVERY);
        let once = [
            Fault::HangsUp,
            Fault::Babbles,
            Fault::Volunteers,
            Fault::FallsSilent,
        ];
        if once.contains(&self.fault) && strikes {
            strikes = !store.has_struck;
            store.has_struck = true;
        }
        while let Some(at) = store.late.iter().position(|(due, _)| *due <= now) {
            let (_, command) = store.late.remove(at);
            store.apply(&command);
        }
        if self.fault == Fault::GoesBack {
            if now == 10 * BACK {
                store.saved = store.keys.clone();
            } else if now == 11 * BACK {
                store.keys = store.saved.clone();
            }
        }
        let is_write = command[0] != b"GET";
        let answer = match self.fault {
            Fault::Refuses if strikes => b"-LOADING not now\r\n".to_vec(),
            Fault::LosesWrites if strikes && is_write => {
                let mut copy = Store {
                    keys: store.keys.clone(),
                    ..Store::default()
                };
                copy.apply(command)
            }
            Fault::WritesLate if strikes && command[0] == b"SET" => {
                store.late.push((now + LATE, command.to_vec()));
                b"+OK\r\n".to_vec()
            }
            Fault::WritesTwice if strikes && is_write => {
                let answer = store.apply(command);
                store.apply(command);
                answer
            }
            Fault::AnswersStale if now.is_multiple_of(7) && !is_write => {
                bulk(store.before.get(&command[1]))
            }
            Fault::MixesKeys if strikes && !is_write => bulk(store.keys.values().next()),
            Fault::Garbles if strikes && !is_write => {
                let mut answer = store.apply(command);
                let at = answer.len() - 4;
                answer[at] ^= 1;
                answer
            }
            _ => store.apply(command),
        };
        (answer, strikes)
    }
}

impl Store {
    fn apply(&mut self, command: &[Vec<u8>]) -> Vec<u8> {
        let key = command[1].clone();
        let old = self.keys.get(&key).cloned();
        let answer = match command[0].as_slice() {
            b"GET" => return bulk(old.as_ref()),
            b"DEL" => {
                let there = self.keys.remove(&key).is_some();
                return format!(":{}\r\n", u8::from(there)).into_bytes();
            }
            b"SET" => {
                self.keys.insert(key.clone(), command[2].clone());
                b"+OK\r\n".to_vec()
            }
            b"INCR" => {
                let text = String::from_utf8(old.clone().unwrap_or_else(|| b"0".to_vec())).unwrap();
                let next = (text.parse::<i64>().unwrap() + 1).to_string();
                self.keys.insert(key.clone(), next.clone().into_bytes());
                format!(":{next}\r\n").into_bytes()
            }
            b"APPEND" => {
                let value = self.keys.entry(key.clone()).or_default();
                value.extend_from_slice(&command[2]);
                format!(":{}\r\n", value.len()).into_bytes()
            }
            other => panic!("a command that no client sends: {other:?}"),
        };
        if let Some(old) = old {
            self.before.insert(key, old);
        }
        answer
    }
}

fn bulk(value: Option<&Vec<u8>>) -> Vec<u8> {
    let Some(value) = value else {
        return b"$-1\r\n".to_vec();
    };
    let mut out = format!("${}\r\n", value.len()).into_bytes();
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
    out
}

fn read_command(reader: &mut impl BufRead) -> Option<Vec<Vec<u8>>> {
    let number = |reader: &mut dyn BufRead, mark: char| {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        line.trim_end().strip_prefix(mark)?.parse::<usize>().ok()
    };
    let words = number(reader, '*')?;
    (0..words)
        .map(|_| {
            let mut word = vec![0; number(reader, '$')? + 2];
            reader.read_exact(&mut word).ok()?;
            word.truncate(word.len() - 2);
            Some(word)
        })
        .collect()
}
