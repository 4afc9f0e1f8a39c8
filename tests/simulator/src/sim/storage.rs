//! The shared storage: the image, side files, the directory of epochs, and what each host caches of it.
//!
//! - A write to the image is on the storage when it is answered (`O_DIRECT | O_DSYNC`); until then it is
//!   on its way, and lands at any time: also after its host has died, until that host's storage client
//!   mounts again, which voids it.
//! - A file's content is in the cache of the host that wrote it until it is synced or written back; the
//!   host's crash loses it, and the file is then empty for everybody. Names and links are the server's.
//! - What others linked or made may not be seen for a while: clients cache directories.

use std::collections::BTreeMap;

use ft::directory::{FileResult, MARKER, record_epoch};
use ft::{EpochRecord, Location, SectorRange};

use crate::guest::{KEYS, Sector};
use crate::plan::MAX_HOSTS;

/// A request to the image or a side file.
#[derive(Debug, Clone, Copy)]
pub(super) struct IoOp {
    pub(super) host: usize,
    pub(super) inc: u32,
    pub(super) boot: u32,
    pub(super) registration: u64,
    /// The guest's request; none for one of the VMM's own.
    pub(super) request: Option<u64>,
    pub(super) key: u8,
    pub(super) at: Location,
    pub(super) write: Option<Sector>,
    /// When it was made: it reads what was there then, also of a file that has been removed since.
    pub(super) since: u64,
}

#[derive(Debug)]
struct Inode {
    content: Vec<u8>,
    synced: bool,
    /// The host whose cache has the content.
    cached: Option<usize>,
    made_by: usize,
    made_at: u64,
}

#[derive(Debug)]
struct Side {
    name: Location,
    sectors: [Option<Sector>; KEYS],
    removed_at: u64,
}

/// The storage.
#[derive(Debug)]
pub(crate) struct Store {
    image: [Sector; KEYS],
    sides: Vec<Side>,
    inodes: Vec<Inode>,
    names: BTreeMap<String, (usize, usize, u64)>,
    /// The run of a host's kernel that mounted last: requests of earlier ones are void.
    mounted: [u32; MAX_HOSTS],
    /// Registrations up to here are cut off.
    fenced: [u64; MAX_HOSTS],
    registrations: u64,
}

impl Store {
    pub(super) fn new() -> Self {
        let mut store = Self {
            image: [Sector::default(); KEYS],
            sides: Vec::new(),
            inodes: Vec::new(),
            names: BTreeMap::new(),
            mounted: [0; MAX_HOSTS],
            fenced: [0; MAX_HOSTS],
            registrations: 0,
        };
        store.create(0, MARKER, &[]);
        store.inodes[0].synced = true;
        store
    }

    // Blocks.

    pub(super) fn register(&mut self) -> u64 {
        self.registrations += 1;
        self.registrations
    }

    /// Nothing that `host` has registered so far is let through any more.
    pub(super) fn fence(&mut self, host: usize) {
        self.fenced[host] = self.registrations;
    }

    pub(super) fn mounted(&mut self, host: usize, boot: u32) {
        self.mounted[host] = boot;
    }

    /// Whether what a host's kernel of that run has sent may still land.
    pub(super) fn lands(&self, host: usize, boot: u32) -> bool {
        self.mounted[host] <= boot
    }

    pub(super) fn admits(&self, host: usize, registration: u64) -> bool {
        registration > self.fenced[host]
    }

    pub(super) fn write(&mut self, at: Location, key: u8, sector: Sector) {
        let key = usize::from(key);
        if at == Location::Image {
            self.image[key] = sector;
            return;
        }
        let index = self.sides.iter().position(|side| side.name == at);
        let index = index.unwrap_or_else(|| {
            self.sides.push(Side {
                name: at,
                sectors: [None; KEYS],
                removed_at: u64::MAX,
            });
            self.sides.len() - 1
        });
        self.sides[index].sectors[key] = Some(sector);
    }

    /// A side file that is not there yet begins with what was there before of its sectors: whoever wins
    /// and dies before it has issued the outstanding writes again leaves no holes.
    pub(super) fn make_side(&mut self, at: Location, sources: Vec<(SectorRange, Location)>) {
        if self.sides.iter().any(|side| side.name == at) {
            return;
        }
        for (range, from) in sources {
            for key in range.first as u8..range.end().min(KEYS as u64) as u8 {
                let sector = self.read_sector(from, key, u64::MAX);
                self.write(at, key, sector);
            }
        }
    }

    /// A sector, for a request made at `since`. One that a side file does not have reads as zeros, as a
    /// hole does.
    pub(crate) fn read_sector(&self, at: Location, key: u8, since: u64) -> Sector {
        let key = usize::from(key);
        if at == Location::Image {
            return self.image[key];
        }
        let side = self.sides.iter().find(|side| side.name == at);
        let side = side.filter(|side| since <= side.removed_at);
        side.and_then(|side| side.sectors[key]).unwrap_or_default()
    }

    pub(super) fn remove_side(&mut self, at: Location, now: u64) {
        if let Some(side) = self.sides.iter_mut().find(|side| side.name == at) {
            side.removed_at = now;
        }
    }

    // The directory.

    fn seen(&self, host: usize, made_by: usize, made_at: u64, now: u64, stale: u64) -> bool {
        made_by == host || now >= made_at + stale
    }

    pub(super) fn list(&self, host: usize, now: u64, stale: u64) -> Vec<String> {
        let names = self.names.iter();
        names
            .filter(|(_, (_, by, at))| self.seen(host, *by, *at, now, stale))
            .map(|(name, _)| name.clone())
            .collect()
    }

    pub(super) fn read(&self, host: usize, name: &str, now: u64, stale: u64) -> Option<Vec<u8>> {
        let (inode, by, at) = self.names.get(name)?;
        if !self.seen(host, *by, *at, now, stale) {
            return None;
        }
        let inode = &self.inodes[*inode];
        if inode.synced || inode.cached == Some(host) {
            return Some(inode.content.clone());
        }
        Some(Vec::new())
    }

    pub(super) fn create(&mut self, host: usize, name: &str, bytes: &[u8]) {
        self.inodes.push(Inode {
            content: bytes.to_vec(),
            synced: false,
            cached: Some(host),
            made_by: host,
            made_at: 0,
        });
        let inode = self.inodes.len() - 1;
        self.names.insert(name.to_owned(), (inode, host, 0));
    }

    pub(super) fn link(&mut self, host: usize, from: &str, to: &str, now: u64) -> FileResult {
        if self.names.contains_key(to) {
            return FileResult::Exists;
        }
        let Some((inode, ..)) = self.names.get(from).copied() else {
            return FileResult::NotFound;
        };
        self.inodes[inode].made_at = now;
        self.inodes[inode].made_by = host;
        self.names.insert(to.to_owned(), (inode, host, now));
        FileResult::Done
    }

    pub(super) fn sync(&mut self, host: usize, name: &str) {
        if let Some((inode, ..)) = self.names.get(name) {
            let inode = &mut self.inodes[*inode];
            if inode.cached == Some(host) {
                inode.synced = true;
            }
        }
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.names.remove(name);
    }

    /// A host's cache is gone with it.
    pub(super) fn cache_lost(&mut self, host: usize) {
        for inode in &mut self.inodes {
            if inode.cached == Some(host) && !inode.synced {
                inode.cached = None;
                inode.content.clear();
                inode.synced = true;
            }
        }
    }

    /// The planted bug: only the newest record is kept.
    pub(super) fn prune(&mut self) {
        let newest = self
            .names
            .keys()
            .filter_map(|name| record_epoch(name))
            .max();
        self.names
            .retain(|name, _| record_epoch(name).is_none_or(|epoch| Some(epoch) == newest));
    }

    /// The record of that name as it was meant, whoever has it.
    pub(super) fn truth(&self, name: &str) -> Option<EpochRecord> {
        let (inode, ..) = self.names.get(name)?;
        EpochRecord::decode(&self.inodes[*inode].content).ok()
    }

    /// The newest record.
    pub(crate) fn newest(&self) -> Option<EpochRecord> {
        let name = self
            .names
            .keys()
            .rfind(|name| record_epoch(name).is_some())?;
        self.truth(name)
    }
}
