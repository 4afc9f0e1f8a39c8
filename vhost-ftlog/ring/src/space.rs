//! Where in the log data area the next append goes.
//!
//! Appends are released in the order in which they were placed. Placing goes round the area, and
//! back to its start early while little is outstanding, so that as long as acknowledgements keep up
//! the bytes touched stay within `window` and therefore in the cache. Appends that follow one another
//! are adjacent: the daemon can send them as one stretch.

/// Hands out stretches of the log data area.
#[derive(Debug)]
pub struct LogSpace {
    len: u32,
    window: u32,
    head: u32,
    tail: u32,
    /// How often `head` went back to the start, and `tail`. They differ by at most one.
    head_lap: u32,
    tail_lap: u32,
}

/// The end of a placed append: hand it back to release the append and all before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mark {
    end: u32,
    lap: u32,
}

impl LogSpace {
    /// An area of `len` bytes of which `window` bytes should be kept hot.
    #[must_use]
    pub fn new(len: u32, window: u32) -> Self {
        Self {
            len,
            window: window.min(len),
            head: 0,
            tail: 0,
            head_lap: 0,
            tail_lap: 0,
        }
    }

    /// Places `len` bytes: their offset, and the mark that releases them. `None` while the area is
    /// too full.
    #[inline]
    pub fn place(&mut self, len: u32) -> Option<(u32, Mark)> {
        let wrapped = self.head_lap != self.tail_lap;
        let fits = if wrapped {
            len <= self.tail - self.head
        } else {
            let early = self.head >= self.window && self.tail >= self.window / 2;
            let ahead = len <= self.len - self.head;
            if (early || !ahead) && len <= self.tail {
                self.head = 0;
                self.head_lap = self.head_lap.wrapping_add(1);
                true
            } else {
                ahead
            }
        };
        if !fits {
            return None;
        }
        let at = self.head;
        self.head += len;
        let mark = Mark {
            end: self.head,
            lap: self.head_lap,
        };
        Some((at, mark))
    }

    /// Whether `len` bytes can be placed now.
    #[must_use]
    pub fn has_room(&self, len: u32) -> bool {
        if self.head_lap != self.tail_lap {
            len <= self.tail - self.head
        } else {
            len <= self.len - self.head || len <= self.tail
        }
    }

    /// Takes back everything up to and including the append of `mark`.
    #[inline]
    pub fn release(&mut self, mark: Mark) {
        self.tail = mark.end;
        self.tail_lap = mark.lap;
        if self.tail == self.head && self.tail_lap == self.head_lap {
            self.head = 0;
            self.tail = 0;
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn while_acknowledgements_keep_up_the_window_is_not_left() {
        let mut space = LogSpace::new(1 << 20, 4096);
        let mut out = VecDeque::new();
        for _ in 0..10_000 {
            let (at, mark) = space.place(100).unwrap();
            assert!(at < 4096 + 100);
            out.push_back(mark);
            if out.len() > 10 {
                space.release(out.pop_front().unwrap());
            }
        }
    }

    #[test]
    fn an_empty_area_takes_an_append_of_its_whole_length() {
        let mut space = LogSpace::new(100, 10);
        let (_, mark) = space.place(60).unwrap();
        assert!(space.place(60).is_none());
        space.release(mark);
        assert!(space.place(100).is_some());
        assert!(space.place(1).is_none());
    }

    proptest! {
        /// Outstanding stretches never overlap and never leave the area; a full area fills and drains.
        #[test]
        fn outstanding_stretches_never_overlap(
            steps in prop::collection::vec((1u32..400, 0usize..4), 1..400),
            window in 1u32..2000,
        ) {
            let mut space = LogSpace::new(1000, window);
            let mut out: VecDeque<(u32, u32, Mark)> = VecDeque::new();
            for (len, releases) in steps {
                let room = space.has_room(len);
                let placed = space.place(len);
                prop_assert_eq!(room, placed.is_some());
                if let Some((at, mark)) = placed {
                    prop_assert!(at + len <= 1000);
                    for (other, other_len, _) in &out {
                        prop_assert!(at + len <= *other || other + other_len <= at);
                    }
                    out.push_back((at, len, mark));
                } else {
                    prop_assert!(!out.is_empty());
                }
                for _ in 0..releases {
                    if let Some((_, _, mark)) = out.pop_front() {
                        space.release(mark);
                    }
                }
            }
        }
    }
}
