//! Random numbers of a test: the seed is known, and printed where a test fails.

use std::hash::{BuildHasher, RandomState};

/// SplitMix64: only the spread has to be even.
#[derive(Debug, Clone)]
pub struct Random {
    state: u64,
}

impl Random {
    /// Of the seed in `POLLUX_SEED`, or of one that is different each time. Prints it.
    #[must_use]
    pub fn seeded(test: &str) -> Self {
        let fresh = RandomState::new().hash_one(test) >> 32;
        let seed = crate::amount("POLLUX_SEED", fresh);
        eprintln!("{test}: POLLUX_SEED={seed}");
        Self { state: seed }
    }

    /// The next number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }
}
