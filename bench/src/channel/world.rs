//! Two hosts with a logging channel between them.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use format::{Epoch, Seq, SessionId};
use harness::{Host, Link};
use ring::ArenaConfig;
use rustix::event::{PollFd, PollFlags, poll};
use vhost_ftlog::config_space::{Reach, Role, SessionParams, Tuning};
use vhost_ftlog::frontend::{
    Channel, ChannelConfig, ChannelEvent, Daemon, Events, LogConsumer, Session, SpawnConfig,
};
use vhost_ftlog::notice::Notice;

use super::Failure;
use super::cpu;

/// How long anything that must come is waited for.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// Hosts A on CPU 0 and B on CPU 1.
pub(super) struct World {
    pub(super) a: Host,
    pub(super) b: Host,
    pub(super) link: Link,
    directory: tempfile::TempDir,
    ftlog: PathBuf,
    sessions: AtomicU64,
}

/// What may differ between two pairs of daemons.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setup {
    pub(super) tuning: Tuning,
    pub(super) arena: ArenaConfig,
    /// `--priority` of the data threads.
    pub(super) priority: &'static str,
    /// Another option of both daemons.
    pub(super) option: Option<&'static str>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            tuning: Tuning::default(),
            arena: ArenaConfig::default(),
            priority: "fifo",
            option: None,
        }
    }
}

/// A VMM's side of a channel.
pub(super) struct Side {
    pub(super) channel: Channel,
    pub(super) session: Session,
    pub(super) events: Events,
    pub(super) daemon: u32,
    admin: PathBuf,
}

/// A connected channel.
pub(super) struct Pair {
    pub(super) primary: Side,
    pub(super) backup: Side,
}

impl World {
    pub(super) fn new(ftlog: &Path) -> Result<Self, Failure> {
        let a = Host::new()?.on_cpu(0);
        let b = Host::new()?.on_cpu(1);
        let link = Link::between(&a, &b)?;
        let directory = tempfile::tempdir()?;
        std::fs::write(directory.path().join("key"), [7; 32])?;
        Ok(Self {
            a,
            b,
            link,
            directory,
            ftlog: ftlog.to_owned(),
            sessions: AtomicU64::new(1),
        })
    }

    /// Any port of host B.
    pub(super) fn address_b(&self, port: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(self.link.b.v4), port)
    }

    pub(super) fn ftlog(&self) -> &Path {
        &self.ftlog
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(super) fn next_session(&self) -> u64 {
        self.sessions.fetch_add(1, Ordering::Relaxed)
    }

    /// How a side gets its daemon. `listen`: it waits for the peer, on host B.
    pub(super) fn config(&self, name: &str, listen: bool, setup: Setup) -> ChannelConfig {
        let text = |path: PathBuf| path.display().to_string();
        let mut args = vec![
            "--key-file".to_owned(),
            text(self.path("key")),
            "--priority".to_owned(),
            setup.priority.to_owned(),
            "--admin".to_owned(),
            text(self.path(&format!("{name}.admin"))),
        ];
        args.extend(setup.option.map(str::to_owned));
        if listen {
            args.extend(["--listen".to_owned(), self.address_b(0).to_string()]);
        }
        ChannelConfig {
            daemon: Daemon::Spawn(SpawnConfig {
                program: self.ftlog.clone(),
                socket: self.path(&format!("{name}.sock")),
                args,
            }),
            arena: setup.arena,
            tuning: setup.tuning,
        }
    }

    /// Host B's side, which waits for the peer.
    pub(super) fn backup(&self, session: u64, setup: Setup) -> Result<Side, Failure> {
        let name = format!("b{session}");
        let config = self.config(&name, true, setup);
        let admin = self.path(&format!("{name}.admin"));
        let params = params(session, Role::Receiver, Reach::Listen);
        self.b.run(|| Side::open(config, params, admin))
    }

    /// A connected channel with daemons of its own.
    pub(super) fn pair(&self, setup: Setup) -> Result<Pair, Failure> {
        let session = self.next_session();
        let mut backup = self.backup(session, setup)?;
        let address = backup.address()?;
        let name = format!("a{session}");
        let config = self.config(&name, false, setup);
        let admin = self.path(&format!("{name}.admin"));
        let params = params(session, Role::Sender, Reach::Dial(address));
        let mut primary = self.a.run(|| Side::open(config, params, admin))?;
        primary.wait_connected()?;
        backup.wait_connected()?;
        Ok(Pair { primary, backup })
    }
}

/// The parameters of a session that is named by a number.
pub(super) fn params(session: u64, role: Role, reach: Reach) -> SessionParams {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&session.to_le_bytes());
    id[8..12].copy_from_slice(b"PLXB");
    SessionParams {
        session: SessionId(id),
        epoch: Epoch(1),
        role,
        reach,
    }
}

impl Side {
    fn open(config: ChannelConfig, params: SessionParams, admin: PathBuf) -> Result<Self, Failure> {
        let (channel, events) = Channel::start(config)?;
        let session = channel.open(params, Seq(0))?;
        let daemon = channel.daemon_pid().ok_or("the daemon has no process")?;
        Ok(Self {
            channel,
            session,
            events,
            daemon,
            admin,
        })
    }

    /// Where its daemon waits for the peer's.
    pub(super) fn address(&self) -> Result<SocketAddr, Failure> {
        let address = self.channel.listen_address();
        address.ok_or_else(|| "the daemon does not listen".into())
    }

    pub(super) fn wait_connected(&mut self) -> Result<(), Failure> {
        while let Some(event) = self.events.wait(PATIENCE) {
            if matches!(event, ChannelEvent::Notice(Notice::Connected { .. })) {
                return Ok(());
            }
        }
        Err("the daemons do not find each other".into())
    }

    /// CPU time of its daemon, in ns.
    pub(super) fn daemon_cpu(&self) -> Result<u64, Failure> {
        cpu::of_process(self.daemon)
    }

    /// The daemon's metrics.
    pub(super) fn metrics(&self) -> Result<serde_json::Value, Failure> {
        let mut stream = UnixStream::connect(&self.admin)?;
        writeln!(stream, r#"{{"get":"metrics"}}"#)?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }
}

/// Takes what is delivered, as a replica does that keeps up, until `stop` becomes readable. The CPU time of
/// it, in ns.
pub(super) fn consume(consumer: &mut LogConsumer, stop: BorrowedFd<'_>) -> Result<u64, Failure> {
    let before = cpu::of_this_thread();
    loop {
        while consumer.next_frame()?.is_some() {}
        consumer.release();
        if consumer.arm() {
            continue;
        }
        let mut signals = [
            PollFd::new(&*consumer, PollFlags::IN),
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
        ];
        poll(&mut signals, None)?;
        if !signals[1].revents().is_empty() {
            return Ok(cpu::of_this_thread() - before);
        }
        consumer.clear()?;
    }
}

/// The program beside this one, unless another is named.
pub(super) fn find_ftlog(named: Option<&Path>) -> Result<PathBuf, Failure> {
    if let Some(path) = named {
        return Ok(path.to_owned());
    }
    let beside = std::env::current_exe()?.with_file_name("vhost-ftlog");
    if beside.exists() {
        return Ok(beside);
    }
    Err(format!(
        "{} is not there: build it with `cargo build --release -p vhost-ftlog`, or name one with --ftlog",
        beside.display()
    )
    .into())
}
