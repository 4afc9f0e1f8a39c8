//! Late writes (R16): sectors that a lost primary may still write, and where their content is now.
//!
//! Only writes that were acknowledged and have no logged `DiskDone` can land late. At go-live their
//! sectors are quarantined: the data goes to a **side file** named by the epoch that made it, and so
//! do later writes; reads come from there. The map is part of the epoch record, so it survives
//! everybody. When every host that may still write is proven gone it is folded back into the image.
//!
//! Side files lie in **layers**, the newest on top: where two have a sector, the newer one counts. The
//! older one is not forgotten: who won the newer epoch may have died before it made its side file, and
//! then the content is still in the older one ([`Quarantine::sources`]).
//!
//! Owner of a map: the epoch record; the block backend keeps a copy of the one in force.

use std::collections::BTreeMap;

use format::Epoch;
use serde::{Deserialize, Serialize};

use crate::canary::{self, Canary};
use crate::names::HostId;

/// Bytes of a sector.
pub const SECTOR_LEN: u64 = 512;
/// The most writes a VM may have outstanding: what one go-live may quarantine.
pub const MAX_OUTSTANDING: usize = 1024;
/// The most ranges in a map, in all its layers. Protection does not start when one more go-live could
/// exceed it.
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

    const fn between(first: u64, end: u64) -> Self {
        let count = end - first;
        Self { first, count }
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
    /// For each side file: start → end; disjoint, not empty.
    layers: BTreeMap<Epoch, BTreeMap<u64, u64>>,
    /// What is seen from above: start → (end, side file); disjoint, not empty. Follows from the layers.
    /// In a box, so that records are small to move: nearly all of them have an empty one.
    top: BTreeMap<u64, (u64, Epoch)>,
    suspects: Vec<HostId>,
}

/// As it stands in a record: layer by layer.
#[derive(Serialize, Deserialize)]
struct Wire {
    ranges: Vec<(SectorRange, Epoch)>,
    suspects: Vec<HostId>,
}

impl From<Quarantine> for Wire {
    fn from(map: Quarantine) -> Self {
        let layers = map.layers.iter();
        let ranges = layers.flat_map(|(&side, ranges)| {
            let ranges = ranges.iter();
            ranges.map(move |(&first, &end)| (SectorRange::between(first, end), side))
        });
        Self {
            ranges: ranges.collect(),
            suspects: map.suspects,
        }
    }
}

impl TryFrom<Wire> for Quarantine {
    type Error = &'static str;

    fn try_from(mut wire: Wire) -> Result<Self, &'static str> {
        if wire.ranges.len() > MAX_RANGES || wire.suspects.len() > MAX_SUSPECTS {
            return Err("quarantine: over its limits");
        }
        let mut map = Self {
            suspects: wire.suspects,
            ..Self::default()
        };
        wire.ranges
            .sort_by_key(|(range, side)| (*side, range.first));
        let mut free = None;
        for (range, side) in wire.ranges {
            let overlaps = free.is_some_and(|(of, from)| of == side && range.first < from);
            if range.count == 0 || overlaps || range.end() == u64::MAX {
                return Err("quarantine: empty or overlapping ranges");
            }
            free = Some((side, range.end()));
            map.put(range, side);
        }
        Ok(map)
    }
}

impl Quarantine {
    /// Whether nothing is quarantined.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// The quarantined ranges in order, each with the epoch of the side file that counts.
    pub fn ranges(&self) -> impl Iterator<Item = (SectorRange, Epoch)> + '_ {
        let top = self.top.iter();
        top.map(|(&first, &(end, side))| (SectorRange::between(first, end), side))
    }

    /// The side files, the oldest first: in this order they are made where they are missing.
    pub fn sides(&self) -> impl Iterator<Item = Epoch> + '_ {
        self.layers.keys().copied()
    }

    /// From where the side file of epoch `side` gets what it begins with, piece by piece: until it is
    /// made, its sectors are in the layers below.
    #[must_use]
    pub fn sources(&self, side: Epoch) -> Vec<(SectorRange, Location)> {
        let mut below = Self::default();
        for (&older, ranges) in self.layers.range(..side) {
            for (&first, &end) in ranges {
                below.put(SectorRange::between(first, end), older);
            }
        }
        if canary::on(Canary::SideWithHoles) {
            return Vec::new();
        }
        let ranges = self.layers.get(&side).into_iter().flatten();
        ranges
            .flat_map(|(&first, &end)| below.locate(SectorRange::between(first, end)))
            .collect()
    }

    /// Hosts that may still write.
    #[must_use]
    pub fn suspects(&self) -> &[HostId] {
        &self.suspects
    }

    /// Whether one more go-live fits.
    #[must_use]
    pub fn has_room(&self) -> bool {
        let ranges: usize = self.layers.values().map(BTreeMap::len).sum();
        ranges + MAX_OUTSTANDING <= MAX_RANGES && self.suspects.len() < MAX_SUSPECTS
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
        let before = self.top.range(..range.first).next_back();
        before
            .into_iter()
            .chain(self.top.range(range.first..range.end()))
            .filter(move |(_, (end, _))| *end > range.first)
            .map(|(&first, &(end, side))| (first, end, side))
    }

    /// From now on `range` is in the side file of epoch `side`, than which there is no newer one.
    pub(crate) fn put(&mut self, range: SectorRange, side: Epoch) {
        let newest = self.layers.keys().next_back();
        assert!(
            newest.is_none_or(|newest| *newest <= side),
            "layers are made in the order of epochs"
        );
        let layer = self.layers.entry(side).or_default();
        let (mut start, mut end) = (range.first, range.end());
        // What this layer has of it already becomes one range with it.
        while let Some((&first, &last)) = layer.range(..end).next_back()
            && last > start
        {
            layer.remove(&first);
            (start, end) = (start.min(first), end.max(last));
        }
        layer.insert(start, end);
        let range = SectorRange::between(start, end);
        let cut: Vec<_> = self.overlapping(range).collect();
        for (first, end, old) in cut {
            self.top.remove(&first);
            if first < range.first {
                self.top.insert(first, (range.first, old));
            }
            if end > range.end() {
                self.top.insert(range.end(), (end, old));
            }
        }
        self.top.insert(range.first, (range.end(), side));
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
        pieces.push((SectorRange::between(first, end), at));
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

    #[test]
    fn a_side_file_is_filled_from_where_its_sectors_were_before() {
        let mut map = Quarantine::default();
        map.put(range(10, 10), Epoch(2));
        map.put(range(18, 4), Epoch(3));
        map.put(range(8, 12), Epoch(5));
        assert_eq!(map.sides().collect::<Vec<_>>(), [2, 3, 5].map(Epoch));
        assert_eq!(
            map.sources(Epoch(2)),
            vec![(range(10, 10), Location::Image)]
        );
        assert_eq!(
            map.sources(Epoch(3)),
            vec![
                (range(18, 2), Location::Side(Epoch(2))),
                (range(20, 2), Location::Image),
            ]
        );
        assert_eq!(
            map.sources(Epoch(5)),
            vec![
                (range(8, 2), Location::Image),
                (range(10, 8), Location::Side(Epoch(2))),
                (range(18, 2), Location::Side(Epoch(3))),
            ]
        );
    }

    #[test]
    fn writes_that_overlap_are_one_range_of_their_layer() {
        let mut map = Quarantine::default();
        for (first, count) in [(10, 4), (20, 4), (12, 10)] {
            map.put(range(first, count), Epoch(2));
        }
        let ranges: Vec<_> = map.ranges().collect();
        assert_eq!(ranges, [(range(10, 14), Epoch(2))]);
    }

    proptest! {
        /// Sectors as a table of what each layer has.
        #[test]
        fn locate_and_sources_agree_with_a_table_of_sectors(
            puts in proptest::collection::vec((0u64..60, 1u64..20, 0u64..2), 0..30),
            (first, count) in (0u64..70, 1u64..20),
        ) {
            let mut map = Quarantine::default();
            let mut table = vec![Vec::new(); 100];
            let mut side = 1;
            for (first, count, newer) in puts {
                side += newer;
                map.put(range(first, count), Epoch(side));
                for slot in &mut table[first as usize..(first + count) as usize] {
                    slot.retain(|other| *other != Epoch(side));
                    slot.push(Epoch(side));
                }
            }
            let at = |side: Option<&Epoch>| side.map_or(Location::Image, |side| Location::Side(*side));
            let mut next = first;
            for (piece, location) in map.locate(range(first, count)) {
                prop_assert_eq!(piece.first, next);
                for sector in piece.first..piece.end() {
                    prop_assert_eq!(at(table[sector as usize].last()), location);
                }
                next = piece.end();
            }
            prop_assert_eq!(next, first + count);
            for side in map.sides() {
                let pieces = map.sources(side);
                let covered: u64 = pieces.iter().map(|(piece, _)| piece.count).sum();
                let has = table.iter().filter(|slot| slot.contains(&side)).count();
                prop_assert_eq!(covered, has as u64);
                for (piece, location) in pieces {
                    for sector in piece.first..piece.end() {
                        let slot = &table[sector as usize];
                        let below = slot.iter().rfind(|other| **other < side);
                        prop_assert!(slot.contains(&side));
                        prop_assert_eq!(at(below), location);
                    }
                }
            }
            let wire = Wire::from(map.clone());
            prop_assert_eq!(Quarantine::try_from(wire), Ok(map));
        }
    }
}
