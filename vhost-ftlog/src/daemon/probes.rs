//! This daemon's place in the sessions of `ftprobe`: joined when a session opens, so that heartbeats tell the
//! peer whether the data thread moves, and whether this process lives.
//!
//! A thread of its own, which may wait for `ftprobe` to come; the data thread only ticks the page that it
//! is handed. Without `ftprobe` nothing is told, and nothing else changes.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use heartbeat::Client;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::engine::{Command, EngineHandle};
use crate::config_space::SessionParams;

/// How often `ftprobe` is looked for while a session is open: it may start later, or be started again.
const LOOK_EVERY: Duration = Duration::from_millis(500);

enum Ask {
    Opened(SessionParams),
    Closed,
}

/// The way to the thread; without a socket there is none.
#[derive(Debug)]
pub struct Probes {
    ask: Option<Sender<Ask>>,
}

impl Probes {
    /// Starts the thread.
    ///
    /// # Errors
    /// No thread.
    pub fn start(socket: Option<&Path>, engine: &EngineHandle) -> io::Result<Self> {
        let Some(socket) = socket else {
            return Ok(Self { ask: None });
        };
        let (ask, asked) = channel();
        let keeper = Keeper {
            socket: socket.to_owned(),
            engine: engine.clone(),
            session: None,
            client: None,
        };
        std::thread::Builder::new()
            .name("ftlog-probes".to_owned())
            .spawn(move || keeper.run(&asked))?;
        Ok(Self { ask: Some(ask) })
    }

    /// A session was opened.
    pub fn opened(&self, params: SessionParams) {
        self.ask(Ask::Opened(params));
    }

    /// No session is open any more.
    pub fn closed(&self) {
        self.ask(Ask::Closed);
    }

    fn ask(&self, what: Ask) {
        if let Some(ask) = &self.ask {
            // The thread ends only with this.
            let _ = ask.send(what);
        }
    }
}

struct Keeper {
    socket: PathBuf,
    engine: EngineHandle,
    session: Option<SessionParams>,
    /// Joined in the session.
    client: Option<Client>,
}

impl Keeper {
    fn run(mut self, asked: &Receiver<Ask>) {
        loop {
            let asked = match self.session {
                // Nothing to look for.
                None => asked.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(_) => asked.recv_timeout(LOOK_EVERY),
            };
            match asked {
                Ok(Ask::Opened(params)) => {
                    self.session = Some(params);
                    self.client = None;
                }
                Ok(Ask::Closed) => {
                    self.session = None;
                    self.client = None;
                }
                Err(RecvTimeoutError::Timeout) => {
                    if self.client.as_ref().is_some_and(is_gone) {
                        tracing::info!("ftprobe is gone");
                        self.client = None;
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if let (Some(params), None) = (self.session, &self.client) {
                self.client = self.join(params);
            }
        }
    }

    fn join(&self, params: SessionParams) -> Option<Client> {
        let mut client = match Client::connect(&self.socket) {
            Ok(client) => client,
            Err(error) => {
                tracing::debug!(%error, "no ftprobe");
                return None;
            }
        };
        match client.join_daemon(params.session.number(), params.epoch.0) {
            Ok(page) => {
                // Fails only when the daemon ends.
                let _ = self.engine.tell(Command::Beat(page));
                tracing::info!(session = %params.session, "heartbeats tell of this daemon");
                Some(client)
            }
            Err(error) => {
                tracing::warn!(%error, "heartbeats do not tell of this daemon");
                None
            }
        }
    }
}

/// Its end says nothing by itself: readable means closed.
fn is_gone(client: &Client) -> bool {
    let mut waiting = [PollFd::new(client, PollFlags::IN)];
    matches!(poll(&mut waiting, Some(&Timespec::default())), Ok(ready) if ready > 0)
}
