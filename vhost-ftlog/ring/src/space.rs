//! Where in the log data area the next append goes.
//!
//! Appends are released in the order in which they were placed. The area's first bytes, its window, are a
//! ring that is used as long as there is room in it, so that while acknowledgements keep up the bytes
//! touched stay in the cache. What has no room there goes to a second ring, the rest of the area: an
//! acknowledgement that is late costs cache misses, not room. Appends that follow one another are mostly
//! adjacent: the daemon can send them as one stretch.

/// Hands out stretches of the log data area.
#[derive(Debug)]
pub struct LogSpace {
    window: Ring,
    rest: Ring,
}

/// The end of a placed append: hand it back to release the append and all before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mark {
    window: Head,
    rest: Head,
}

impl LogSpace {
    /// An area of `len` bytes of which `window` bytes should be kept hot. An append that is longer than the
    /// window and than the rest never has room.
    #[must_use]
    pub fn new(len: u32, window: u32) -> Self {
        let window = window.min(len);
        Self {
            window: Ring::new(window),
            rest: Ring::new(len - window),
        }
    }

    /// Places `len` bytes in the window: their offset, and the mark that releases them. `None` while it is
    /// too full.
    #[inline]
    pub fn place_in_window(&mut self, len: u32) -> Option<(u32, Mark)> {
        let at = self.window.place(len)?;
        Some((at, self.mark()))
    }

    /// Places `len` bytes, in the window if possible. `None` while the area is too full.
    #[inline]
    pub fn place(&mut self, len: u32) -> Option<(u32, Mark)> {
        if let Some(placed) = self.place_in_window(len) {
            return Some(placed);
        }
        let at = self.window.len + self.rest.place(len)?;
        Some((at, self.mark()))
    }

    const fn mark(&self) -> Mark {
        Mark {
            window: self.window.head,
            rest: self.rest.head,
        }
    }

    /// Whether `len` bytes can be placed now.
    #[must_use]
    pub const fn has_room(&self, len: u32) -> bool {
        self.window.fit(len).is_some() || self.rest.fit(len).is_some()
    }

    /// Takes back everything up to and including the append of `mark`.
    #[inline]
    pub fn release(&mut self, mark: Mark) {
        self.window.release(mark.window);
        self.rest.release(mark.rest);
    }
}

/// Where a ring goes on: behind what was placed last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Head {
    at: u32,
    /// How often it went back to the start, or was empty.
    lap: u32,
}

/// A part of the area that is gone round.
#[derive(Debug)]
struct Ring {
    len: u32,
    head: Head,
    /// The head as it was before the first of what is outstanding. At most one lap behind.
    tail: Head,
}

impl Ring {
    fn new(len: u32) -> Self {
        Self {
            len,
            head: Head::default(),
            tail: Head::default(),
        }
    }

    /// Where the next `len` bytes begin.
    const fn fit(&self, len: u32) -> Option<Head> {
        let head = self.head;
        let has_wrapped = head.lap != self.tail.lap;
        let room = if has_wrapped { self.tail.at } else { self.len } - head.at;
        if len <= room {
            Some(head)
        } else if !has_wrapped && len <= self.tail.at {
            Some(Head {
                at: 0,
                lap: head.lap.wrapping_add(1),
            })
        } else {
            None
        }
    }

    #[inline]
    fn place(&mut self, len: u32) -> Option<u32> {
        let Head { at, lap } = self.fit(len)?;
        self.head = Head { at: at + len, lap };
        Some(at)
    }

    #[inline]
    fn release(&mut self, upto: Head) {
        if upto.lap != self.tail.lap && upto.lap != self.head.lap {
            return; // from before the ring was empty
        }
        self.tail = upto;
        if upto == self.head {
            // Empty: as good as new.
            let lap = self.head.lap.wrapping_add(1);
            self.head = Head { at: 0, lap };
            self.tail = self.head;
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
            assert!(at + 100 <= 4096);
            out.push_back(mark);
            if out.len() > 10 {
                space.release(out.pop_front().unwrap());
            }
        }
    }

    #[test]
    fn an_empty_window_takes_an_append_of_its_whole_length() {
        let mut space = LogSpace::new(100, 100);
        let (_, mark) = space.place(60).unwrap();
        assert!(space.place(60).is_none());
        space.release(mark);
        assert!(space.place(100).is_some());
        assert!(space.place(1).is_none());
    }

    #[test]
    fn without_acknowledgements_the_whole_area_is_filled() {
        let mut space = LogSpace::new(1000, 200);
        // The window has just gone round when acknowledgements stop.
        let marks: Vec<Mark> = (0..2).map(|_| space.place(100).unwrap().1).collect();
        space.release(marks[0]);
        let mut placed = 1;
        while space.place_in_window(100).is_some() {
            placed += 1;
        }
        assert_eq!(placed, 2);
        while let Some((at, _)) = space.place(100) {
            assert!(at >= 200);
            placed += 1;
        }
        assert_eq!(placed, 10);
    }

    #[test]
    fn appends_go_back_to_the_window_once_it_is_free() {
        let mut space = LogSpace::new(1000, 200);
        let marks: Vec<Mark> = (0..5).map(|_| space.place(100).unwrap().1).collect();
        space.release(marks[1]);
        assert_eq!(space.place(100).unwrap().0, 0);
        // What was placed in the window since is not touched by marks of before.
        space.release(marks[4]);
        assert_eq!(space.place(100).unwrap().0, 100);
        assert_eq!(space.place(100).unwrap().0, 200);
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
                // The last of those that go stands for all of them.
                let released = out.drain(..releases.min(out.len())).next_back();
                if let Some((_, _, mark)) = released {
                    space.release(mark);
                }
            }
        }
    }
}
