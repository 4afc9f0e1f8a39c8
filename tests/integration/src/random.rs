//! Random numbers of a test: the seed is known, and printed where a test fails.

use std::hash::{BuildHasher, RandomState};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Numbers of one seed.
#[derive(Debug)]
pub struct Random(ChaCha8Rng);

impl Random {
    /// Of the seed in `POLLUX_SEED`, or of one that is different each time. Prints it.
    #[must_use]
    pub fn seeded(test: &str) -> Self {
        let fresh = RandomState::new().hash_one(test) >> 32;
        let seed = crate::amount("POLLUX_SEED", fresh);
        eprintln!("{test}: POLLUX_SEED={seed}");
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// The next number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0.random_range(0..limit)
    }
}
