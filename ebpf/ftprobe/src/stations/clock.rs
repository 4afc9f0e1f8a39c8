//! One clock for two hosts: what heartbeats have measured of the difference, and how wrong it can be.
//!
//! A reply carries the peer's time of some moment between the request's departure and the reply's
//! arrival, so the difference of the clocks is known to half of the round trip. The two crystals drift
//! apart meanwhile: for each event the sample is taken that bounds the error best.

use super::recording::Recording;

/// How much two clocks may drift apart, ns for each second: crystals of servers are good to 50 ppm, and
/// each may be off in its direction.
const DRIFT_NS_PER_S: u64 = 100_000;

/// A difference of two clocks and how wrong it can be, ns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offset {
    /// To be added to a host's time to have the reference's.
    pub add_ns: i64,
    /// It may be off by this much; `None` if nothing was measured.
    pub error_ns: Option<u64>,
}

/// Sample seen from the host whose times are to be translated.
#[derive(Debug, Clone, Copy)]
struct Sample {
    at_ns: u64,
    add_ns: i64,
    error_ns: u64,
}

/// Translates the times of each recording to the clock of the first.
#[derive(Debug, Clone)]
pub struct Clocks {
    /// By recording; `None` where it is on the reference's clock.
    samples: Vec<Option<Vec<Sample>>>,
}

impl Clocks {
    /// From the samples in the recordings. Two recordings of one boot of one machine are on one clock;
    /// `measure_all` measures even those, to show what the measurement is worth.
    pub fn of(recordings: &[Recording], measure_all: bool) -> Self {
        let Some(reference) = recordings.first() else {
            return Self {
                samples: Vec::new(),
            };
        };
        let samples = recordings.iter().enumerate().map(|(index, recording)| {
            let one_clock = recording.header.boot == reference.header.boot && !measure_all;
            (index > 0 && !one_clock).then(|| samples(reference, recording))
        });
        Self {
            samples: samples.collect(),
        }
    }

    /// What to add to a time of a recording.
    pub fn offset(&self, recording: usize, time_ns: u64) -> Offset {
        let Some(samples) = self.samples.get(recording).and_then(Option::as_ref) else {
            return Offset {
                add_ns: 0,
                error_ns: Some(0),
            };
        };
        let bound = |sample: &Sample| {
            let apart = time_ns.abs_diff(sample.at_ns);
            let drift = u128::from(apart) * u128::from(DRIFT_NS_PER_S) / 1_000_000_000;
            sample
                .error_ns
                .saturating_add(u64::try_from(drift).unwrap_or(u64::MAX))
        };
        let best = samples.iter().min_by_key(|sample| bound(sample));
        Offset {
            add_ns: best.map_or(0, |sample| sample.add_ns),
            error_ns: best.map(bound),
        }
    }
}

/// Both hosts have measured: the reference says the other's clock minus its own, at a time of its own;
/// the other the reverse.
fn samples(reference: &Recording, other: &Recording) -> Vec<Sample> {
    let own = other.clock.iter().map(|sample| Sample {
        at_ns: sample.at_ns,
        add_ns: sample.offset_ns,
        error_ns: sample.error_ns,
    });
    let theirs = reference.clock.iter().map(|sample| Sample {
        at_ns: sample.at_ns.wrapping_add_signed(sample.offset_ns),
        add_ns: sample.offset_ns.wrapping_neg(),
        error_ns: sample.error_ns,
    });
    own.chain(theirs).collect()
}

#[cfg(test)]
mod tests {
    use super::super::recording::{ClockSample, Header};
    use super::*;

    fn recording(boot: &str, clock: &[(u64, i64, u64)]) -> Recording {
        let header = Header {
            boot: boot.to_owned(),
            ..Header::here(1)
        };
        let mut recording = Recording::new(header);
        recording.clock = clock
            .iter()
            .map(|(at_ns, offset_ns, error_ns)| ClockSample {
                session: 1,
                at_ns: *at_ns,
                offset_ns: *offset_ns,
                error_ns: *error_ns,
            })
            .collect();
        recording
    }

    #[test]
    fn samples_of_both_hosts_agree_and_the_tightest_bound_wins() {
        // The other host's clock is 1,000 ahead.
        let reference = recording("a", &[(5_000, 1_000, 40)]);
        let other = recording("b", &[(6_000, -1_010, 60)]);
        let clocks = Clocks::of(&[reference, other], false);
        assert_eq!(clocks.offset(0, 77).add_ns, 0);
        let offset = clocks.offset(1, 6_000);
        assert_eq!((offset.add_ns, offset.error_ns), (-1_000, Some(40)));
    }

    #[test]
    fn the_bound_grows_with_the_distance_in_time() {
        let reference = recording("a", &[]);
        let second = 1_000_000_000;
        let other = recording("b", &[(0, 0, 10), (100 * second, 5, 10)]);
        let clocks = Clocks::of(&[reference, other], false);
        let middle = clocks.offset(1, 10 * second);
        assert_eq!((middle.add_ns, middle.error_ns), (0, Some(1_000_010)));
        assert_eq!(clocks.offset(1, 99 * second).add_ns, 5);
    }

    #[test]
    fn one_machine_has_one_clock_and_without_heartbeats_nothing_is_known() {
        let one = [recording("a", &[]), recording("a", &[(1, 500, 9)])];
        assert_eq!(Clocks::of(&one, false).offset(1, 1).add_ns, 0);
        assert_eq!(Clocks::of(&one, true).offset(1, 1).add_ns, 500);
        let two = [recording("a", &[]), recording("b", &[])];
        assert_eq!(Clocks::of(&two, false).offset(1, 1).error_ns, None);
    }
}
