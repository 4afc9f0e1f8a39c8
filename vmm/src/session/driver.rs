//! The session's loop: events to the replica, its actions to whoever does them.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use arbiter::{ArbiterThread, DirectoryArbiter};
use format::SessionId;
use ft::{
    Action, Actions, Config, Event, HostId, Incarnation, Leave, Notice, PeerMessage, Replica, Time,
};
use thiserror::Error;
use vhost_ftlog::frontend::{Channel, ChannelConfig, ChannelEvent, Events};

use super::arrive::Cold;
use super::beats::Beats;
use super::busy::{kind, warn_if_slow};
use super::event::SessionEvent;
use super::follow::Follower;
use super::idle::Idle;
use super::lead::Leader;
use super::probes::ProbeNews;
use super::status::FailoverNotes;
use super::{Devices, FtSettings};
use crate::api::{self, Event as Told, EventLog, Limits, Severity, Transfer};
use crate::link::{Link, LinkEvent};
use crate::vm::{Host, host_ns};

/// The longest sleep of the loop: its turn is this VMM's progress, and takes heartbeats' answers.
const TURN: Duration = Duration::from_millis(5);
/// The same while a standby is being made the backup: each step of that begins with a look at the positions.
const SYNC_TURN: Duration = Duration::from_millis(1);
/// Bytes of a session's log and delivery areas: what the log may run ahead while a standby loads.
const AREA_BYTES: u64 = 64 << 20;

/// Why a session cannot be had, or ended.
#[derive(Debug, Error)]
pub enum SessionError {
    /// The logging channel.
    #[error("the logging channel: {0}")]
    Channel(#[from] vhost_ftlog::frontend::Error),
    /// The link to other hosts.
    #[error(transparent)]
    Link(#[from] crate::link::LinkError),
    /// The directory of epochs.
    #[error(transparent)]
    Directory(#[from] arbiter::DirectoryError),
    /// Threads and files.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// The VM is lost on this host.
    #[error("{0}")]
    Fatal(String),
}

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionEnd {
    /// Why.
    pub leave: Leave,
    /// The guest was off because it wants to be reset, and this host was primary then.
    pub reset: bool,
}

/// Everything of this host's part in one VM.
pub struct Session {
    pub(super) settings: FtSettings,
    pub(super) devices: Devices,
    pub(super) host: Host,
    pub(super) replica: Replica,
    actions: Actions,
    events: Receiver<SessionEvent>,
    pub(super) sender: Sender<SessionEvent>,
    pub(super) link: Arc<Link>,
    arbiter: ArbiterThread,
    pub(super) idle: Idle,
    pub(super) channel: Channel,
    pub(super) beats: Beats,
    pub(super) leader: Leader,
    pub(super) follower: Follower,
    pub(super) log: Arc<EventLog>,
    pub(super) failover: Option<FailoverNotes>,
    pub(super) transfer: Option<Transfer>,
    pub(super) limits: Limits,
    pub(super) paused: bool,
    /// Why the VM does not start, and what to do about it.
    pub(super) blocked: Option<String>,
    /// A thread tries the world.
    pub(super) probing: bool,
    /// Why the command that is being obeyed is refused.
    refused: Option<&'static str>,
    pub(super) divergences: u64,
    pub(super) started: Instant,
    stopping: bool,
    ended: Option<Leave>,
    pub(super) rate: (Instant, u64, f64),
}

/// How others reach a session.
#[derive(Clone)]
pub struct SessionHandle {
    /// Events and commands go here.
    pub sender: Sender<SessionEvent>,
    /// What happened.
    pub log: Arc<EventLog>,
}

impl SessionHandle {
    /// Asks the session to end. False where it has.
    pub fn stop(&self) -> bool {
        self.sender.send(SessionEvent::Stop).is_ok()
    }
}

impl Session {
    /// A session that is to start the VM `cold`, or, without one, to wait for work.
    ///
    /// # Errors
    /// Sockets, threads, files.
    pub fn new(
        settings: FtSettings,
        devices: Devices,
        host: Host,
        cold: Option<Cold>,
    ) -> Result<Self, SessionError> {
        let (sender, events) = channel();
        std::fs::create_dir_all(&settings.run_dir)?;
        let link = start_link(&settings, sender.clone())?;
        let arbiter = start_arbiter(&settings, sender.clone())?;
        let idle = start_idle(&settings, sender.clone())?;
        let (channel, channel_events) = start_channel(&settings)?;
        forward(channel_events, sender.clone())?;
        let secret = std::fs::read(&settings.ft.key_file)?;
        let (listen, probes) = (settings.listen().heartbeat(), settings.probes.clone());
        let beats = Beats::new(listen, secret, probes, sender.clone())?;
        let hosts = settings.ft.standbys.iter().map(|(host, _)| *host).collect();
        let mut config = Config::new(settings.ft.me, hosts);
        config.protect = settings.ft.protect;
        config.detector = settings.ft.detector;
        config.fingerprint = super::pair::fingerprint(&host, &devices)
            .map_err(|error| SessionError::Fatal(error.to_string()))?;
        tracing::debug!(fingerprint = ?config.fingerprint, "this host");
        let incarnation = Incarnation(random());
        let replica = match cold {
            Some(_) => Replica::boot(config, incarnation),
            None => Replica::standby(config, incarnation),
        };
        Ok(Self {
            settings,
            devices,
            host,
            replica,
            actions: Actions::new(),
            events,
            sender,
            link: Arc::new(link),
            arbiter,
            idle,
            channel,
            beats,
            leader: Leader::new(cold),
            follower: Follower::default(),
            log: Arc::default(),
            failover: None,
            transfer: None,
            limits: Limits::default(),
            paused: false,
            blocked: None,
            probing: false,
            refused: None,
            divergences: 0,
            started: Instant::now(),
            stopping: false,
            ended: None,
            rate: (Instant::now(), 0, 0.0),
        })
    }

    /// How others reach it.
    pub fn handle(&self) -> SessionHandle {
        SessionHandle {
            sender: self.sender.clone(),
            log: Arc::clone(&self.log),
        }
    }

    /// Runs until the VM is powered off, or this process is asked to end.
    ///
    /// # Errors
    /// The VM is lost on this host.
    pub fn run(mut self) -> Result<SessionEnd, SessionError> {
        self.tell(Event::Tick)?;
        loop {
            let syncs = self.session().is_some() && !self.replica.status().protected;
            let turn = if syncs { SYNC_TURN } else { TURN };
            let until = self.replica.next_deadline().map_or(turn, |deadline| {
                Duration::from_nanos(deadline.0.saturating_sub(host_ns())).min(turn)
            });
            let asleep = Instant::now();
            let event = self.events.recv_timeout(until);
            warn_if_slow("waiting for a CPU", asleep);
            let began = Instant::now();
            match event {
                Ok(event) => self.take(event)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => unreachable!("this holds a sender"),
            }
            warn_if_slow("an event", began);
            let began = Instant::now();
            self.turn()?;
            warn_if_slow("a turn", began);
            if let Some(leave) = self.ended.take() {
                let reset = self.leader.wants_reset();
                return Ok(SessionEnd { leave, reset });
            }
            if self.stopping {
                let (address, counts) = (self.link.local_addr(), self.link.counts());
                tracing::info!(%address, ?counts, "the link ends");
                let leave = Leave::Dropped;
                return Ok(SessionEnd {
                    leave,
                    reset: false,
                });
            }
        }
    }

    /// What is told at every turn: answers, positions, the time.
    fn turn(&mut self) -> Result<(), SessionError> {
        let mut replies = Vec::new();
        self.beats
            .turn(self.leader.daemon_progress(), |session, reply| {
                replies.push(Event::Heartbeat { session, reply })
            });
        for event in replies.into_iter().chain(self.leader.positions()) {
            self.tell(event)?;
        }
        if let Some(upto) = self.replica.released() {
            self.follower.released(upto);
        }
        self.leader.announce();
        self.arrive()?;
        self.look_after_idle();
        self.tell(Event::Tick)
    }

    /// Tells the replica one thing and does what it says.
    pub(super) fn tell(&mut self, event: Event) -> Result<(), SessionError> {
        self.replica
            .handle(Time(host_ns()), event, &mut self.actions);
        while let Some(action) = self.actions.pop() {
            let (what, began) = (kind(&action), Instant::now());
            self.act(action)?;
            warn_if_slow(what, began);
        }
        Ok(())
    }

    fn take(&mut self, event: SessionEvent) -> Result<(), SessionError> {
        match event {
            SessionEvent::Primary(life, event) => self.take_primary(life, event),
            SessionEvent::Backup(session, event) => self.take_backup(session, event),
            SessionEvent::Link(event) => self.take_link(event),
            SessionEvent::Arbiter(call, reply) => self.tell(Event::Arbiter { call, reply }),
            SessionEvent::WorldProbed(usable) => {
                self.probing = false;
                self.tell(Event::WorldProbed { usable })
            }
            SessionEvent::Record(reply) => {
                self.ask_holders(reply);
                Ok(())
            }
            SessionEvent::Channel(event) => self.take_channel(event),
            SessionEvent::Transfer(session, begun) => self.transfer_begun(session, begun),
            SessionEvent::TransferEnded(session, ended) => self.transfer_ended(session, ended),
            SessionEvent::Command(command, reply) => {
                self.note("command", format!("{command:?}"));
                self.refused = None;
                let done = self.tell(Event::Command(command));
                let _ = reply.send(self.refused.take().map_or(Ok(()), Err));
                done
            }
            SessionEvent::Status(reply) => {
                let _ = reply.send(self.report());
                Ok(())
            }
            SessionEvent::Snapshot(dir, reply) => {
                self.leader.snapshot(dir, &self.devices, reply);
                Ok(())
            }
            SessionEvent::Limits(change, reply) => {
                let _ = reply.send(self.take_operators_limits(&change));
                Ok(())
            }
            SessionEvent::Pause(on, reply) => {
                let live = self.leader.is_live();
                if live {
                    self.paused = on;
                    self.leader.pause(on);
                }
                let _ = reply.send(live);
                Ok(())
            }
            SessionEvent::Probes(news) => {
                match &news {
                    ProbeNews::Up(_) => self.note("ftprobe", "answers heartbeats".to_owned()),
                    ProbeNews::Down(why) => self.log.record(Told::new(
                        Severity::Warning,
                        "ftprobe",
                        format!("{why}: heartbeats are answered by this process"),
                    )),
                    ProbeNews::Joined(..) => {}
                }
                self.beats.news(news);
                Ok(())
            }
            SessionEvent::Nothing => Ok(()),
            SessionEvent::Stop => {
                self.stopping = true;
                Ok(())
            }
        }
    }

    fn take_link(&mut self, event: LinkEvent) -> Result<(), SessionError> {
        match event {
            LinkEvent::Message {
                from,
                message: PeerMessage::StateReply { nonce, holds },
            } if self.idle.answered(from, nonce, holds.state) => Ok(()),
            LinkEvent::Message { from, message } => self.tell(Event::Peer { from, message }),
            LinkEvent::Bulk {
                from,
                session,
                stream,
            } => {
                tracing::info!(%from, "a state transfer connected");
                self.bulk(session, stream)
            }
            LinkEvent::Connected {
                peer,
                address,
                dialed,
            } => {
                tracing::info!(%peer, %address, dialed, "link up");
                Ok(())
            }
            LinkEvent::Broken { peer, address, why } => {
                tracing::info!(%peer, %address, why, "link down");
                Ok(())
            }
        }
    }

    fn take_channel(&mut self, event: ChannelEvent) -> Result<(), SessionError> {
        use vhost_ftlog::notice::Notice as Told;
        tracing::debug!(?event, "channel");
        match event {
            ChannelEvent::Notice(Told::PeerVmmDead { .. }) => match self.session() {
                Some(session) => self.tell(Event::PeerEnd(session)),
                None => Ok(()),
            },
            ChannelEvent::DaemonLost => {
                self.note(
                    "daemon-lost",
                    "the channel's daemon died; it is started again".into(),
                );
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// The session of the log, on whichever side.
    fn session(&self) -> Option<SessionId> {
        self.leader.session().or(self.follower.session())
    }

    fn act(&mut self, action: Action) -> Result<(), SessionError> {
        tracing::trace!(?action, "action");
        match action {
            Action::Arbiter { call, request } => {
                if let Err(busy) = self.arbiter.ask(call, request) {
                    let reply = ft::ArbiterReply::Unreachable(busy.to_string());
                    let _ = self.sender.send(SessionEvent::Arbiter(call, reply));
                }
            }
            Action::Send { to, message } => {
                self.link.send(&to, &message);
            }
            Action::Watch { peer, session } => self.watch(peer, session),
            Action::Probe { probe, .. } => self.beats.probe(probe),
            Action::Unwatch => self.beats.unwatch(),
            Action::Gate(mode) => self.leader.set_gate(mode),
            Action::StartTransfer { to, session, epoch } => self.start_transfer(to, session, epoch),
            // Frames are told apart by their session, which is never used again: an epoch that
            // changes within it needs no other frames.
            Action::SetEpoch(epoch) => {
                tracing::info!(%epoch, "epoch");
                self.beats.set_epoch(epoch);
            }
            Action::EndSession(session) => self.end_session(session),
            Action::Inject(op, data) => self.leader.inject(op, data),
            Action::Quiesce(why) => self.leader.quiesce(why),
            Action::Resume => self.leader.resume(),
            Action::Fold(_) => self.leader.fold(),
            Action::Unquarantine => self.leader.unquarantine(),
            Action::LoadState {
                from,
                session,
                epoch,
            } => self.load_state(from, session, epoch),
            Action::CloseSession(session) => return self.close_session(session),
            Action::Drain { end, .. } => self.follower.drain(end),
            Action::ProbeWorld => return self.probe_world(),
            Action::Fence(host) => tracing::error!(%host, "this storage fences nobody"),
            Action::GoLive(live) => return self.go_live(live),
            Action::Discard(leave) => return self.discard(&leave),
            Action::End(leave) => self.ended = Some(leave),
            Action::Notice(notice) => self.notice(notice),
        }
        Ok(())
    }

    fn watch(&mut self, peer: HostId, session: SessionId) {
        let Some(ports) = self.settings.ports_of(peer) else {
            tracing::error!(%peer, "this host has no address in the configuration");
            return;
        };
        let side = if self.leader.is_live() {
            ebpf_events::Side::Connector
        } else {
            ebpf_events::Side::Listener
        };
        let epoch = self.replica.status().epoch.unwrap_or_default();
        self.beats.watch(session, epoch, ports.heartbeat(), side);
    }

    /// Drops everything that a role had.
    fn discard(&mut self, leave: &Leave) -> Result<(), SessionError> {
        self.note("discard", format!("{leave:?}"));
        self.paused = false;
        self.leader.drop_vm();
        self.follower.forget();
        if let Err(error) = self.channel.close() {
            tracing::warn!(%error, "the channel's session was not closed in order");
        }
        self.tell(Event::Discarded)
    }

    fn notice(&mut self, notice: Notice) {
        match &notice {
            Notice::PeerLost { cause, .. } => {
                self.failover = Some(FailoverNotes::begin(api::cause_text(*cause)));
            }
            Notice::Won { .. } => {
                self.blocked = None;
                self.mark("epoch won");
            }
            Notice::Leaving(_) => self.blocked = None,
            Notice::StartBlocked { .. } => {
                self.blocked = Some(api::notice_event(&notice).message);
            }
            Notice::Diverged(_) => self.divergences += 1,
            Notice::CommandRefused(why) => self.refused = Some(*why),
            _ => {}
        }
        let mut told = api::notice_event(&notice);
        if let (Notice::PeerLost { .. }, Some(log)) = (&notice, self.leader.log_progress()) {
            told = told
                .with("log_appended", log.appended.0)
                .with("log_received", log.received.0)
                .with("log_replayed", log.replayed.0);
        }
        self.log.record(told);
    }

    /// Notes a part of the failover that is under way.
    pub(super) fn mark(&mut self, part: &str) {
        if let Some(failover) = &mut self.failover {
            failover.mark(part);
        }
    }

    /// The same for something that is wrong.
    pub(super) fn warn(&mut self, kind: &'static str, message: &str) {
        self.log.record(Told::new(Severity::Warning, kind, message));
    }

    /// Writes an event down and shows it to those who listen.
    pub(super) fn note(&mut self, kind: &'static str, message: String) {
        self.log.record(Told::new(Severity::Info, kind, message));
    }
}

fn start_link(settings: &FtSettings, sender: Sender<SessionEvent>) -> Result<Link, SessionError> {
    let deliver = move |event| {
        let _ = sender.send(SessionEvent::Link(event));
    };
    Ok(Link::start(settings.ft.link(), Box::new(deliver))?)
}

fn start_arbiter(
    settings: &FtSettings,
    sender: Sender<SessionEvent>,
) -> Result<ArbiterThread, SessionError> {
    let directory = DirectoryArbiter::open(&settings.epochs(), settings.ft.me);
    Ok(ArbiterThread::start(directory, move |call, reply| {
        let _ = sender.send(SessionEvent::Arbiter(call, reply));
    })?)
}

fn start_idle(settings: &FtSettings, sender: Sender<SessionEvent>) -> Result<Idle, SessionError> {
    let directory = DirectoryArbiter::open(&settings.epochs(), settings.ft.me);
    Ok(Idle::new(directory, move |reply| {
        let _ = sender.send(SessionEvent::Record(reply));
    })?)
}

fn start_channel(settings: &FtSettings) -> Result<(Channel, Events), SessionError> {
    let arena = ring::ArenaConfig {
        log_ring: 32768,
        log_bytes: AREA_BYTES,
        delivery_bytes: AREA_BYTES,
    };
    let tuning = vhost_ftlog::config_space::Tuning::default();
    Ok(Channel::start(ChannelConfig {
        daemon: settings.channel.clone(),
        arena,
        tuning,
    })?)
}

fn forward(mut events: Events, sender: Sender<SessionEvent>) -> std::io::Result<()> {
    std::thread::Builder::new()
        .name("channel-events".to_owned())
        .spawn(move || {
            loop {
                // Looks now and then whether the session is gone.
                let Some(event) = events.wait(Duration::from_secs(1)) else {
                    if sender.send(SessionEvent::Nothing).is_err() {
                        return;
                    }
                    continue;
                };
                if sender.send(SessionEvent::Channel(event)).is_err() {
                    return;
                }
            }
        })?;
    Ok(())
}

pub(super) fn random() -> u128 {
    let mut bytes = [0; 16];
    let got = rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty());
    assert_eq!(
        got,
        Ok(16),
        "the kernel gives up to 256 random bytes at once"
    );
    u128::from_le_bytes(bytes)
}
