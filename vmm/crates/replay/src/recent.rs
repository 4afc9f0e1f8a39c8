//! Network output that a replica keeps after the log has confirmed it, because the primary may have died
//! before it was released. The newest is kept, up to a number of bytes.
//!
//! Console output is not kept: a receiver of frames drops what comes twice, a person cannot.

use std::collections::VecDeque;

use devices::Effect;

/// Bytes that a kept effect counts for beside its own.
const OVERHEAD_BYTES: usize = 64;

/// See the module. Each effect is kept with what its owner wants to know of it.
#[derive(Debug)]
pub struct RecentOutput<T = ()> {
    effects: VecDeque<(T, Effect)>,
    bytes: usize,
    limit: usize,
}

impl<T> RecentOutput<T> {
    /// Keeps `limit` bytes at the most.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            effects: VecDeque::new(),
            bytes: 0,
            limit,
        }
    }

    /// Keeps one more effect, and drops the oldest that there is no room for.
    pub fn push(&mut self, what: T, effect: Effect) {
        self.bytes += bytes(&effect);
        self.effects.push_back((what, effect));
        while self.bytes > self.limit
            && let Some((_, oldest)) = self.effects.pop_front()
        {
            self.bytes -= bytes(&oldest);
        }
    }

    /// Drops the oldest as long as `done` says that nobody needs it any more.
    pub fn forget_while(&mut self, done: impl Fn(&T) -> bool) {
        while let Some((_, oldest)) = self.effects.pop_front_if(|(what, _)| done(what)) {
            self.bytes -= bytes(&oldest);
        }
    }

    /// Takes all, oldest first.
    pub fn drain(&mut self) -> impl Iterator<Item = (T, Effect)> + '_ {
        self.bytes = 0;
        self.effects.drain(..)
    }

    /// All that was kept, oldest first.
    pub fn into_effects(self) -> impl Iterator<Item = (T, Effect)> {
        self.effects.into_iter()
    }
}

fn bytes(effect: &Effect) -> usize {
    let own = match effect {
        Effect::NetTx(frame) => frame.len(),
        _ => 0,
    };
    own + OVERHEAD_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_are_kept_up_to_the_limit() {
        let frame = |len| Effect::NetTx(vec![0; len]);
        let mut recent = RecentOutput::new(1000 + 3 * OVERHEAD_BYTES);
        for (number, len) in [400, 300, 300, 100].into_iter().enumerate() {
            recent.push(number, frame(len));
        }
        let kept: Vec<usize> = recent.drain().map(|(number, _)| number).collect();
        assert_eq!(kept, [1, 2, 3]);
        recent.push(4, frame(5000));
        assert_eq!(recent.drain().count(), 0, "larger than all room");
        recent.push(5, frame(1000));
        assert_eq!(recent.into_effects().count(), 1);
    }

    #[test]
    fn what_is_done_is_dropped_and_makes_room() {
        let mut recent = RecentOutput::new(2 * (100 + OVERHEAD_BYTES));
        for number in 1..=2 {
            recent.push(number, Effect::NetTx(vec![0; 100]));
        }
        recent.forget_while(|number| *number <= 1);
        recent.push(3, Effect::NetTx(vec![0; 100]));
        let kept: Vec<i32> = recent.drain().map(|(number, _)| number).collect();
        assert_eq!(kept, [2, 3]);
    }
}
