//! What the kernel keeps of a flow of the logging channel: the mirror of `ebpf/probes/traffic.h`.

use core::fmt;
use core::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::histogram::{HISTOGRAM_BYTES, Histogram};

/// Flows that are kept; the least recently used gives way.
pub const MAX_FLOWS: usize = 64;
/// Bytes of a [`FlowKey`] in the map.
pub const FLOW_KEY_BYTES: usize = 40;
/// Bytes between what different CPUs write.
const APART_BYTES: usize = 128;
const OUTGOING_AT: usize = APART_BYTES;
const SELDOM_AT: usize = 3 * APART_BYTES;
const RECORDS_AT: usize = 4 * APART_BYTES;
const LATENCY_AT: usize = RECORDS_AT + 32;
/// Bytes of a [`Flow`] in the map.
pub const FLOW_BYTES: usize = LATENCY_AT + HISTOGRAM_BYTES;

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
    /// The highest position that they cover.
    pub received: u64,
    /// The highest position that they say is replayed.
    pub replayed: u64,
    /// Smoothed round trip of TCP, us; 0 if it is not known.
    pub rtt_us: u64,
    /// Segments that TCP has sent again.
    pub retransmits: u64,
    /// From the passing of a frame's last byte to the record that covers it, on this host's interface, of
    /// one frame at a time. On the sender's host this is what the wire and the peer take; on the
    /// receiver's, what the receiver takes.
    pub ack_latency: Histogram,
}

impl Flow {
    /// From the map's value.
    pub fn from_bytes(bytes: &[u8; FLOW_BYTES]) -> Self {
        let word = |at: usize, index: usize| {
            let at = at + 8 * index;
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_ne_bytes(word)
        };
        let direction = |at: usize| Direction {
            bytes: word(at, 0),
            packets: word(at, 1),
            last_ns: word(at, 2),
        };
        let mut latency = [0; HISTOGRAM_BYTES];
        latency.copy_from_slice(&bytes[LATENCY_AT..LATENCY_AT + HISTOGRAM_BYTES]);
        Self {
            session: word(SELDOM_AT, 0),
            incoming: direction(0),
            outgoing: direction(OUTGOING_AT),
            ack_records: word(RECORDS_AT, 0),
            received: word(RECORDS_AT, 1),
            replayed: word(RECORDS_AT, 2),
            rtt_us: word(SELDOM_AT, 1),
            retransmits: word(SELDOM_AT, 2),
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
            (flow.incoming.bytes, flow.outgoing.bytes, flow.session),
            (0, 16, 48)
        );
        assert_eq!((flow.rtt_us, flow.retransmits), (49, 50));
        assert_eq!(
            (flow.ack_records, flow.received, flow.replayed),
            (64, 65, 66)
        );
        assert_eq!(
            (flow.ack_latency.count, flow.ack_latency.buckets[0]),
            (68, 70)
        );
        assert_eq!(FLOW_BYTES, 1712);
    }
}
