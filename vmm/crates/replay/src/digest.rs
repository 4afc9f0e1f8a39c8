//! The running digest: one number that covers the registers at every exit so far.
//!
//! It is no cryptographic hash: it finds divergence, not forgery.

use serde::{Deserialize, Serialize};

/// Folds 64-bit words in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Digest(pub u64);

impl Digest {
    /// Takes in one more word.
    pub fn fold(&mut self, word: u64) {
        let product = u128::from(self.0 ^ word ^ 0x51_7c_c1_b7_27_22_0a_95) * 0x9e37_79b9_7f4a_7c15;
        self.0 = (product as u64) ^ ((product >> 64) as u64).rotate_left(23);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_and_value_matter() {
        let of = |words: &[u64]| {
            let mut digest = Digest::default();
            words.iter().for_each(|word| digest.fold(*word));
            digest
        };
        assert_ne!(of(&[1, 2]), of(&[2, 1]));
        assert_ne!(of(&[0]), of(&[0, 0]));
        assert_eq!(of(&[5, 6]), of(&[5, 6]));
    }
}
