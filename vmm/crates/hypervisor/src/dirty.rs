//! Sets of guest pages, as KVM's dirty log and the VMM's own writes yield them.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes of a guest page.
pub const PAGE_SIZE: usize = 4096;

/// Number of a guest page frame: guest physical address divided by [`PAGE_SIZE`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Gfn(pub u64);

impl Gfn {
    /// The frame that holds a guest physical address.
    #[must_use]
    pub fn of(addr: u64) -> Self {
        Self(addr / PAGE_SIZE as u64)
    }

    /// Guest physical address of the frame's first byte. None where there is no such address.
    #[must_use]
    pub fn addr(self) -> Option<u64> {
        self.0.checked_mul(PAGE_SIZE as u64)
    }
}

impl fmt::Debug for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gfn {:#x}", self.0)
    }
}

/// A set of guest pages over fixed spans of guest memory, one bit a page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirtyBitmap {
    spans: Vec<Span>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Span {
    first: Gfn,
    words: Vec<u64>,
}

impl Span {
    fn index(&self, gfn: Gfn) -> Option<(usize, u64)> {
        let offset = gfn.0.checked_sub(self.first.0)?;
        let word = usize::try_from(offset / 64).ok()?;
        (word < self.words.len()).then_some((word, 1 << (offset % 64)))
    }
}

impl DirtyBitmap {
    /// Adds a span of pages from `first` on; bit `i % 64` of `words[i / 64]` is page `first + i`.
    pub(crate) fn push_span(&mut self, first: Gfn, words: Vec<u64>) {
        self.spans.push(Span { first, words });
    }

    /// Adds a page. Pages outside the spans are not kept; returns whether the page is inside.
    pub fn insert(&mut self, gfn: Gfn) -> bool {
        for span in &mut self.spans {
            if let Some((word, bit)) = span.index(gfn) {
                span.words[word] |= bit;
                return true;
            }
        }
        false
    }

    /// Whether a page is in the set.
    #[must_use]
    pub fn contains(&self, gfn: Gfn) -> bool {
        self.spans.iter().any(|span| {
            span.index(gfn)
                .is_some_and(|(word, bit)| span.words[word] & bit != 0)
        })
    }

    /// Adds all pages of another set over the same spans.
    ///
    /// # Panics
    /// If the sets are over different memory layouts: sets of one machine never are.
    pub fn merge(&mut self, other: &Self) {
        if self.spans.is_empty() {
            self.spans.clone_from(&other.spans);
            return;
        }
        if other.spans.is_empty() {
            return;
        }
        assert_eq!(
            self.spans.len(),
            other.spans.len(),
            "sets of different memory layouts"
        );
        for (mine, theirs) in self.spans.iter_mut().zip(&other.spans) {
            assert_eq!(mine.first, theirs.first, "sets of different memory layouts");
            assert_eq!(
                mine.words.len(),
                theirs.words.len(),
                "sets of different memory layouts"
            );
            for (word, more) in mine.words.iter_mut().zip(&theirs.words) {
                *word |= more;
            }
        }
    }

    /// Number of pages in the set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.spans
            .iter()
            .flat_map(|span| &span.words)
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Whether the set has no page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.spans
            .iter()
            .all(|span| span.words.iter().all(|word| *word == 0))
    }

    /// The pages, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = Gfn> + '_ {
        self.spans.iter().flat_map(|span| {
            span.words.iter().enumerate().flat_map(|(index, word)| {
                let first = span.first.0 + index as u64 * 64;
                set_bits(*word).map(move |bit| Gfn(first + u64::from(bit)))
            })
        })
    }
}

fn set_bits(mut word: u64) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let bit = word.trailing_zeros();
        word &= word.wrapping_sub(1);
        (bit < 64).then_some(bit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_spans() -> DirtyBitmap {
        let mut set = DirtyBitmap::default();
        set.push_span(Gfn(0), vec![0b101, 1 << 63]);
        set.push_span(Gfn(0x100000), vec![0b10]);
        set
    }

    #[test]
    fn pages_come_in_order_across_spans() {
        let set = two_spans();
        let pages: Vec<u64> = set.iter().map(|gfn| gfn.0).collect();
        assert_eq!(pages, [0, 2, 127, 0x100001]);
        assert_eq!(set.count(), 4);
        assert!(set.contains(Gfn(127)) && !set.contains(Gfn(126)) && !set.contains(Gfn(128)));
    }

    #[test]
    fn page_outside_the_spans_is_refused() {
        let mut set = two_spans();
        assert!(!set.insert(Gfn(128)));
        assert!(set.insert(Gfn(64)));
        assert_eq!(set.count(), 5);
    }

    #[test]
    fn merge_adds_and_an_empty_set_takes_the_layout() {
        let mut set = DirtyBitmap::default();
        assert!(set.is_empty());
        set.merge(&two_spans());
        assert_eq!(set, two_spans());
        let mut more = two_spans();
        more.insert(Gfn(1));
        set.merge(&more);
        assert_eq!(set.count(), 5);
    }
}
