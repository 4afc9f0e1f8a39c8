//! Late writes (R16): sectors that a lost primary may still write, and where their content is now.
//!
//! Only writes that were acknowledged and have no logged `DiskDone` can land late. At go-live their
//! sectors are quarantined: the data goes to a **side file** named by the epoch that made it, and so
//! do later writes; reads come from there. The map is part of the epoch record, so it survives
//! everybody. When every host that may still write is proven gone it is folded back into the image.
//!
//! Owner of a map: the epoch record; the block backend keeps a copy of the one in force.

use std::collections::BTreeMap;

use format::Epoch;
use serde::{Deserialize, Serialize};

use crate::names::HostId;

/// Bytes of a sector.
pub const SECTOR_LEN: u64 = 512;
/// The most writes a VM may have outstanding: what one go-live may quarantine.
pub const MAX_OUTSTANDING: usize = 1024;
/// The most ranges in a map. Protection does not start when one more go-live could exceed it.
pub const MAX_RANGES: usize = 16 * 1024;
/// The most hosts that late writes are feared of.
pub const MAX_SUSPECTS: usize = 64;

/// Consecutive sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SectorRange {
    /// The first.
    pub first: u64,
    /// How many; not 0.
    pub count: u64,
}

impl SectorRange {
    /// The first sector after the range.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.first.saturating_add(self.count)
    }
}

/// Where the content of sectors is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Location {
    /// In the image.
    Image,
    /// In the side file of this epoch, at the same offset.
    Side(Epoch),
}

/// Which sectors are not to be looked for in the image.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "Wire", into = "Wire")]
pub struct Quarantine {
    /// Start → (end, side file); disjoint, not empty.
    ranges: BTreeMap<u64, (u64, Epoch)>,
    suspects: Vec<HostId>,
}

/// As it stands in a record.
#[derive(Serialize, Deserialize)]
struct Wire {
    ranges: Vec<(SectorRange, Epoch)>,
    suspects: Vec<HostId>,
}

impl From<Quarantine> for Wire {
    fn from(map: Quarantine) -> Self {
        Self {
            ranges: map.ranges().collect(),
            suspects: map.suspects,
        }
    }
}

impl TryFrom<Wire> for Quarantine {
    type Error = &'static str;

    fn try_from(wire: Wire) -> Result<Self, &'static str> {
        if wire.ranges.len() > MAX_RANGES || wire.suspects.len() > MAX_SUSPECTS {
            return Err("quarantine: over its limits");
        }
        let mut map = Self {
            suspects: wire.suspects,
            ..Self::default()
        };
        let mut free_from = 0;
        for (range, side) in wire.ranges {
            if range.count == 0 || range.first < free_from || range.end() == u64::MAX {
                return Err("quarantine: empty or overlapping ranges");
            }
            free_from = range.end();
            map.ranges.insert(range.first, (range.end(), side));
        }
        Ok(map)
    }
}

impl Quarantine {
    /// Whether nothing is quarantined.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The quarantined ranges in order, each with the epoch of its side file.
    pub fn ranges(&self) -> impl Iterator<Item = (SectorRange, Epoch)> + '_ {
        self.ranges.iter().map(|(&first, &(end, side))| {
            let count = end - first;
            (SectorRange { first, count }, side)
        })
    }

    /// Hosts that may still write.
    #[must_use]
    pub fn suspects(&self) -> &[HostId] {
        &self.suspects
    }

    /// Whether one more go-live fits.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.ranges.len() + 2 * MAX_OUTSTANDING <= MAX_RANGES && self.suspects.len() < MAX_SUSPECTS
    }

    /// Whether any of `range` is quarantined.
    #[must_use]
    pub fn touches(&self, range: SectorRange) -> bool {
        self.overlapping(range).next().is_some()
    }

    /// Where the content of `range` is, piece by piece in order.
    #[must_use]
    pub fn locate(&self, range: SectorRange) -> Vec<(SectorRange, Location)> {
        let mut pieces = Vec::new();
        let mut at = range.first;
        for (first, end, side) in self.overlapping(range) {
            let (first, end) = (first.max(range.first), end.min(range.end()));
            push_piece(&mut pieces, at, first, Location::Image);
            push_piece(&mut pieces, first, end, Location::Side(side));
            at = end;
        }
        push_piece(&mut pieces, at, range.end(), Location::Image);
        pieces
    }

    fn overlapping(&self, range: SectorRange) -> impl Iterator<Item = (u64, u64, Epoch)> + '_ {
        let before = self.ranges.range(..range.first).next_back();
        before
            .into_iter()
            .chain(self.ranges.range(range.first..range.end()))
            .filter(move |(_, (end, _))| *end > range.first)
            .map(|(&first, &(end, side))| (first, end, side))
    }

    /// From now on `range` is in the side file of epoch `side`.
    pub(crate) fn put(&mut self, range: SectorRange, side: Epoch) {
        let cut: Vec<_> = self.overlapping(range).collect();
        for (first, end, old) in cut {
            self.ranges.remove(&first);
            if first < range.first {
                self.ranges.insert(first, (range.first, old));
            }
            if end > range.end() {
                self.ranges.insert(range.end(), (end, old));
            }
        }
        self.ranges.insert(range.first, (range.end(), side));
    }

    /// `host` may have written to what is quarantined now.
    pub(crate) fn suspect(&mut self, host: HostId) {
        if !self.suspects.contains(&host) {
            self.suspects.push(host);
        }
    }
}

fn push_piece(pieces: &mut Vec<(SectorRange, Location)>, first: u64, end: u64, at: Location) {
    if first < end {
        let count = end - first;
        pieces.push((SectorRange { first, count }, at));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(first: u64, count: u64) -> SectorRange {
        SectorRange { first, count }
    }

    #[test]
    fn a_newer_side_file_takes_over_part_of_an_older_one() {
        let mut map = Quarantine::default();
        map.put(range(10, 10), Epoch(2));
        map.put(range(14, 2), Epoch(3));
        assert_eq!(
            map.locate(range(8, 10)),
            vec![
                (range(8, 2), Location::Image),
                (range(10, 4), Location::Side(Epoch(2))),
                (range(14, 2), Location::Side(Epoch(3))),
                (range(16, 2), Location::Side(Epoch(2))),
            ]
        );
        assert!(map.touches(range(19, 1)) && !map.touches(range(20, 1)));
    }

    #[test]
    fn hostile_maps_are_refused() {
        let wire = |ranges| Wire {
            ranges,
            suspects: vec![],
        };
        for bad in [
            vec![(range(1, 0), Epoch(1))],
            vec![(range(5, 5), Epoch(1)), (range(9, 1), Epoch(1))],
            vec![(range(5, u64::MAX), Epoch(1))],
        ] {
            assert!(Quarantine::try_from(wire(bad)).is_err());
        }
    }

    proptest! {
        #[test]
        fn locate_agrees_with_a_table_of_sectors(
            puts in proptest::collection::vec((0u64..60, 1u64..20, 1u64..5), 0..30),
            (first, count) in (0u64..70, 1u64..20),
        ) {
            let mut map = Quarantine::default();
            let mut table = [Location::Image; 100];
            for (first, count, side) in puts {
                map.put(range(first, count), Epoch(side));
                for slot in &mut table[first as usize..(first + count) as usize] {
                    *slot = Location::Side(Epoch(side));
                }
            }
            let mut at = first;
            for (piece, location) in map.locate(range(first, count)) {
                prop_assert_eq!(piece.first, at);
                for sector in piece.first..piece.end() {
                    prop_assert_eq!(table[sector as usize], location);
                }
                at = piece.end();
            }
            prop_assert_eq!(at, first + count);
            let wire = Wire::from(map.clone());
            prop_assert_eq!(Quarantine::try_from(wire), Ok(map));
        }
    }
}
