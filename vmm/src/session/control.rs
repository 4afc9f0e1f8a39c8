//! The API's side of a session: questions and commands go to the session's thread.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use format::ControlOp;
use ft::Command;

use super::event::SessionEvent;
use crate::api::{Control, EventLog, Refused, Reply, Request, StatusReport, Subscription};

/// How long the session's thread may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// How long a snapshot may take.
const SNAPSHOT_LIMIT: Duration = Duration::from_secs(120);

/// A session, as the API sees it.
pub struct SessionControl {
    sender: Sender<SessionEvent>,
    log: Arc<EventLog>,
}

impl SessionControl {
    /// The control of the session behind `sender`.
    pub fn new(sender: Sender<SessionEvent>, log: Arc<EventLog>) -> Self {
        Self { sender, log }
    }

    fn send(&self, event: SessionEvent) -> Result<(), Refused> {
        self.sender
            .send(event)
            .map_err(|_| Refused::failed("the session has ended", "start the program again"))
    }

    fn report(&self) -> Option<StatusReport> {
        let (reply, answer) = channel();
        self.send(SessionEvent::Status(reply)).ok()?;
        answer.recv_timeout(ANSWER_LIMIT).ok()
    }

    fn tell(&self, command: Command, message: &str) -> Result<Reply, Refused> {
        let (reply, answer) = channel();
        self.send(SessionEvent::Command(command, reply))?;
        match answer.recv_timeout(ANSWER_LIMIT) {
            Ok(Ok(())) => Ok(Reply::new(message)),
            Ok(Err(why)) => Err(Refused::conflict(
                why,
                "see `pollux ctl SOCKET status`: which host is primary, and what it waits for",
            )),
            Err(_) => Err(Refused::busy(
                "the session does not answer; the command may still be obeyed",
                "look at the status before trying again",
            )),
        }
    }

    fn pause(&self, on: bool, message: &str) -> Result<Reply, Refused> {
        let (reply, live) = channel();
        self.send(SessionEvent::Pause(on, reply))?;
        match live.recv_timeout(ANSWER_LIMIT) {
            Ok(true) => Ok(Reply::new(message)),
            Ok(false) => Err(Refused::conflict(
                "no VM runs on this host",
                "ask the primary",
            )),
            Err(_) => Err(Refused::busy("the session does not answer", "try again")),
        }
    }

    fn snapshot(&self, dir: PathBuf) -> Result<Reply, Refused> {
        let (reply, answer) = channel();
        let text = format!("snapshot written to {}", dir.display());
        self.send(SessionEvent::Snapshot(dir, reply))?;
        match answer.recv_timeout(SNAPSHOT_LIMIT) {
            Ok(Ok(())) => Ok(Reply::new(text)),
            Ok(Err(why)) => Err(Refused::failed(
                why,
                "choose another directory, or look at the log",
            )),
            Err(_) => Err(Refused::conflict(
                "no VM runs on this host that could be saved",
                "ask the primary",
            )),
        }
    }
}

impl Control for SessionControl {
    fn status(&self) -> StatusReport {
        self.report().unwrap_or_else(|| StatusReport {
            state: "does not answer".to_owned(),
            ..StatusReport::default()
        })
    }

    fn command(&self, request: Request) -> Result<Reply, Refused> {
        match request {
            Request::Protect => self.tell(Command::Protect, "looking for a backup"),
            Request::Unprotect => self.tell(Command::Unprotect, "giving the backup up"),
            Request::SwitchOver => self.tell(Command::SwitchOver, "handing the VM over"),
            Request::Fail => self.tell(Command::Fail, "giving the session up"),
            Request::PowerOff => {
                let command = Command::Control(ControlOp::PowerOff, Vec::new());
                self.tell(command, "switching the VM off")
            }
            Request::Reset => {
                let command = Command::Control(ControlOp::Reset, Vec::new());
                self.tell(
                    command,
                    "both sides end in order; whoever looks after the primary starts it again",
                )
            }
            Request::Pause => self.pause(true, "the guest stands still"),
            Request::Resume => self.pause(false, "the guest goes on"),
            Request::Snapshot(dir) => self.snapshot(dir),
            Request::Limits(change) => {
                let (reply, answer) = channel();
                self.send(SessionEvent::Limits(change, reply))?;
                let limits = answer
                    .recv_timeout(ANSWER_LIMIT)
                    .map_err(|_| Refused::busy("the session does not answer", "try again"))??;
                Ok(Reply {
                    limits: Some(limits),
                    ..Reply::new("limits in force")
                })
            }
            Request::HostGone(host) => {
                self.tell(Command::HostGone(host), "the host is taken for gone")
            }
            Request::ForceStart(epoch) => {
                self.tell(Command::ForceStart(epoch), "starting all the same")
            }
        }
    }

    fn subscribe(&self) -> Subscription {
        self.log.subscribe()
    }

    fn metrics(&self) -> String {
        let Some(report) = self.report() else {
            return String::new();
        };
        let protected = u8::from(report.protected);
        let lines = [
            (
                "pollux_protected",
                "gauge",
                "1 while a backup could take over",
                f64::from(protected),
            ),
            (
                "pollux_exits_total",
                "counter",
                "exits of the guest",
                report.exits as f64,
            ),
            (
                "pollux_lag_seconds",
                "gauge",
                "age of what is not replayed",
                report.lag.ms / 1e3,
            ),
            (
                "pollux_output_held",
                "gauge",
                "effects in the gate",
                report.output.held as f64,
            ),
            (
                "pollux_output_released_total",
                "counter",
                "effects released",
                report.output.released as f64,
            ),
            (
                "pollux_divergences_total",
                "counter",
                "replicas lost",
                report.divergences as f64,
            ),
            (
                "pollux_epoch",
                "gauge",
                "epoch",
                report.epoch.unwrap_or(0) as f64,
            ),
        ];
        lines
            .iter()
            .map(|(name, kind, help, value)| {
                format!("# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n")
            })
            .collect()
    }
}
