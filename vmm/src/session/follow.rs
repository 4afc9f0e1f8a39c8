//! The backup's side: the replica, its log, the end of a session.

use std::collections::BTreeMap;
use std::net::TcpStream;

use format::{ControlOp, Epoch, ExitNumber, Seq, SessionId};
use ft::{DivergenceReport, Event, HostId};
use vhost_ftlog::config_space::{Reach, Role, SessionParams};
use vhost_ftlog::frontend::LogConsumer;

use super::driver::{Session, SessionError};
use super::event::SessionEvent;
use crate::api::StatusReport;
use crate::vm::{Backup, FromBackup, Handover};

/// State streams that came before the protocol asked for them, at the most.
const MAX_EARLY_STREAMS: usize = 4;

/// What a backup has.
#[derive(Default)]
pub(super) struct Follower {
    session: Option<SessionId>,
    /// Waits for the state's stream.
    log: Option<LogConsumer>,
    early: BTreeMap<SessionId, TcpStream>,
    replica: Option<Backup>,
    loaded: bool,
    /// The session is over: what was received is replayed, and no more comes.
    closing: bool,
}

impl Follower {
    pub(super) fn session(&self) -> Option<SessionId> {
        self.session
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing
    }

    pub(super) fn drain(&self, end: Seq) {
        if let Some(replica) = &self.replica {
            replica.drain(end);
        }
    }

    /// The primary has released the outputs of everything below.
    pub(super) fn released(&self, upto: Seq) {
        if let Some(replica) = &self.replica {
            replica.released(upto);
        }
    }

    pub(super) fn hand_over(&mut self) -> Option<Handover> {
        self.session = None;
        self.replica.take()?.hand_over()
    }

    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    pub(super) fn report(&self, report: &mut StatusReport) {
        let Some(replica) = &self.replica else { return };
        report.exits = replica.position().exit();
        report.virtual_time_s = replica.position().virtual_ns() as f64 / 1e9;
    }
}

impl Session {
    pub(super) fn load_state(&mut self, from: HostId, session: SessionId, epoch: Epoch) {
        tracing::info!(%from, %session, "taking the state of a VM");
        let early = std::mem::take(&mut self.follower.early);
        self.follower.forget();
        self.follower.early = early;
        self.follower.session = Some(session);
        let params = SessionParams {
            session,
            epoch,
            role: Role::Receiver,
            reach: Reach::Listen,
        };
        match self.channel.open(params, Seq(0)) {
            Ok(parts) => {
                self.follower.log = Some(parts.consumer);
                if let Some(stream) = self.follower.early.remove(&session) {
                    self.start_replica(stream);
                }
            }
            Err(error) => {
                let why = error.to_string();
                self.load_failed(session, why);
            }
        }
    }

    /// A state stream has come.
    pub(super) fn bulk(
        &mut self,
        session: SessionId,
        stream: TcpStream,
    ) -> Result<(), SessionError> {
        if self.follower.session == Some(session) && self.follower.log.is_some() {
            self.start_replica(stream);
        } else if self.follower.early.len() < MAX_EARLY_STREAMS {
            self.follower.early.insert(session, stream);
        }
        Ok(())
    }

    fn start_replica(&mut self, stream: TcpStream) {
        let (Some(session), Some(log)) = (self.follower.session, self.follower.log.take()) else {
            return;
        };
        let sender = self.sender.clone();
        let tell = move |event| {
            let _ = sender.send(SessionEvent::Backup(session, event));
        };
        match Backup::start(self.host.clone(), stream, log, tell) {
            Ok(replica) => self.follower.replica = Some(replica),
            Err(error) => self.load_failed(session, error.to_string()),
        }
    }

    fn load_failed(&self, session: SessionId, why: String) {
        let event = FromBackup::LoadFailed(why);
        let _ = self.sender.send(SessionEvent::Backup(session, event));
    }

    /// Something from the replica of `session`, which may not be the present one any more.
    pub(super) fn take_backup(
        &mut self,
        session: SessionId,
        event: FromBackup,
    ) -> Result<(), SessionError> {
        if self.follower.session != Some(session) {
            tracing::debug!(%session, ?event, "from a replica that is gone");
            return Ok(());
        }
        match event {
            FromBackup::StateReceived(bytes) => self.tell(Event::StateReceived { session, bytes }),
            FromBackup::Replayed(upto) => {
                self.follower.loaded = true;
                self.tell(Event::Replayed { session, upto })
            }
            FromBackup::LoadFailed(why) => self.tell(Event::LoadFailed { session, why }),
            FromBackup::Diverged(exit, expected, actual, text) => {
                let exit = ExitNumber(exit);
                let report = DivergenceReport {
                    exit,
                    expected,
                    actual,
                    text,
                };
                self.tell(Event::Diverged { session, report })
            }
            FromBackup::Control(op, data) => {
                if op == ControlOp::Limits {
                    self.take_limits(&data);
                }
                Ok(())
            }
            FromBackup::Closed(end) => {
                self.mark("log fixed");
                self.tell(Event::SessionClosed { session, end })
            }
            FromBackup::Drained(writes, guest_off) => {
                self.mark("log replayed");
                self.tell(Event::Drained {
                    session,
                    writes,
                    guest_off,
                })
            }
        }
    }

    /// No acknowledgement leaves from here on (R13); only then is the end of the log fixed.
    pub(super) fn close_session(&mut self, session: SessionId) -> Result<(), SessionError> {
        self.follower.closing = true;
        if let Err(error) = self.channel.close() {
            // Then an acknowledgement may still leave, and this side must not compete.
            return Err(SessionError::Fatal(format!(
                "the channel's daemon does not answer, so the log's end cannot be fixed: {error}"
            )));
        }
        match &self.follower.replica {
            Some(replica) if self.follower.loaded => {
                replica.end();
                Ok(())
            }
            _ => self.tell(Event::SessionClosed {
                session,
                end: Seq(0),
            }),
        }
    }
}
