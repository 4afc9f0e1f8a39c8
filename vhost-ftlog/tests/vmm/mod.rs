//! VMM-side processes that can be killed: this test binary, started again with a part to play.
//!
//! The test looks at the arenas of its processes itself, so that it sees what was published,
//! acknowledged and committed even after they are dead.
#![allow(dead_code, clippy::unwrap_used)]

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use format::{FrameFlags, Seq, SessionId};
use ring::{ArenaLayout, MappedVring, Mapping, RingMemory};
use vhost_ftlog::config_space::{Reach, Role};
use vhost_ftlog::frontend::{Channel, ChannelEvent, LogConsumer};
use vhost_ftlog::notice::Notice;

use crate::rig::{Host, Rig, bytes_of};

const LIMIT: Duration = Duration::from_secs(30);
/// What a producer process publishes at most: positions stay within 16 bits.
const MAX_APPENDS: u64 = 60_000;

/// Append `i`: its length, its number, and bytes that only it has.
pub(crate) fn append_of(i: u64) -> Vec<u8> {
    let body = bytes_of(i, (i as usize * 131) % 3000);
    let mut append = Vec::with_capacity(12 + body.len());
    append.extend_from_slice(&(body.len() as u32).to_le_bytes());
    append.extend_from_slice(&i.to_le_bytes());
    append.extend_from_slice(&body);
    append
}

/// Checks that every append comes once, whole and in order.
#[derive(Default)]
pub(crate) struct Checker {
    pub(crate) next: u64,
    pub(crate) ended: bool,
}

impl Checker {
    /// Reads and releases all that is committed.
    pub(crate) fn read(&mut self, consumer: &mut LogConsumer) {
        while let Some(frame) = consumer.next_frame().unwrap() {
            assert!(!self.ended, "a frame after END");
            assert_eq!(frame.header.first, Seq(self.next));
            if frame.header.flags.contains(FrameFlags::END) {
                self.ended = true;
                continue;
            }
            let mut rest = frame.body;
            for _ in 0..frame.header.count {
                let expected = append_of(self.next);
                let (append, behind) = rest.split_at(expected.len());
                assert!(append == expected, "append {} is damaged", self.next);
                rest = behind;
                self.next += 1;
            }
            assert!(rest.is_empty());
        }
        consumer.release();
    }
}

/// A VMM-side process.
pub(crate) struct Vmm {
    child: Child,
    lines: Receiver<String>,
    said: Vec<String>,
    arena: Option<(Arc<Mapping>, ArenaLayout)>,
    config: ring::ArenaConfig,
}

impl Vmm {
    pub(crate) fn consumer(rig: &Rig) -> Self {
        Self::start(rig, "consumer", "")
    }

    pub(crate) fn producer(rig: &Rig, peer: SocketAddr) -> Self {
        Self::start(rig, "producer", &peer.to_string())
    }

    fn start(rig: &Rig, part: &str, peer: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["vmm_process", "--exact", "--ignored", "--nocapture"])
            .env("FTLOG_PART", part)
            .env("FTLOG_PEER", peer)
            .env("FTLOG_DIR", rig.dir.path())
            .env("FTLOG_SESSION", hex(rig.session))
            .stdout(Stdio::piped())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let out = child.stdout.take().unwrap();
        let mut this = Self {
            child,
            lines: listen(out),
            said: Vec::new(),
            arena: None,
            config: rig.config(part, false).arena,
        };
        this.wait_line("open");
        this.arena = Some(this.map_arena());
        this
    }

    /// The arena of the process, by its file: it outlives the process.
    fn map_arena(&self) -> (Arc<Mapping>, ArenaLayout) {
        let layout = ArenaLayout::new(self.config).unwrap();
        let files = std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap();
        let arena = files
            .map(|entry| entry.unwrap().path())
            .find(|path| {
                std::fs::read_link(path)
                    .is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:ftlog-arena"))
            })
            .unwrap();
        let file = File::options().read(true).write(true).open(arena).unwrap();
        let mapping = Mapping::of_file(&file, 0, layout.len as usize).unwrap();
        (Arc::new(mapping), layout)
    }

    fn log_ring(&self) -> MappedVring {
        let (mapping, layout) = self.arena.as_ref().unwrap();
        MappedVring::new(Arc::clone(mapping), layout.log_ring).unwrap()
    }

    /// Appends that the process has published.
    pub(crate) fn published(&self) -> u64 {
        self.log_ring().load_avail_idx().into()
    }

    /// Appends that are acknowledged to the process.
    pub(crate) fn acked(&self) -> u64 {
        self.log_ring().load_used_idx().into()
    }

    /// Appends that are committed for the process.
    pub(crate) fn committed(&self) -> u64 {
        let (mapping, _) = self.arena.as_ref().unwrap();
        mapping.control_at(0).unwrap().delivery.commits.read().seq
    }

    fn wait_line(&mut self, word: &str) -> String {
        let until = Instant::now() + LIMIT;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    let found = line.split(' ').next() == Some(word);
                    self.said.push(line.clone());
                    if found {
                        return line;
                    }
                }
                Err(error) => panic!("no {word:?}: {error}; said {:?}", self.said),
            }
        }
    }

    fn number(line: &str) -> u64 {
        line.split(' ').nth(1).unwrap().parse().unwrap()
    }

    /// The address on which the daemon of a consumer waits.
    pub(crate) fn listen(&mut self) -> SocketAddr {
        let line = self.said.iter().find(|line| line.starts_with("listen "));
        line.unwrap()["listen ".len()..].parse().unwrap()
    }

    pub(crate) fn daemon_pid(&mut self) -> u32 {
        let line = self.said.iter().find(|line| line.starts_with("daemon "));
        Self::number(line.unwrap()) as u32
    }

    /// Waits until a consumer has read and checked this many appends.
    pub(crate) fn wait_progress(&mut self, appends: u64) {
        let read = self.said.iter().filter(|line| line.starts_with("read "));
        let mut done = read.map(|line| Self::number(line)).max().unwrap_or(0);
        while appends > done {
            done = Self::number(&self.wait_line("read"));
        }
    }

    /// Waits until a consumer has seen `END`, and says after how many appends.
    pub(crate) fn wait_end(&mut self) -> u64 {
        Self::number(&self.wait_line("end"))
    }

    pub(crate) fn wait_peer_dead(&mut self) {
        self.wait_line("peer-dead");
    }

    /// Whether the process has published what is not acknowledged.
    pub(crate) fn is_in_flight(&self) -> bool {
        let published = self.published();
        published > self.acked()
    }

    /// Sends the signal and does not wait.
    pub(crate) fn shoot(&mut self) {
        self.child.kill().unwrap();
    }

    /// Kills it and waits until it is gone.
    pub(crate) fn kill(&mut self) {
        self.shoot();
        self.child.wait().unwrap();
    }

    /// The same of a producer; true where it hit with appends in flight.
    pub(crate) fn kill_in_flight(&mut self) -> bool {
        self.shoot();
        let in_flight = self.is_in_flight();
        self.child.wait().unwrap();
        in_flight
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn listen(out: ChildStdout) -> Receiver<String> {
    let (lines, said) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(out).lines() {
            let Ok(line) = line else { return };
            if lines.send(line).is_err() {
                return;
            }
        }
    });
    said
}

fn hex(session: SessionId) -> String {
    session.0.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> SessionId {
    SessionId(std::array::from_fn(|i| {
        u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap()
    }))
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// The body of a VMM-side process.
pub(crate) fn process() {
    let var = |name| std::env::var(name).unwrap();
    let part = var("FTLOG_PART");
    let rig = Rig::at(var("FTLOG_DIR").into(), unhex(&var("FTLOG_SESSION")));
    let consumer = part == "consumer";
    let (channel, events) = Channel::start(rig.config(&part, consumer)).unwrap();
    if let Some(address) = channel.listen_address() {
        say(&format!("listen {address}"));
    }
    say(&format!("daemon {}", channel.daemon_pid().unwrap()));
    let (role, reach) = if consumer {
        (Role::Receiver, Reach::Listen)
    } else {
        (
            Role::Sender,
            Reach::Dial(var("FTLOG_PEER").parse().unwrap()),
        )
    };
    let host = Host::open(channel, events, rig.params(role, reach), Seq(0));
    say("open");
    if consumer {
        consume(host)
    } else {
        produce(host)
    }
}

fn consume(mut host: Host) {
    let mut checker = Checker::default();
    loop {
        let before = checker.next;
        checker.read(&mut host.session.consumer);
        if checker.next > before || checker.ended {
            say(&format!("read {}", checker.next));
        }
        if checker.ended {
            say(&format!("end {}", checker.next));
        }
        host.session.consumer.wait(Duration::ZERO, None).unwrap();
    }
}

fn produce(mut host: Host) {
    let producer = &mut host.session.producer;
    for i in 0..MAX_APPENDS {
        let append = append_of(i);
        while producer.append(&append).unwrap().is_none() {
            producer
                .wait_space(append.len(), Duration::from_millis(20))
                .unwrap();
            tell_dead(&mut host.events);
        }
        if i % 3 == 0 {
            producer.flush(Seq(i + 1));
        }
        if i % 16 == 0 {
            // Neither too fast for the 16-bit index nor idle: wait for the acknowledgement.
            let limit = Some(Duration::from_millis(20));
            let _ = host
                .session
                .acks
                .wait(Seq(i + 1), Duration::ZERO, limit)
                .unwrap();
            tell_dead(&mut host.events);
        }
    }
    loop {
        tell_dead(&mut host.events);
        std::thread::park_timeout(Duration::from_millis(10));
    }
}

fn tell_dead(events: &mut vhost_ftlog::frontend::Events) {
    while let Some(event) = events.next_event() {
        if matches!(event, ChannelEvent::Notice(Notice::PeerVmmDead { .. })) {
            say("peer-dead");
        }
    }
}
