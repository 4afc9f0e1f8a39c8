//! Two hosts in one process: a frontend with a daemon process of its own for each.
#![allow(dead_code, clippy::unwrap_used)] // each test file uses a part

use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use format::{Epoch, Seq, SessionId};
use ring::ArenaConfig;
use vhost_ftlog::config_space::{BulkId, Reach, Role, SessionParams, Tuning};
use vhost_ftlog::frontend::{
    Channel, ChannelConfig, ChannelEvent, Daemon, Events, LogConsumer, Session, SpawnConfig,
};
use vhost_ftlog::notice::{LostReason, Notice};

const LIMIT: Duration = Duration::from_secs(20);

/// A directory and a key for a pair of hosts.
pub(crate) struct Rig {
    pub dir: Directory,
    pub session: SessionId,
}

/// A directory that is removed, or one that belongs to another process.
pub(crate) enum Directory {
    Own(tempfile::TempDir),
    Other(PathBuf),
}

impl Directory {
    pub(crate) fn path(&self) -> &std::path::Path {
        match self {
            Self::Own(dir) => dir.path(),
            Self::Other(path) => path,
        }
    }
}

/// One host.
pub(crate) struct Host {
    pub channel: Channel,
    pub events: Events,
    pub session: Session,
    pub seen: Vec<ChannelEvent>,
}

static SESSIONS: AtomicU64 = AtomicU64::new(1);

impl Rig {
    pub(crate) fn new(name: &str) -> Self {
        let dir = tempfile::Builder::new()
            .prefix(&format!("ftlog-{name}-"))
            .tempdir()
            .unwrap();
        std::fs::write(dir.path().join("key"), [7; 32]).unwrap();
        Self {
            dir: Directory::Own(dir),
            session: session_id(),
        }
    }

    /// The rig of another process.
    pub(crate) fn at(dir: PathBuf, session: SessionId) -> Self {
        Self {
            dir: Directory::Other(dir),
            session,
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn spawn_config(&self, name: &str, listen: bool) -> SpawnConfig {
        let mut args = vec![
            "--key-file".to_owned(),
            self.path("key").display().to_string(),
            "--priority".to_owned(),
            "none".to_owned(),
            "--admin".to_owned(),
            self.path(&format!("{name}.admin")).display().to_string(),
            "--linger-ms".to_owned(),
            "2000".to_owned(),
        ];
        if listen {
            args.extend(["--listen".to_owned(), "127.0.0.1:0".to_owned()]);
        }
        SpawnConfig {
            program: env!("CARGO_BIN_EXE_vhost-ftlog").into(),
            socket: self.path(&format!("{name}.sock")),
            args,
        }
    }

    pub(crate) fn config(&self, name: &str, listen: bool) -> ChannelConfig {
        ChannelConfig {
            daemon: Daemon::Spawn(self.spawn_config(name, listen)),
            arena: ArenaConfig {
                log_ring: 1024,
                log_bytes: 1 << 20,
                delivery_bytes: 2 << 20,
            },
            tuning: Tuning::default(),
        }
    }

    pub(crate) fn params(&self, role: Role, reach: Reach) -> SessionParams {
        SessionParams {
            session: self.session,
            epoch: Epoch(1),
            role,
            reach,
        }
    }

    /// A primary that dials and a backup that listens, connected.
    pub(crate) fn pair(&self) -> (Host, Host) {
        let (channel, events) = Channel::start(self.config("backup", true)).unwrap();
        let address = channel.listen_address().unwrap();
        let params = self.params(Role::Receiver, Reach::Listen);
        let mut backup = Host::open(channel, events, params, Seq(0));
        let mut primary = self.primary(address);
        primary.wait_connected();
        backup.wait_connected();
        (primary, backup)
    }

    pub(crate) fn primary(&self, address: SocketAddr) -> Host {
        let (channel, events) = Channel::start(self.config("primary", false)).unwrap();
        let params = self.params(Role::Sender, Reach::Dial(address));
        Host::open(channel, events, params, Seq(0))
    }

    /// A new session of the same hosts.
    pub(crate) fn reopen(&self, primary: &mut Host, backup: &mut Host, first: Seq) {
        let session = session_id();
        let address = backup.channel.listen_address().unwrap();
        for (host, role, reach) in [
            (&mut *backup, Role::Receiver, Reach::Listen),
            (&mut *primary, Role::Sender, Reach::Dial(address)),
        ] {
            let params = SessionParams {
                session,
                ..self.params(role, reach)
            };
            host.drain_events();
            host.session = host.channel.open(params, first).unwrap();
        }
        primary.wait_connected();
        backup.wait_connected();
    }
}

/// Has a daemon that is to be started listen on a fixed port, so that it can come back there.
pub(crate) fn listen_on(config: &mut ChannelConfig, port: u16) {
    if let Daemon::Spawn(spawn) = &mut config.daemon
        && let Some(at) = spawn.args.iter().position(|arg| arg == "--listen")
    {
        spawn.args[at + 1] = format!("127.0.0.1:{port}");
    }
}

/// Whatever a test does to VMMs and daemons, no daemon stays behind.
impl Drop for Rig {
    fn drop(&mut self) {
        let Directory::Own(dir) = &self.dir else {
            return;
        };
        if std::thread::panicking() {
            return;
        }
        let until = Instant::now() + LIMIT;
        loop {
            let left = processes_of(dir.path());
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < until, "daemons stay behind: {left:?}");
            // Their ends are what is waited for.
            let pid = rustix::process::Pid::from_raw(left[0].0).unwrap();
            let Ok(process) =
                rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())
            else {
                continue;
            };
            let mut end = [rustix::event::PollFd::new(
                &process,
                rustix::event::PollFlags::IN,
            )];
            let limit = rustix::time::Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            };
            let _ = rustix::event::poll(&mut end, Some(&limit));
        }
    }
}

/// Processes that run with this directory in their command lines.
fn processes_of(dir: &std::path::Path) -> Vec<(i32, String)> {
    let dir = dir.display().to_string();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(&dir) {
            found.push((pid, line));
        }
    }
    found
}

fn session_id() -> SessionId {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&SESSIONS.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    id[8..12].copy_from_slice(&std::process::id().to_le_bytes());
    SessionId(id)
}

impl Host {
    pub(crate) fn open(
        channel: Channel,
        events: Events,
        params: SessionParams,
        first: Seq,
    ) -> Self {
        let session = channel.open(params, first).unwrap();
        Self {
            channel,
            events,
            session,
            seen: Vec::new(),
        }
    }

    /// Waits for an event.
    pub(crate) fn wait_for(
        &mut self,
        what: &str,
        wanted: impl Fn(&ChannelEvent) -> bool,
    ) -> ChannelEvent {
        let until = Instant::now() + LIMIT;
        while Instant::now() < until {
            if let Some(event) = self.events.wait(Duration::from_millis(100)) {
                self.seen.push(event);
                if wanted(&event) {
                    return event;
                }
            }
        }
        panic!("no {what}; events so far: {:?}", self.seen);
    }

    pub(crate) fn wait_connected(&mut self) -> Seq {
        let event = self.wait_for("connection", |event| {
            matches!(event, ChannelEvent::Notice(Notice::Connected { .. }))
        });
        match event {
            ChannelEvent::Notice(Notice::Connected { resume }) => resume,
            _ => unreachable!(),
        }
    }

    pub(crate) fn wait_lost(&mut self) {
        self.wait_for("loss", |event| {
            matches!(event, ChannelEvent::Notice(Notice::Lost(_)))
        });
    }

    pub(crate) fn drain_events(&mut self) {
        while let Some(event) = self.events.next_event() {
            self.seen.push(event);
        }
    }

    pub(crate) fn take_bulk(&mut self, id: BulkId) -> TcpStream {
        self.wait_for("bulk stream", |event| {
            *event == ChannelEvent::Notice(Notice::BulkReady(id))
        });
        self.channel.take_bulk(id).unwrap()
    }
}

/// Whatever a test does to the network or the processes, correct daemons never find each other
/// breaking the protocol.
impl Drop for Host {
    fn drop(&mut self) {
        self.drain_events();
        if !std::thread::panicking() {
            let bad = ChannelEvent::Notice(Notice::Lost(LostReason::Protocol));
            assert!(!self.seen.contains(&bad), "{:?}", self.seen);
            let broken = ChannelEvent::Notice(Notice::Broken);
            assert!(!self.seen.contains(&broken), "{:?}", self.seen);
        }
    }
}

/// Bytes that only append `i` has.
pub(crate) fn bytes_of(i: u64, len: usize) -> Vec<u8> {
    let mut state = i.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// Reads and releases frames until everything below `upto` is there.
pub(crate) fn drain_until(consumer: &mut LogConsumer, upto: Seq, received: &mut Vec<u8>) {
    let until = Instant::now() + LIMIT;
    let mut next = Seq(0);
    while next < upto {
        assert!(Instant::now() < until, "only {next} of {upto} came");
        while let Some(frame) = consumer.next_frame().unwrap() {
            received.extend_from_slice(frame.body);
            next = frame.header.next();
        }
        consumer.release();
        consumer
            .wait(Duration::ZERO, Some(Duration::from_millis(100)))
            .unwrap();
    }
}
