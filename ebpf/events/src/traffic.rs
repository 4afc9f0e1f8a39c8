//! What the kernel keeps of a flow of the logging channel: the mirror of `ebpf/probes/traffic.h`.

use core::fmt;
use core::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::histogram::{HISTOGRAM_BYTES, Histogram};

/// Flows that are kept; the least recently used gives way.
pub const MAX_FLOWS: usize = 64;
/// Frames that can wait for their acknowledgement in one flow.
const PENDING_FRAMES: usize = 32;
/// Bytes of a [`FlowKey`] in the map.
pub const FLOW_KEY_BYTES: usize = 40;
const LATENCY_AT: usize = 136;
/// Bytes of a [`Flow`] in the map.
pub const FLOW_BYTES: usize = LATENCY_AT + HISTOGRAM_BYTES + 16 * PENDING_FRAMES + 16;

/// The two ends of a TCP connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowKey {
    /// This host's end.
    pub local: SocketAddr,
    /// The peer's.
    pub remote: SocketAddr,
}

impl FlowKey {
    /// From the map's key.
    pub fn from_bytes(bytes: &[u8; FLOW_KEY_BYTES]) -> Self {
        let port = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let address = |at: usize| {
            let mut octets = [0; 16];
            octets.copy_from_slice(&bytes[at..at + 16]);
            IpAddr::V6(Ipv6Addr::from(octets)).to_canonical()
        };
        Self {
            local: SocketAddr::new(address(0), port(32)),
            remote: SocketAddr::new(address(16), port(34)),
        }
    }
}

impl fmt::Display for FlowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}", self.local, self.remote)
    }
}

/// One direction of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Direction {
    /// Payload bytes, retransmitted ones counted again.
    pub bytes: u64,
    /// Packets on the wire: a large segment counts as the packets it is cut into.
    pub packets: u64,
    /// When the last payload passed, ns of CLOCK_MONOTONIC; 0 for never.
    pub last_ns: u64,
    /// Headers of log frames seen at the beginning of a segment.
    pub frames: u64,
}

/// A connection of the logging channel.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Flow {
    /// The first eight bytes of the channel's session id, little-endian; 0 before the first frame.
    pub session: u64,
    /// Towards this host.
    pub incoming: Direction,
    /// From this host.
    pub outgoing: Direction,
    /// Acknowledgement records seen: the last of each segment.
    pub ack_records: u64,
    /// When the last passed, ns; 0 for never.
    pub ack_last_ns: u64,
    /// The highest position that they cover.
    pub received: u64,
    /// The highest position that they say is replayed.
    pub replayed: u64,
    /// Smoothed round trip of TCP, us; 0 if it is not known.
    pub rtt_us: u64,
    /// Segments that TCP has sent again.
    pub retransmits: u64,
    /// TCP's congestion window, segments.
    pub congestion_window: u64,
    /// From a frame's passing whole in one segment to the record that covers it, on this host's
    /// interface. On the sender's host this is what the wire and the peer take; on the receiver's, what
    /// the receiver takes.
    pub ack_latency: Histogram,
}

impl Flow {
    /// From the map's value.
    pub fn from_bytes(bytes: &[u8; FLOW_BYTES]) -> Self {
        let word = |index: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[8 * index..8 * index + 8]);
            u64::from_ne_bytes(word)
        };
        let direction = |index: usize| Direction {
            bytes: word(index),
            packets: word(index + 1),
            last_ns: word(index + 2),
            frames: word(index + 3),
        };
        let mut latency = [0; HISTOGRAM_BYTES];
        latency.copy_from_slice(&bytes[LATENCY_AT..LATENCY_AT + HISTOGRAM_BYTES]);
        Self {
            session: word(0),
            incoming: direction(1),
            outgoing: direction(5),
            ack_records: word(9),
            ack_last_ns: word(10),
            received: word(11),
            replayed: word(12),
            rtt_us: word(14),
            retransmits: word(15),
            congestion_window: word(16),
            ack_latency: Histogram::from_bytes(&latency),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_show_mapped_addresses_as_ipv4() {
        let mut bytes = [0; FLOW_KEY_BYTES];
        bytes[10..16].copy_from_slice(&[0xff, 0xff, 10, 0, 0, 1]);
        bytes[16..18].copy_from_slice(&[0xfd, 0x77]);
        bytes[31] = 2;
        bytes[32..34].copy_from_slice(&7000_u16.to_ne_bytes());
        bytes[34..36].copy_from_slice(&41234_u16.to_ne_bytes());
        let key = FlowKey::from_bytes(&bytes);
        assert_eq!(key.to_string(), "10.0.0.1:7000 to [fd77::2]:41234");
    }

    #[test]
    fn fields_lie_where_the_c_header_puts_them() {
        let mut bytes = [0; FLOW_BYTES];
        for index in 0..FLOW_BYTES / 8 {
            bytes[8 * index..8 * index + 8].copy_from_slice(&(index as u64).to_ne_bytes());
        }
        let flow = Flow::from_bytes(&bytes);
        assert_eq!(
            (flow.session, flow.incoming.bytes, flow.outgoing.frames),
            (0, 1, 8)
        );
        assert_eq!((flow.ack_records, flow.replayed, flow.rtt_us), (9, 12, 14));
        assert_eq!(
            (flow.ack_latency.count, flow.ack_latency.buckets[0]),
            (17, 19)
        );
        assert_eq!(FLOW_BYTES, 1832);
    }
}
