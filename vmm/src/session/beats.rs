//! Heartbeats of a session: the prober of the peer, and the answers to the peer's.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;

use ebpf_events::maps::SessionEntry;
use ebpf_events::{KeyGeneration, SessionKeys, Side};
use format::{Epoch, SessionId};
use ft::{HeartbeatReply, Time, VmmSign};
use heartbeat::responder::SessionPages;
use heartbeat::{Prober, ProberConfig, Responder};

/// Generation of a session's only key.
const GENERATION: KeyGeneration = KeyGeneration(0);

/// The heartbeats of this host.
pub struct Beats {
    responder: Option<Responder>,
    secret: Vec<u8>,
    watched: Option<Watched>,
}

struct Watched {
    session: SessionId,
    prober: Prober,
    pages: SessionPages,
    /// Number of the protocol's first probe, less one.
    base: Option<u64>,
}

fn number(session: SessionId) -> u64 {
    u64::from_le_bytes(*session.0.first_chunk().expect("a session has 16 bytes"))
}

impl Beats {
    /// Answers on `listen` for the sessions that will come.
    pub fn new(listen: SocketAddr, secret: Vec<u8>) -> Self {
        let responder = Responder::userspace(listen, None);
        if let Err(error) = &responder {
            tracing::error!(%error, "this host answers no heartbeats: its peers will take it for lost");
        }
        Self {
            responder: responder.ok(),
            secret,
            watched: None,
        }
    }

    /// Begins to probe `peer` and to answer it. `side` is this host's part in the session.
    pub fn watch(&mut self, session: SessionId, epoch: Epoch, peer: SocketAddr, side: Side) {
        self.unwatch();
        let id = number(session);
        let keys = SessionKeys::derive(&self.secret, id, GENERATION, side);
        let made = SessionPages::private()
            .map_err(heartbeat_error)
            .and_then(|pages| {
                let config = ProberConfig::new(id, epoch.0, GENERATION, keys.ours.clone(), peer);
                let prober =
                    Prober::new(config, pages.vmm.clone(), None).map_err(heartbeat_error)?;
                Ok((pages, prober))
            });
        let (pages, prober) = match made {
            Ok(made) => made,
            Err(error) => {
                tracing::error!(error, "no heartbeats");
                return;
            }
        };
        if let Some(responder) = &self.responder {
            let mut entry = SessionEntry {
                slot: 0,
                epoch: epoch.0,
                keys: [None, None],
            };
            entry.install(GENERATION, keys);
            responder.open(id, entry, pages.clone());
        }
        self.watched = Some(Watched {
            session,
            prober,
            pages,
            base: None,
        });
    }

    /// Probes nobody any more.
    pub fn unwatch(&mut self) {
        if let Some(watched) = self.watched.take()
            && let Some(responder) = &self.responder
        {
            responder.close(number(watched.session));
        }
    }

    /// Sends the protocol's probe.
    pub fn probe(&mut self, probe: u64) {
        if let Some(watched) = &mut self.watched {
            let request = watched.prober.ask();
            watched.base = Some(probe.wrapping_sub(request));
        }
    }

    /// Ticks this VMM's progress, and takes the answers that have come.
    pub fn turn(&mut self, mut each: impl FnMut(SessionId, HeartbeatReply)) {
        let Some(watched) = &mut self.watched else {
            return;
        };
        watched.pages.vmm.progress.fetch_add(1, Ordering::Release);
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
                daemon: None,
            };
            each(session, reply);
        });
    }
}

fn heartbeat_error(error: impl std::error::Error) -> String {
    error.to_string()
}
