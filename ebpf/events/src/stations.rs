//! What a trace point of a log entry's station tells: the mirror of `ebpf/probes/stations.h`.

/// Bytes of a [`StationEvent`] in the ring buffer.
pub const STATION_EVENT_BYTES: usize = 40;

/// A range of appends has passed a station.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StationEvent {
    /// When, ns of CLOCK_MONOTONIC.
    pub time_ns: u64,
    /// The first eight bytes of the channel's session id, little-endian.
    pub session: u64,
    /// Position of the first append.
    pub from: u64,
    /// Position after the last one.
    pub upto: u64,
    /// Number of the station, in the order in which an entry passes them.
    pub station: u32,
    /// The process that told it.
    pub process: u32,
}

impl StationEvent {
    /// From the ring buffer.
    pub fn from_bytes(bytes: &[u8; STATION_EVENT_BYTES]) -> Self {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_ne_bytes(word)
        };
        let half = |at: usize| {
            let mut half = [0; 4];
            half.copy_from_slice(&bytes[at..at + 4]);
            u32::from_ne_bytes(half)
        };
        Self {
            time_ns: word(0),
            session: word(8),
            from: word(16),
            upto: word(24),
            station: half(32),
            process: half(36),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_the_c_header_puts_them() {
        let mut bytes = [0; STATION_EVENT_BYTES];
        for (index, chunk) in bytes.chunks_mut(8).enumerate() {
            chunk.copy_from_slice(&(index as u64 + 1).to_ne_bytes());
        }
        bytes[36..].copy_from_slice(&9_u32.to_ne_bytes());
        let event = StationEvent::from_bytes(&bytes);
        assert_eq!((event.time_ns, event.session), (1, 2));
        assert_eq!((event.from, event.upto), (3, 4));
        assert_eq!((event.station, event.process), (5, 9));
    }
}
