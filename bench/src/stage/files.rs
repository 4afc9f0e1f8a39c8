//! The files of a stage: a directory of its own for everything that its programs share or say, gone with it.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::SiteId;
use crate::Failure;
use crate::storage::Storage;

/// Name of the guest's disk on shared storage.
const DISK: &str = "disk.img";
/// Name of the directory with the records of epochs, there.
const EPOCHS: &str = "epochs";
/// Bytes of the key that all hosts share.
const KEY_BYTES: usize = 32;

/// See the module.
pub(crate) struct Files {
    /// Dropped before what it is made of.
    storage: Option<Storage>,
    root: TempDir,
    /// Where consoles and logs are kept when this ends.
    keep: Option<PathBuf>,
}

impl Files {
    pub(super) fn new(keep: Option<&Path>) -> Result<Self, Failure> {
        let root = tempfile::Builder::new().prefix("pollux-stage-").tempdir()?;
        fs::create_dir(root.path().join("shared"))?;
        fs::create_dir(root.path().join("tmp"))?;
        let key: [u8; KEY_BYTES] = rand::random();
        fs::write(root.path().join("key"), key)?;
        if let Some(keep) = keep {
            fs::create_dir_all(keep)?;
        }
        Ok(Self {
            storage: None,
            root,
            keep: keep.map(Path::to_owned),
        })
    }

    /// Has every host see the shared storage through a layer of its own from now on.
    pub(super) fn watch_storage(&mut self) -> Result<(), Failure> {
        let storage = Storage::new(&self.shared(), self.root.path(), DISK, EPOCHS)?;
        self.storage = Some(storage);
        Ok(())
    }

    /// That layer.
    pub(super) fn storage(&self) -> Option<&Storage> {
        self.storage.as_ref()
    }

    /// The directory on shared storage.
    pub(crate) fn shared(&self) -> PathBuf {
        self.root.path().join("shared")
    }

    /// The same, as a host sees it.
    pub(super) fn shared_of(&self, id: SiteId) -> PathBuf {
        match &self.storage {
            Some(storage) => storage.directory(id).to_owned(),
            None => self.shared(),
        }
    }

    /// The guest's disk, as a host sees it.
    pub(super) fn disk_of(&self, id: SiteId) -> PathBuf {
        self.shared_of(id).join(DISK)
    }

    /// The guest's disk, on shared storage.
    pub(crate) fn disk(&self) -> PathBuf {
        self.shared().join(DISK)
    }

    /// For temporary files of the programs, which do not get to remove them when they are killed.
    pub(super) fn temporary(&self) -> PathBuf {
        self.root.path().join("tmp")
    }

    /// The key of all hosts.
    pub(crate) fn key(&self) -> PathBuf {
        self.root.path().join("key")
    }

    /// The socket of a host's VMM.
    pub(crate) fn api(&self, id: SiteId) -> PathBuf {
        self.root.path().join(format!("{id}.sock"))
    }

    /// What the guest's console showed on a host.
    pub(crate) fn console(&self, id: SiteId) -> PathBuf {
        self.root.path().join(format!("{id}.console"))
    }

    /// The pipe to the guest's console.
    pub(super) fn keyboard(&self) -> PathBuf {
        self.root.path().join("keyboard")
    }

    /// Adds what a VMM logged to the file of its host, if anything is to be kept.
    pub(super) fn keep_log(&self, id: SiteId, said: &str) {
        use std::io::Write;
        let Some(keep) = &self.keep else { return };
        let path = keep.join(format!("{id}.log"));
        let file = fs::File::options().append(true).create(true).open(&path);
        if let Err(error) = file.and_then(|mut file| file.write_all(said.as_bytes())) {
            eprintln!("{}: {error}", path.display());
        }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let Some(keep) = &self.keep else { return };
        for id in super::SITES {
            let console = self.console(id);
            if console.exists() {
                let to = keep.join(format!("{id}.console"));
                if let Err(error) = fs::copy(&console, &to) {
                    eprintln!("{}: {error}", to.display());
                }
            }
        }
    }
}
