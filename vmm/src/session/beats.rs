//! Heartbeats of a session: the prober of the peer, and the answers to the peer's.
//!
//! The kernel answers, through `ftprobe`, where it runs: a starved host is not taken for a dead one, and
//! a killed VMM is told. Where it does not, or goes, a thread of this process answers, and the status
//! says so.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;

use ebpf_events::maps::SessionEntry;
use ebpf_events::{KeyGeneration, SessionKeys, Side};
use format::{Epoch, SessionId};
use ft::{HeartbeatReply, Time, VmmSign};
use heartbeat::protocol::{Abilities, ExitWatch, ResponderKind};
use heartbeat::responder::SessionPages;
use heartbeat::{Prober, ProberConfig, Responder, VmmPages};

use super::event::SessionEvent;
use super::probes::{ProbeDaemon, ProbeNews, Probes};
use crate::api::Heartbeats;

/// Generation of a session's only key.
const GENERATION: KeyGeneration = KeyGeneration(0);

/// The heartbeats of this host.
pub struct Beats {
    listen: SocketAddr,
    secret: Vec<u8>,
    probes: Probes,
    /// What the daemon can do; why there is none.
    daemon: Result<Abilities, String>,
    /// This process' own answers, from the first time that they are needed.
    responder: Option<Responder>,
    watched: Option<Watched>,
}

struct Watched {
    session: SessionId,
    epoch: Epoch,
    peer: SocketAddr,
    side: Side,
    prober: Prober,
    pages: SessionPages,
    /// `ftprobe` answers, not this process.
    by_daemon: bool,
    /// Number of the protocol's first probe, less one.
    base: Option<u64>,
}

fn number(session: SessionId) -> u64 {
    u64::from_le_bytes(*session.0.first_chunk().expect("a session has 16 bytes"))
}

impl Beats {
    /// Answers on `listen` for the sessions that will come.
    ///
    /// # Errors
    /// No thread.
    pub fn new(
        listen: SocketAddr,
        secret: Vec<u8>,
        daemon: ProbeDaemon,
        events: Sender<SessionEvent>,
    ) -> std::io::Result<Self> {
        let (probes, news) = Probes::start(daemon, events)?;
        let mut beats = Self {
            listen,
            secret,
            probes,
            daemon: Err(String::new()),
            responder: None,
            watched: None,
        };
        beats.news(news);
        Ok(beats)
    }

    /// The probe daemon came or went, or has taken a session.
    pub fn news(&mut self, news: ProbeNews) {
        match news {
            ProbeNews::Up(abilities) => {
                tracing::info!(responder = ?abilities.responder, exits = ?abilities.exit_watch,
                    interface = abilities.interface, "ftprobe answers heartbeats");
                self.daemon = Ok(abilities);
                self.join();
            }
            ProbeNews::Joined(id, pages) => self.joined(id, pages),
            ProbeNews::Down(why) => {
                tracing::warn!(
                    why,
                    "no ftprobe: this process answers heartbeats, and is late on a starved host"
                );
                self.daemon = Err(why);
                self.answer_here();
            }
        }
    }

    /// Who answers, for the status.
    pub fn report(&self) -> Heartbeats {
        let by_daemon = self.watched.as_ref().map(|watched| watched.by_daemon);
        match &self.daemon {
            Ok(abilities) if by_daemon.unwrap_or(true) => Heartbeats {
                answered_by: match abilities.responder {
                    ResponderKind::XdpNative => "kernel, XDP",
                    ResponderKind::XdpGeneric => "kernel, generic XDP",
                    ResponderKind::Tcx => "kernel, TCX",
                    ResponderKind::Userspace => "ftprobe, in userspace",
                }
                .to_owned(),
                in_kernel: abilities.responder.in_kernel(),
                exits_told: abilities.exit_watch == ExitWatch::Kernel,
                reason: abilities.responder_reason.clone(),
            },
            Ok(_) => own_answers("ftprobe does not have this session yet"),
            Err(why) => own_answers(why),
        }
    }

    /// What an operator should do about it, if anything.
    pub fn advice(&self) -> Option<String> {
        let report = self.report();
        (!report.in_kernel).then(|| {
            format!(
                "heartbeats are answered in userspace ({}): a starved host may be taken for a dead \
                 one; see `pollux preflight`",
                report.reason
            )
        })
    }

    /// Begins to probe `peer` and to answer it. `side` is this host's part in the session.
    pub fn watch(&mut self, session: SessionId, epoch: Epoch, peer: SocketAddr, side: Side) {
        self.unwatch();
        let made = SessionPages::private()
            .map_err(|error| error.to_string())
            .and_then(|pages| {
                let config = self.prober_config(session, epoch, peer, side);
                let prober = Prober::new(config, pages.vmm.clone(), None);
                Ok((prober.map_err(|error| error.to_string())?, pages))
            });
        let (prober, pages) = match made {
            Ok(made) => made,
            Err(error) => return tracing::error!(error, "no heartbeats"),
        };
        self.watched = Some(Watched {
            session,
            epoch,
            peer,
            side,
            prober,
            pages,
            by_daemon: false,
            base: None,
        });
        self.join();
        // Until the daemon has the session. One that answers in userspace has the port already.
        let has_port = |abilities: &Abilities| abilities.responder == ResponderKind::Userspace;
        if !self.daemon.as_ref().is_ok_and(has_port) {
            self.answer_here();
        }
    }

    /// Asks the daemon to take the session.
    fn join(&self) {
        if let (Some(watched), Ok(_)) = (&self.watched, &self.daemon) {
            let keys = self.keys(watched.session, watched.side);
            let id = number(watched.session);
            self.probes.join(id, watched.epoch.0, GENERATION, keys);
        }
    }

    fn keys(&self, session: SessionId, side: Side) -> SessionKeys {
        SessionKeys::derive(&self.secret, number(session), GENERATION, side)
    }

    fn prober_config(
        &self,
        session: SessionId,
        epoch: Epoch,
        peer: SocketAddr,
        side: Side,
    ) -> ProberConfig {
        let key = self.keys(session, side).ours;
        ProberConfig::new(number(session), epoch.0, GENERATION, key, peer)
    }

    /// The daemon has taken the session: its pages are used from now on.
    fn joined(&mut self, id: u64, pages: VmmPages) {
        let Some(watched) = &self.watched else {
            return self.probes.close(id);
        };
        if number(watched.session) != id {
            return self.probes.close(id);
        }
        let (session, epoch) = (watched.session, watched.epoch);
        let config = self.prober_config(session, epoch, watched.peer, watched.side);
        let prober = match Prober::new(config, pages.vmm.clone(), Some(pages.seen)) {
            Ok(prober) => prober,
            Err(error) => return tracing::error!(%error, "heartbeats stay with this process"),
        };
        self.probes.epoch(id, epoch.0);
        if let Some(watched) = &mut self.watched {
            watched.prober = prober;
            watched.pages.vmm = pages.vmm;
            watched.by_daemon = true;
            watched.base = None;
        }
        if let Some(responder) = &self.responder {
            responder.close(id);
        }
    }

    /// Answers the peer of this session from this process.
    fn answer_here(&mut self) {
        let Some(watched) = &mut self.watched else {
            return;
        };
        watched.by_daemon = false;
        if self.responder.is_none() {
            match Responder::userspace(self.listen, None) {
                Ok(responder) => self.responder = Some(responder),
                Err(error) => tracing::error!(
                    %error,
                    "this host answers no heartbeats: its peer will take it for lost"
                ),
            }
        }
        let Some(responder) = &self.responder else {
            return;
        };
        let id = number(watched.session);
        let mut entry = SessionEntry {
            slot: 0,
            epoch: watched.epoch.0,
            keys: [None, None],
        };
        let keys = SessionKeys::derive(&self.secret, id, GENERATION, watched.side);
        entry.install(GENERATION, keys);
        responder.open(id, entry, watched.pages.clone());
    }

    /// The epoch of the session has grown.
    pub fn set_epoch(&mut self, epoch: Epoch) {
        let Some(watched) = &mut self.watched else {
            return;
        };
        watched.epoch = epoch;
        watched.prober.set_epoch(epoch.0);
        if watched.by_daemon {
            self.probes.epoch(number(watched.session), epoch.0);
        } else {
            self.answer_here();
        }
    }

    /// Probes nobody any more.
    pub fn unwatch(&mut self) {
        let Some(watched) = self.watched.take() else {
            return;
        };
        let id = number(watched.session);
        self.probes.close(id);
        if let Some(responder) = &self.responder {
            responder.close(id);
        }
    }

    /// Sends the protocol's probe.
    pub fn probe(&mut self, probe: u64) {
        if let Some(watched) = &mut self.watched {
            let request = watched.prober.ask();
            watched.base = Some(probe.wrapping_sub(request));
        }
    }

    /// Ticks this VMM's progress, notes that of its channel's daemon, and takes the answers that have
    /// come.
    pub fn turn(&mut self, daemon: Option<u64>, mut each: impl FnMut(SessionId, HeartbeatReply)) {
        let Some(watched) = &mut self.watched else {
            return;
        };
        watched.pages.vmm.progress.fetch_add(1, Ordering::Release);
        if let Some(daemon) = daemon {
            watched
                .pages
                .daemon
                .progress
                .store(daemon, Ordering::Release);
        }
        let (session, base) = (watched.session, watched.base.unwrap_or(0));
        watched.prober.collect(|peer| {
            let vmm = if peer.vmm_dead() {
                VmmSign::Dead
            } else {
                VmmSign::Progress(peer.vmm_progress)
            };
            let reply = HeartbeatReply {
                probe: peer.request.wrapping_add(base),
                received_at: Time(peer.arrived_ns),
                vmm,
                daemon: (peer.daemon_progress > 0).then_some(peer.daemon_progress),
            };
            each(session, reply);
        });
    }
}

fn own_answers(why: &str) -> Heartbeats {
    Heartbeats {
        answered_by: "this process".to_owned(),
        in_kernel: false,
        exits_told: false,
        reason: why.to_owned(),
    }
}
