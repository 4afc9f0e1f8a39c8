//! A peer watched as a VMM watches it: the product's prober and the product's failure detector.

use std::net::SocketAddr;
use std::os::fd::AsFd;

use ebpf_events::Side;
use ebpf_events::packet::DEFAULT_PORT;
use ft::{Cause, DetectorConfig, FailureDetector, HeartbeatReply, Owed, Time, VmmSign};
use heartbeat::clock::{monotonic_ns, timespec};
use heartbeat::{Client, PeerState, Prober, ProberConfig};
use rustix::event::{PollFd, PollFlags, poll};

use super::world::{EPOCH, GENERATION, World, join, keys};
use crate::Failure;

/// Host A's watch over host B in one session.
pub(super) struct Watch {
    prober: Prober,
    detector: FailureDetector,
    /// The session lasts as long as the connection is not told to close it.
    client: Client,
    session: u64,
    replies: u64,
    /// Number of the last request.
    asked: u64,
    /// The detector numbers its probes from the request after this one.
    base: u64,
}

impl Watch {
    /// Joins as host A's VMM and begins to watch. To be called on host A.
    pub(super) fn start(world: &World, session: u64) -> Result<Self, Failure> {
        let (client, pages) = join(&world.socket("a"), session, Side::Connector)?;
        let key = keys(session, Side::Connector).ours;
        let peer = SocketAddr::new(world.link.b.v4.into(), DEFAULT_PORT);
        let config = ProberConfig::new(session, EPOCH, GENERATION, key, peer);
        Ok(Self {
            prober: Prober::new(config, pages.vmm, Some(pages.seen))?,
            detector: FailureDetector::new(DetectorConfig::default(), Time(monotonic_ns())),
            client,
            session,
            replies: 0,
            asked: 0,
            base: 0,
        })
    }

    /// Replies taken so far.
    pub(super) const fn replies(&self) -> u64 {
        self.replies
    }

    /// One turn of the event loop: waits for a reply or the next deadline, then looks.
    pub(super) fn turn(&mut self) -> Result<Option<Cause>, Failure> {
        let left = self
            .detector
            .next_deadline()
            .0
            .saturating_sub(monotonic_ns());
        let mut waiting = [PollFd::from_borrowed_fd(self.prober.as_fd(), PollFlags::IN)];
        match poll(&mut waiting, Some(&timespec(left))) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let now = Time(monotonic_ns());
        self.detector.tick(now);
        let (detector, replies, base) = (&mut self.detector, &mut self.replies, self.base);
        self.prober.collect(|peer| {
            *replies += 1;
            if let Some(probe) = peer.request.checked_sub(base) {
                detector.replied(reply(probe, peer));
            }
        });
        if self.detector.due_probe(now).is_some() {
            self.asked = self.prober.ask();
        }
        Ok(self.detector.verdict(now, Owed::default()))
    }

    /// Ends the session on host A.
    pub(super) fn close(mut self) -> Result<(), Failure> {
        Ok(self.client.close(self.session)?)
    }

    /// Begins anew with the same peer, as if it had just been heard.
    pub(super) fn forgive(&mut self) {
        self.detector = FailureDetector::new(DetectorConfig::default(), Time(monotonic_ns()));
        self.base = self.asked;
    }
}

const fn reply(probe: u64, peer: &PeerState) -> HeartbeatReply {
    HeartbeatReply {
        probe,
        received_at: Time(peer.arrived_ns),
        vmm: if peer.vmm_dead() {
            VmmSign::Dead
        } else {
            VmmSign::Progress(peer.vmm_progress)
        },
        daemon: Some(peer.daemon_progress),
    }
}
