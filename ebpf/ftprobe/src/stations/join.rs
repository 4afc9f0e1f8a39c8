//! Joins what was heard at the stations into chains: one for each sampled append.
//!
//! An append passes a station once; after a broken connection it may be sent and received again, and the
//! first time counts. A station is told after its fact, by another thread or host than the next one, so
//! it may be told later than that: the time of a later station shows that the earlier ones were passed,
//! and is theirs too then. So times never go back, and the stages of a chain add up to the whole.

use std::collections::BTreeMap;

use usdt::Station;

use super::clock::Clocks;
use super::recording::Recording;

/// Stations of a chain.
pub const STATIONS: usize = Station::ALL.len();
/// Ranges longer than this are an error of whoever told them.
const MAX_RANGE: u64 = 1 << 24;

/// The way of one append.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// The channel's session.
    pub session: u64,
    /// Position of the append.
    pub position: u64,
    /// When it passed each station, ns on the reference's clock.
    pub at_ns: [Option<u64>; STATIONS],
    /// Which recording told it.
    pub told_by: [Option<usize>; STATIONS],
}

impl Chain {
    fn new(session: u64, position: u64) -> Self {
        Self {
            session,
            position,
            at_ns: [None; STATIONS],
            told_by: [None; STATIONS],
        }
    }

    /// The last station that every append reaches, and the one that only outputs do.
    pub fn is_complete(&self) -> bool {
        self.at_ns[..=Station::Seen as usize]
            .iter()
            .all(Option::is_some)
    }

    /// When it passed a station.
    pub const fn at(&self, station: Station) -> Option<u64> {
        self.at_ns[station as usize]
    }

    /// No station later than the ones after it.
    fn order(&mut self) {
        let mut bound = u64::MAX;
        for at in self.at_ns.iter_mut().rev().flatten() {
            *at = (*at).min(bound);
            bound = *at;
        }
    }
}

/// All chains, and what did not become one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joined {
    /// In the order of session and position.
    pub chains: Vec<Chain>,
    /// Distance between the appends of one session.
    pub sample_one_in: u64,
    /// Events that found no room while they were recorded.
    pub lost: u64,
    /// How wrong times of other hosts than the first can be, ns; `None` if nothing is known of their
    /// clocks.
    pub clock_error_ns: Option<u64>,
}

/// Joins the recordings of one or two hosts.
pub fn join(recordings: &[Recording], clocks: &Clocks) -> Joined {
    let distances = recordings.iter().map(|r| r.header.sample_one_in);
    let distance = distances.max().unwrap_or(1).max(1);
    let mut chains: BTreeMap<(u64, u64), Chain> = BTreeMap::new();
    let mut clock_error_ns = Some(0);
    for (index, recording) in recordings.iter().enumerate() {
        for event in &recording.events {
            let station = event.station as usize;
            if station >= STATIONS || event.upto.saturating_sub(event.from) > MAX_RANGE {
                continue;
            }
            let offset = clocks.offset(index, event.time_ns);
            clock_error_ns = clock_error_ns.zip(offset.error_ns).map(|(a, b)| a.max(b));
            let time = event.time_ns.saturating_add_signed(offset.add_ns);
            let mut position = event.from.next_multiple_of(distance);
            while position < event.upto {
                let chain = chains
                    .entry((event.session, position))
                    .or_insert_with(|| Chain::new(event.session, position));
                if chain.at_ns[station].is_none_or(|known| time < known) {
                    chain.at_ns[station] = Some(time);
                    chain.told_by[station] = Some(index);
                }
                position += distance;
            }
        }
    }
    let chains = chains.into_values().map(|mut chain| {
        chain.order();
        chain
    });
    Joined {
        chains: chains.collect(),
        sample_one_in: distance,
        lost: recordings.iter().filter_map(|r| r.end).map(|e| e.0).sum(),
        clock_error_ns,
    }
}

#[cfg(test)]
mod tests {
    use ebpf_events::stations::StationEvent;

    use super::super::recording::Header;
    use super::*;

    fn recording(sample_one_in: u64, events: &[(u64, Station, u64, u64)]) -> Recording {
        let mut recording = Recording::new(Header::here(sample_one_in));
        recording.events = events
            .iter()
            .map(|(time_ns, station, from, upto)| StationEvent {
                time_ns: *time_ns,
                session: 7,
                from: *from,
                upto: *upto,
                station: *station as u32,
                process: 1,
            })
            .collect();
        recording
    }

    fn joined(recordings: &[Recording]) -> Joined {
        join(recordings, &Clocks::of(recordings, false))
    }

    #[test]
    fn ranges_of_both_hosts_meet_in_the_chains_of_their_sampled_appends() {
        let a = recording(
            4,
            &[
                (10, Station::Appended, 4, 5),
                (20, Station::Appended, 8, 9),
                (25, Station::Kicked, 3, 9),
                (30, Station::Sent, 0, 12),
                (70, Station::Acknowledged, 0, 12),
                (80, Station::Seen, 0, 9),
            ],
        );
        let b = recording(
            4,
            &[
                (40, Station::Received, 0, 12),
                (50, Station::Committed, 0, 12),
            ],
        );
        let joined = joined(&[a, b]);
        let positions: Vec<_> = joined.chains.iter().map(|c| c.position).collect();
        assert_eq!(positions, [0, 4, 8]);
        let complete: Vec<_> = joined.chains.iter().map(Chain::is_complete).collect();
        assert_eq!(complete, [false, true, true]);
        let chain = &joined.chains[2];
        let times: Vec<_> = chain.at_ns.iter().flatten().copied().collect();
        assert_eq!(times, [20, 25, 30, 40, 50, 70, 80]);
        assert_eq!(chain.told_by[Station::Received as usize], Some(1));
    }

    #[test]
    fn a_station_told_late_counts_as_passed_when_the_next_one_was() {
        let events = [
            (10, Station::Appended, 0, 1),
            (12, Station::Kicked, 0, 1),
            (50, Station::Sent, 0, 1),
            (30, Station::Received, 0, 1),
            (40, Station::Committed, 0, 1),
            (60, Station::Acknowledged, 0, 1),
            (55, Station::Seen, 0, 1),
        ];
        let joined = joined(&[recording(1, &events)]);
        let times: Vec<_> = joined.chains[0].at_ns.iter().flatten().copied().collect();
        assert_eq!(times, [10, 12, 30, 30, 40, 55, 55]);
    }

    #[test]
    fn what_is_sent_again_counts_from_the_first_time_and_nonsense_is_passed_over() {
        let mut again = recording(
            1,
            &[
                (10, Station::Sent, 0, 1),
                (90, Station::Sent, 0, 1),
                (20, Station::Received, 5, u64::MAX),
            ],
        );
        again.events.push(StationEvent {
            station: 99,
            ..again.events[0]
        });
        let joined = joined(&[again]);
        assert_eq!(joined.chains.len(), 1);
        assert_eq!(joined.chains[0].at(Station::Sent), Some(10));
    }

    #[test]
    fn the_coarser_sampling_holds() {
        let fine = recording(1, &[(1, Station::Appended, 0, 8)]);
        let coarse = recording(4, &[(2, Station::Received, 0, 8)]);
        let joined = joined(&[fine, coarse]);
        assert_eq!((joined.sample_one_in, joined.chains.len()), (4, 2));
    }
}
