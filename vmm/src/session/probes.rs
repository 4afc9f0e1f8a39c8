//! The probe daemon `ftprobe`, as a session has it: started or found, asked, watched, started again.
//!
//! Calls block (the kernel takes its time to take a session in), so a thread of its own makes them; the
//! session's thread asks and goes on. While there is no daemon, and until it has a session, this process
//! answers heartbeats itself, which a starved host delays.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use ebpf_events::{KeyGeneration, SessionKeys};
use heartbeat::protocol::Abilities;
use heartbeat::{Client, ClientError, VmmPages};
use rustix::event::{PollFd, PollFlags, poll};

use super::event::SessionEvent;

/// How long a daemon may take to load its programs and to answer.
const START_LIMIT: Duration = Duration::from_secs(5);
/// Pause between two tries to reach a daemon that starts.
const START_PAUSE: Duration = Duration::from_millis(5);
/// Pause before a daemon that went is started again; doubles up to the longest.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// The longest of these pauses.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Where the probe daemon is.
#[derive(Debug, Clone)]
pub enum ProbeDaemon {
    /// One that somebody else runs, at this socket.
    Running(PathBuf),
    /// One that this process starts.
    Spawn(ProbeSpawn),
    /// None is to be had; the text says why.
    None(String),
}

/// A probe daemon to start.
#[derive(Debug, Clone)]
pub struct ProbeSpawn {
    /// The program.
    pub program: PathBuf,
    /// Its socket.
    pub socket: PathBuf,
    /// Its other options.
    pub args: Vec<String>,
}

/// What the session is told of its probe daemon.
#[derive(Debug, Clone)]
pub enum ProbeNews {
    /// It answers; sessions that begin from now on are its.
    Up(Abilities),
    /// It answers for this session from now on, on these pages.
    Joined(u64, VmmPages),
    /// It is gone, or cannot be had; the text says why.
    Down(String),
}

enum Ask {
    Join(u64, u64, KeyGeneration, SessionKeys),
    Epoch(u64, u64),
    Close(u64),
    /// The connection broke.
    Gone,
}

/// The way to the thread. Dropping it ends the thread; the daemon lives on by itself.
pub struct Probes {
    ask: Sender<Ask>,
}

impl Probes {
    /// Starts or finds the daemon, and says what came of it: once before this returns, later to
    /// `events`.
    ///
    /// # Errors
    /// No thread.
    pub fn start(
        daemon: ProbeDaemon,
        events: Sender<SessionEvent>,
    ) -> std::io::Result<(Self, ProbeNews)> {
        let (ask, asked) = channel();
        let (first, news) = channel();
        let own = ask.clone();
        std::thread::Builder::new()
            .name("probes".to_owned())
            .spawn(move || {
                let mut keeper = Keeper {
                    daemon,
                    client: None,
                    ask: own,
                    pause: RETRY_PAUSE,
                    unsure: Vec::new(),
                };
                let _ = first.send(keeper.connect());
                keeper.run(&asked, &events);
            })?;
        let news = news.recv().map_err(std::io::Error::other)?;
        Ok((Self { ask }, news))
    }

    /// Joins a session as its VMM: [`ProbeNews::Joined`], where the daemon takes it.
    pub fn join(&self, session: u64, epoch: u64, generation: KeyGeneration, keys: SessionKeys) {
        let _ = self.ask.send(Ask::Join(session, epoch, generation, keys));
    }

    /// The epoch of a session has grown.
    pub fn epoch(&self, session: u64, epoch: u64) {
        let _ = self.ask.send(Ask::Epoch(session, epoch));
    }

    /// A session is over.
    pub fn close(&self, session: u64) {
        let _ = self.ask.send(Ask::Close(session));
    }
}

struct Keeper {
    daemon: ProbeDaemon,
    client: Option<Client>,
    ask: Sender<Ask>,
    pause: Duration,
    /// Sessions that the daemon may have half taken in: they would be answered for with a VMM that
    /// stands still.
    unsure: Vec<u64>,
}

impl Keeper {
    fn run(mut self, asked: &Receiver<Ask>, events: &Sender<SessionEvent>) {
        loop {
            let wait = match (&self.client, &self.daemon) {
                (Some(_), _) | (None, ProbeDaemon::None(_)) => Duration::from_secs(3600),
                (None, _) => self.pause,
            };
            let news = match asked.recv_timeout(wait) {
                Ok(Ask::Gone) => {
                    self.client = None;
                    self.pause = RETRY_PAUSE;
                    Some(ProbeNews::Down("it has ended".to_owned()))
                }
                Ok(ask) => self.obey(ask),
                Err(RecvTimeoutError::Timeout) if self.client.is_none() => match self.connect() {
                    ProbeNews::Down(_) => {
                        self.pause = (self.pause * 2).clamp(RETRY_PAUSE, LONGEST_PAUSE);
                        None
                    }
                    up => Some(up),
                },
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            if let Some(news) = news
                && events.send(SessionEvent::Probes(news)).is_err()
            {
                return;
            }
        }
    }

    fn obey(&mut self, ask: Ask) -> Option<ProbeNews> {
        let client = self.client.as_mut()?;
        let session = match &ask {
            Ask::Join(session, ..) => Some(*session),
            _ => None,
        };
        let done = match ask {
            Ask::Join(session, epoch, generation, keys) => {
                client.join_vmm(session, epoch).and_then(|pages| {
                    client.set_keys(session, generation, &keys)?;
                    Ok(Some(ProbeNews::Joined(session, pages)))
                })
            }
            Ask::Epoch(session, epoch) => client.set_epoch(session, epoch).map(|()| None),
            Ask::Close(session) => client.close(session).map(|()| None),
            Ask::Gone => Ok(None),
        };
        match done {
            Ok(news) => news,
            Err(ClientError::Refused(refusal)) => {
                tracing::warn!(refusal.message, "the probe daemon refuses");
                None
            }
            // What it answers to the next call may belong to this one.
            Err(error) => {
                self.client = None;
                self.pause = Duration::ZERO;
                self.unsure.extend(session);
                Some(ProbeNews::Down(error.to_string()))
            }
        }
    }

    fn connect(&mut self) -> ProbeNews {
        match self.try_connect() {
            Ok(mut client) => {
                for session in self.unsure.drain(..) {
                    let _ = client.close(session);
                }
                let abilities = client.abilities().clone();
                self.watch(&client);
                self.client = Some(client);
                ProbeNews::Up(abilities)
            }
            Err(why) => ProbeNews::Down(why),
        }
    }

    fn try_connect(&self) -> Result<Client, String> {
        match &self.daemon {
            ProbeDaemon::None(why) => Err(why.clone()),
            ProbeDaemon::Running(socket) => Client::connect(socket).map_err(|e| e.to_string()),
            ProbeDaemon::Spawn(spawn) => spawn.start(),
        }
    }

    /// A thread that tells when the connection breaks: at once, since then nobody answers the peer.
    fn watch(&self, client: &Client) {
        let ask = self.ask.clone();
        let watched = client.as_fd().try_clone_to_owned().and_then(|socket| {
            std::thread::Builder::new()
                .name("probes-watch".to_owned())
                .spawn(move || {
                    let mut waiting = [PollFd::new(&socket, PollFlags::RDHUP)];
                    while let Err(rustix::io::Errno::INTR) = poll(&mut waiting, None) {}
                    let _ = ask.send(Ask::Gone);
                })
        });
        if let Err(error) = watched {
            tracing::warn!(%error, "the end of the probe daemon would not be noticed");
        }
    }
}

impl ProbeSpawn {
    /// Starts the daemon and connects to it once it is ready.
    fn start(&self) -> Result<Client, String> {
        let _ = std::fs::remove_file(&self.socket);
        let mut child = Command::new(&self.program)
            .args(["run", "--once", "--socket"])
            .arg(&self.socket)
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map_err(|error| format!("{}: {error}", self.program.display()))?;
        let until = Instant::now() + START_LIMIT;
        let outcome = loop {
            if let Ok(Some(status)) = child.try_wait() {
                break Err(format!("it ended with {status}; see its messages"));
            }
            match connect(&self.socket) {
                Some(Ok(client)) => break Ok(client),
                Some(Err(why)) if Instant::now() >= until => break Err(why),
                None if Instant::now() >= until => break Err("it does not start".to_owned()),
                _ => std::thread::sleep(START_PAUSE),
            }
        };
        if outcome.is_err() {
            let _ = child.kill();
        }
        // Somebody must wait for it when it ends, or it stays as a zombie.
        let reaper = std::thread::Builder::new().name("probes-reap".to_owned());
        if let Err(error) = reaper.spawn(move || child.wait()) {
            tracing::warn!(%error, "the probe daemon will not be reaped");
        }
        outcome
    }
}

fn connect(socket: &Path) -> Option<Result<Client, String>> {
    socket
        .exists()
        .then(|| Client::connect(socket).map_err(|error| error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_that_cannot_be_had_is_told_with_its_reason_and_asking_it_is_harmless() {
        let (events, _session) = channel();
        let none = ProbeDaemon::None("no ftprobe beside pollux".to_owned());
        let (probes, news) = Probes::start(none, events.clone()).unwrap();
        assert!(matches!(news, ProbeNews::Down(why) if why.contains("no ftprobe")));
        probes.close(7);
        let missing = ProbeDaemon::Spawn(ProbeSpawn {
            program: "/nowhere/ftprobe".into(),
            socket: "/nowhere/socket".into(),
            args: Vec::new(),
        });
        let (_probes, news) = Probes::start(missing, events).unwrap();
        assert!(matches!(news, ProbeNews::Down(why) if why.contains("/nowhere/ftprobe")));
    }
}
