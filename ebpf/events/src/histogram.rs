//! The kernel's histograms of nanoseconds: four buckets to a power of two.
//!
//! A bucket is never wider than a quarter of its lower bound, so a quantile read from it is right to
//! 25 %. The mirror of `ebpf/probes/histogram.h`.

/// Buckets of a histogram; the last holds everything from about 60 s on.
pub const BUCKETS: usize = 144;
/// Bytes of a histogram in a map.
pub const HISTOGRAM_BYTES: usize = 8 * (2 + BUCKETS);

/// The bucket that a value falls into.
pub const fn bucket_of(ns: u64) -> usize {
    if ns < 4 {
        return ns as usize;
    }
    let power = ns.ilog2();
    let bucket = (power as usize - 1) * 4 + ((ns >> (power - 2)) & 3) as usize;
    if bucket < BUCKETS {
        bucket
    } else {
        BUCKETS - 1
    }
}

/// The lowest value of a bucket, ns.
pub const fn lower_bound_ns(bucket: usize) -> u64 {
    if bucket < 4 {
        return bucket as u64;
    }
    let power = bucket / 4 + 1;
    (4 + bucket as u64 % 4) << (power - 2)
}

/// A histogram as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Histogram {
    /// Values counted.
    pub count: u64,
    /// Their sum, ns.
    pub sum_ns: u64,
    /// How many fell into each bucket.
    pub buckets: [u64; BUCKETS],
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            count: 0,
            sum_ns: 0,
            buckets: [0; BUCKETS],
        }
    }
}

impl Histogram {
    /// From a map's value, which other CPUs may be counting in: `count` may be off by what was under
    /// way.
    pub fn from_bytes(bytes: &[u8; HISTOGRAM_BYTES]) -> Self {
        let mut words = bytes
            .chunks_exact(8)
            .map(|chunk| u64::from_ne_bytes(chunk.try_into().expect("chunks of eight")));
        let mut next = || words.next().unwrap_or(0);
        Self {
            count: next(),
            sum_ns: next(),
            buckets: core::array::from_fn(|_| next()),
        }
    }

    /// Counts a value.
    pub const fn observe(&mut self, ns: u64) {
        self.count += 1;
        self.sum_ns += ns;
        self.buckets[bucket_of(ns)] += 1;
    }

    /// Adds what another has counted.
    pub fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.sum_ns += other.sum_ns;
        for (own, more) in self.buckets.iter_mut().zip(other.buckets) {
            *own += more;
        }
    }

    /// The upper bound of the bucket in which the quantile lies, ns; 0 if nothing was counted.
    pub fn quantile_ns(&self, quantile: f64) -> u64 {
        let total: u64 = self.buckets.iter().sum();
        let rank = ((total as f64 * quantile).ceil() as u64).clamp(1, total.max(1));
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return lower_bound_ns(bucket + 1);
            }
        }
        0
    }

    /// The mean, ns; 0 if nothing was counted.
    pub const fn mean_ns(&self) -> u64 {
        match self.sum_ns.checked_div(self.count) {
            Some(mean) => mean,
            None => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bucket_begins_where_the_one_before_ends() {
        for bucket in 0..BUCKETS - 1 {
            let (from, to) = (lower_bound_ns(bucket), lower_bound_ns(bucket + 1));
            assert!(from < to);
            assert_eq!(
                (bucket_of(from), bucket_of(to - 1)),
                (bucket, bucket),
                "{from}..{to}"
            );
            assert!(
                to - from <= from.div_ceil(4).max(1),
                "{from}..{to} is too wide"
            );
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
        assert!(lower_bound_ns(BUCKETS - 1) > 50_000_000_000);
    }

    #[test]
    fn quantiles_are_right_to_a_quarter() {
        let mut histogram = Histogram::default();
        for us in 1..=1_000_u64 {
            histogram.observe(us * 1_000);
        }
        for (quantile, expected) in [(0.5, 500_000.0), (0.99, 990_000.0), (1.0, 1_000_000.0)] {
            let got = histogram.quantile_ns(quantile) as f64;
            assert!(
                (1.0..=1.25).contains(&(got / expected)),
                "{quantile}: {got}"
            );
        }
        assert_eq!(histogram.mean_ns(), 500_500);
        assert_eq!(Histogram::default().quantile_ns(0.5), 0);
        assert_eq!(Histogram::default().mean_ns(), 0);
    }

    #[test]
    fn bytes_of_a_map_are_count_sum_and_buckets() {
        let mut bytes = [0; HISTOGRAM_BYTES];
        bytes[..8].copy_from_slice(&3_u64.to_ne_bytes());
        bytes[8..16].copy_from_slice(&40_u64.to_ne_bytes());
        bytes[16 + 8 * 5..][..8].copy_from_slice(&3_u64.to_ne_bytes());
        let histogram = Histogram::from_bytes(&bytes);
        assert_eq!(
            (histogram.count, histogram.sum_ns, histogram.buckets[5]),
            (3, 40, 3)
        );
        let mut twice = histogram.clone();
        twice.merge(&histogram);
        assert_eq!((twice.count, twice.buckets[5]), (6, 6));
    }
}
