//! What a prober has found out: the only thing that a failure detector needs to look at.

use ebpf_events::ReplyFlags;
use ebpf_events::maps::{SeenReply, clock_offset_ns};

/// One look at the peer. Times are ns of this host's CLOCK_MONOTONIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Observation {
    /// When this was observed.
    pub at_ns: u64,
    /// Requests sent so far.
    pub sent: u64,
    /// Requests that this host's network refused to take: no route, link down, no buffers.
    pub unsent: u64,
    /// What the last reply said; `None` before the first.
    pub peer: Option<PeerState>,
    /// When the peer's own last request arrived, if its kernel probe sees them.
    pub heard_ns: Option<u64>,
    /// How long the prober has been asking without an answer: time in which it did not run is left
    /// out. Zero when the last request was answered.
    pub silence_ns: u64,
    /// How long the prober itself did not run before this observation; 0 if it ran in time. Nothing
    /// that depends on the passing of time should be concluded from such an observation.
    pub own_gap_ns: u64,
}

/// The peer, as its last reply describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerState {
    /// When the reply arrived: the peer's kernel was alive a round trip before.
    pub arrived_ns: u64,
    /// Round trip of that request, ns.
    pub round_trip_ns: u64,
    /// Which of the prober's requests it answers; the first is number 1.
    pub request: u64,
    /// The peer's clock when it answered, ns of its CLOCK_MONOTONIC.
    pub peer_time_ns: u64,
    /// The peer's epoch.
    pub epoch: u64,
    /// Progress counter of the peer's VMM: still means stopped, starved or hung.
    pub vmm_progress: u64,
    /// Progress counter of the peer's channel daemon.
    pub daemon_progress: u64,
    /// What the peer knows of its processes.
    pub flags: ReplyFlags,
}

impl PeerState {
    /// The peer's VMM has exited.
    pub const fn vmm_dead(&self) -> bool {
        self.flags.has(ReplyFlags::VMM_DEAD)
    }

    /// The peer's channel daemon has exited.
    pub const fn daemon_dead(&self) -> bool {
        self.flags.has(ReplyFlags::DAEMON_DEAD)
    }

    /// The reply came from a userspace responder, which a starved host delays.
    pub const fn from_userspace(&self) -> bool {
        self.flags.has(ReplyFlags::USERSPACE)
    }

    /// The peer's clock minus this host's, ns, and how far off that can be: the reply was made
    /// somewhere within the round trip.
    pub const fn clock_offset_ns(&self) -> (i64, u64) {
        clock_offset_ns(self.peer_time_ns, self.arrived_ns, self.round_trip_ns)
    }
}

impl PeerState {
    /// From a reply to a prober that has used the sequences after `base`; `None` if it answers an
    /// earlier prober of the session.
    pub(crate) fn new(reply: &SeenReply, base: u64) -> Option<Self> {
        let request = reply
            .sequence
            .checked_sub(base)
            .filter(|number| *number > 0)?;
        Some(Self {
            arrived_ns: reply.arrived_ns,
            round_trip_ns: reply.round_trip_ns(),
            request,
            peer_time_ns: reply.peer_time_ns,
            epoch: reply.peer_epoch,
            vmm_progress: reply.vmm_progress,
            daemon_progress: reply.daemon_progress,
            flags: ReplyFlags(reply.flags as u8),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clock_offset_is_exact_to_half_a_round_trip() {
        let seen = SeenReply {
            sequence: 12,
            sent_ns: 1_000,
            arrived_ns: 1_101,
            peer_time_ns: 5_050,
            ..SeenReply::default()
        };
        let offset = |reply| PeerState::new(&reply, 10).unwrap().clock_offset_ns();
        assert_eq!(offset(seen), (3_999, 51));
        let behind = SeenReply {
            peer_time_ns: 50,
            ..seen
        };
        assert_eq!(offset(behind), (-1_001, 51));
    }

    #[test]
    fn replies_to_an_earlier_prober_say_nothing() {
        let reply = |sequence| SeenReply {
            sequence,
            ..SeenReply::default()
        };
        assert_eq!(PeerState::new(&reply(9), 10), None);
        assert_eq!(PeerState::new(&reply(10), 10), None);
        assert_eq!(PeerState::new(&reply(11), 10).map(|p| p.request), Some(1));
    }
}
