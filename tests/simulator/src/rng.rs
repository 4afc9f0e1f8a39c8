//! Random numbers that depend on nothing but their seed.
//!
//! SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014): one addition
//! and a mix for each number, which is all that a simulation needs.

/// Spreads the bits of `x` over all 64.
#[must_use]
pub fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// `a` followed by `b`: which came first matters.
#[must_use]
pub fn mix2(a: u64, b: u64) -> u64 {
    mix(a.rotate_left(23).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ b.wrapping_add(0x2545_f491_4f6c_dd1d))
}

/// A stream of numbers.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// The stream `stream` of `seed`; the streams of one seed know nothing of each other.
    #[must_use]
    pub fn new(seed: u64, stream: u64) -> Self {
        Self(mix2(seed, stream))
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `n`; 0 where `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.draw()) * u128::from(n)) >> 64) as u64
    }

    /// A number from `low` to `high`, both included.
    pub fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high.saturating_sub(low) + 1)
    }

    /// True in `ppm` of a million cases.
    pub fn chance(&mut self, ppm: u32) -> bool {
        ppm > 0 && self.below(1_000_000) < u64::from(ppm)
    }

    /// One of `items`, which is not empty.
    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len() as u64) as usize]
    }

    /// Small numbers often, large ones seldom: from `low` to `high`, evenly in the logarithm.
    pub fn skewed(&mut self, low: u64, high: u64) -> u64 {
        let (low, high) = (low.max(1), high.max(1));
        let bits = (high / low).max(1).ilog2() + 1;
        let scale = 1u64 << self.below(u64::from(bits));
        self.range(
            low,
            low.saturating_mul(2)
                .saturating_mul(scale)
                .min(high)
                .max(low),
        )
    }
}
