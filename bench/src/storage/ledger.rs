//! Who wrote what to the guest's disk, and in which epoch; and whether one host at a time did.
//!
//! The owner of an epoch is who linked its record. A write to the image that lands in an epoch of another host
//! is late. It is harmless only if the new owner's VM has issued the same write itself: R16 has it issue again
//! what the old primary may not have completed, to side files. A late write with a sector that the new owner
//! has not written with the same content is one of a second primary.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::report::{Measure, Report};
use crate::stage::SiteId;

/// Bytes of what is compared.
const SECTOR: usize = 512;
/// Findings in words.
const DESCRIBED: usize = 8;

/// Where a write goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Image,
    /// A side file of it.
    Side,
}

/// A sector of a late write, until the new owner is seen to write the same.
#[derive(Debug)]
struct Late {
    from: SiteId,
    epoch: usize,
    hash: u64,
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Writes to the image.
    pub(crate) writes: u64,
    /// Writes to side files.
    pub(crate) side_writes: u64,
    /// Epochs that were won.
    pub(crate) epochs: u64,
    /// Writes to the image that landed in an epoch of another host.
    pub(crate) late: u64,
    /// Sectors of them that the owner never wrote so.
    pub(crate) double_primary: u64,
    pub(crate) described: Vec<String>,
}

impl Verdict {
    /// Adds it to a report.
    pub(crate) fn report(&self, report: &mut Report) {
        report.push(Measure::count("double_primary_disk", self.double_primary).noted(NOTE));
        report.push(Measure::count("disk_writes", self.writes));
        report.push(Measure::count("disk_side_writes", self.side_writes));
        report.push(Measure::count("disk_late_writes", self.late));
        report.push(Measure::count("epochs", self.epochs));
        if self.double_primary > 0 {
            report.fail(format!(
                "{} sectors were written by a second primary",
                self.double_primary
            ));
        }
        if self.writes == 0 {
            report.fail("no write of the guest was seen on the storage");
        }
        for line in &self.described {
            eprintln!("disk: {line}");
        }
    }
}

/// What a reader must know.
const NOTE: &str = "sectors that landed from a replaced host and that the new one has not written with the same content";

/// See the module.
#[derive(Debug)]
pub(super) struct Ledger {
    disk: String,
    epochs: String,
    /// Owners in the order of their epochs.
    owners: Vec<SiteId>,
    /// How often an epoch has gone to another host. A host wins more epochs while it owns one, as when it
    /// has a backup again: what it issued in the first of them counts in all.
    tenure: usize,
    records: BTreeSet<String>,
    /// Content of every sector that the owners wrote while they were: tenures and hashes.
    written: BTreeMap<u64, Vec<(usize, u64)>>,
    late: BTreeMap<u64, Vec<Late>>,
    found: Verdict,
}

/// The ledger, whatever became of who held it.
pub(super) fn lock(ledger: &Mutex<Ledger>) -> MutexGuard<'_, Ledger> {
    ledger.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ledger {
    pub(super) fn new(disk: &str, epochs: &str) -> Self {
        Self {
            disk: disk.to_owned(),
            epochs: epochs.to_owned(),
            owners: Vec::new(),
            tenure: 0,
            records: BTreeSet::new(),
            written: BTreeMap::new(),
            late: BTreeMap::new(),
            found: Verdict::default(),
        }
    }

    /// A host has linked a file to this name, in the storage.
    pub(super) fn linked(&mut self, host: SiteId, name: &Path) {
        let is_record = name
            .parent()
            .is_some_and(|parent| parent.ends_with(&self.epochs));
        if is_record && self.records.insert(name.display().to_string()) {
            if self.owners.last() != Some(&host) {
                self.tenure += 1;
            }
            self.owners.push(host);
            self.found.epochs += 1;
        }
    }

    fn place(&self, name: &Path) -> Option<Place> {
        let name = name.file_name()?.to_str()?;
        if name == self.disk {
            Some(Place::Image)
        } else {
            let side = name.strip_prefix(&self.disk)?.starts_with(".side-");
            side.then_some(Place::Side)
        }
    }

    /// A write has landed.
    pub(super) fn wrote(&mut self, host: SiteId, name: &Path, offset: u64, data: &[u8]) {
        let Some(place) = self.place(name) else {
            return;
        };
        let epoch = self.owners.len();
        let is_late = self.owners.last().is_some_and(|owner| *owner != host);
        match (place, is_late) {
            (Place::Image, true) => self.found.late += 1,
            (Place::Image, false) => self.found.writes += 1,
            (Place::Side, _) => self.found.side_writes += 1,
        }
        let first = offset / SECTOR as u64;
        for (number, sector) in data.chunks(SECTOR).enumerate() {
            let at = first + number as u64;
            let hash = hash_of(sector);
            if is_late && place == Place::Image {
                self.late_sector(
                    at,
                    Late {
                        from: host,
                        epoch,
                        hash,
                    },
                );
            } else if !is_late {
                self.own_sector(at, hash);
            }
        }
    }

    /// The owner's own.
    fn own_sector(&mut self, at: u64, hash: u64) {
        let tenure = self.tenure;
        if let Some(late) = self.late.get_mut(&at) {
            late.retain(|late| late.hash != hash);
            if late.is_empty() {
                self.late.remove(&at);
            }
        }
        let written = self.written.entry(at).or_default();
        // What a late write may repeat is of this tenure.
        written.retain(|(of, _)| *of == tenure);
        if !written.contains(&(tenure, hash)) {
            written.push((tenure, hash));
        }
    }

    fn late_sector(&mut self, at: u64, late: Late) {
        let written = self.written.get(&at);
        let known = written.is_some_and(|written| written.contains(&(self.tenure, late.hash)));
        if !known {
            self.late.entry(at).or_default().push(late);
        }
    }

    /// What is still open now is of a second primary.
    pub(super) fn verdict(&self) -> Verdict {
        let mut verdict = self.found.clone();
        for (at, late) in &self.late {
            for one in late {
                verdict.double_primary += 1;
                if verdict.described.len() < DESCRIBED {
                    let (host, epoch) = (one.from, one.epoch);
                    verdict.described.push(format!(
                        "sector {at} landed from host {host} while another owned epoch {epoch}, and that never wrote the same"
                    ));
                }
            }
        }
        verdict
    }
}

fn hash_of(sector: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    sector.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stage::SITES;

    fn ledger() -> Ledger {
        let mut ledger = Ledger::new("disk.img", "epochs");
        ledger.linked(SITES[0], Path::new("/epochs/1"));
        ledger
    }

    const IMAGE: &str = "/disk.img";

    #[test]
    fn a_late_write_that_the_new_owner_issues_again_is_harmless() {
        let mut ledger = ledger();
        ledger.wrote(SITES[0], Path::new(IMAGE), 0, &[1; 1024]);
        ledger.linked(SITES[1], Path::new("/epochs/2"));
        ledger.wrote(SITES[0], Path::new(IMAGE), 4096, &[2; 1024]);
        assert_eq!(ledger.verdict().double_primary, 2);
        ledger.wrote(SITES[1], Path::new("/disk.img.side-2"), 4096, &[2; 1024]);
        let verdict = ledger.verdict();
        assert_eq!(
            (verdict.double_primary, verdict.late, verdict.side_writes),
            (0, 1, 1)
        );
        // And the other way round: issued again before the old one lands.
        ledger.wrote(SITES[1], Path::new("/disk.img.side-2"), 8192, &[3; 512]);
        ledger.wrote(SITES[0], Path::new(IMAGE), 8192, &[3; 512]);
        assert_eq!(ledger.verdict().double_primary, 0);
    }

    #[test]
    fn what_the_new_owner_issued_counts_in_its_later_epochs_but_not_what_others_did() {
        let mut ledger = ledger();
        ledger.wrote(SITES[0], Path::new(IMAGE), 0, &[3; 512]);
        ledger.linked(SITES[1], Path::new("/epochs/2"));
        ledger.wrote(SITES[1], Path::new("/disk.img.side-2"), 512, &[2; 512]);
        ledger.linked(SITES[1], Path::new("/epochs/3"));
        ledger.wrote(SITES[0], Path::new(IMAGE), 512, &[2; 512]);
        assert_eq!(ledger.verdict().double_primary, 0);
        ledger.wrote(SITES[0], Path::new(IMAGE), 0, &[3; 512]);
        assert_eq!(ledger.verdict().double_primary, 1);
    }

    #[test]
    fn a_late_write_of_other_content_is_of_a_second_primary() {
        let mut ledger = ledger();
        ledger.linked(SITES[1], Path::new("/epochs/2"));
        ledger.wrote(SITES[1], Path::new(IMAGE), 0, &[1; 512]);
        ledger.wrote(SITES[0], Path::new(IMAGE), 0, &[9; 512]);
        let verdict = ledger.verdict();
        assert_eq!(
            (verdict.double_primary, verdict.writes, verdict.late),
            (1, 1, 1)
        );
        assert!(verdict.described[0].contains("sector 0 landed from host a"));
    }

    #[test]
    fn other_files_and_links_that_are_no_records_do_not_count() {
        let mut ledger = ledger();
        ledger.linked(SITES[1], Path::new("/elsewhere/2"));
        ledger.wrote(SITES[1], Path::new("/epochs/tmp"), 0, &[1; 512]);
        let verdict = ledger.verdict();
        assert_eq!((verdict.epochs, verdict.writes, verdict.late), (1, 0, 0));
    }
}
