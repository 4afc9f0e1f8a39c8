//! The shared storage of a stage, as each host sees it: a file system of this program's (FUSE) over one
//! directory, with a mount for each host.
//!
//! ```text
//!  host a: view-a/ ─┐                        ┌─ gate: waits where the host is cut off from the storage
//!  host b: view-b/ ─┼─> passthrough (FUSE) ──┼─ ledger: every write, who and what; every epoch, who won it
//!  host c: view-c/ ─┘                        └─ the directory itself
//! ```
//! A host can be cut off, so that what it asks waits until it is there again; or its writes can be held,
//! so that they land later than they were issued, even after their host's end. Nothing is cached: what one
//! host writes, the others read. Mounts are in a mount namespace of this process and what it starts: they go
//! with the last of these, whatever happens.
//!
//! Not modelled: errors of the storage, torn writes, and a server that forgets what it has answered.

mod gate;
mod ledger;
mod passthrough;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fuser::{BackgroundSession, Config, MountOption, Session, SessionACL};

pub(crate) use ledger::Verdict;

use crate::Failure;
use crate::stage::{SITES, SiteId};
use gate::Gate;
use ledger::Ledger;
use passthrough::Passthrough;

/// Threads of each mount: some of them may wait.
const THREADS: usize = 2;

/// See the module. Unmounted when it goes out of scope.
pub(crate) struct Storage {
    views: Vec<View>,
    ledger: Arc<Mutex<Ledger>>,
}

struct View {
    gate: Arc<Gate>,
    directory: PathBuf,
    session: Option<BackgroundSession>,
}

impl Storage {
    /// Mounts `backing` for every host, at directories that are made in `at`. `disk` is the name of the
    /// guest's disk in it, `epochs` that of the directory with the records of epochs.
    pub(crate) fn new(
        backing: &Path,
        at: &Path,
        disk: &str,
        epochs: &str,
    ) -> Result<Self, Failure> {
        let ledger = Arc::new(Mutex::new(Ledger::new(disk, epochs)));
        let view = |id: SiteId| -> Result<View, Failure> {
            let directory = at.join(format!("view-{id}"));
            fs::create_dir(&directory)?;
            let gate = Arc::new(Gate::default());
            let view = Passthrough::new(id, backing, Arc::clone(&gate), Arc::clone(&ledger))?;
            let mut config = Config::default();
            config.mount_options = vec![MountOption::FSName("pollux-bench".to_owned())];
            config.acl = SessionACL::All;
            config.n_threads = Some(THREADS);
            let session = Session::new(view, &directory, &config)
                .and_then(Session::spawn)
                .map_err(|error| format!("mounting the storage of host {id}: {error}"))?;
            Ok(View {
                gate,
                directory,
                session: Some(session),
            })
        };
        Ok(Self {
            views: SITES.into_iter().map(view).collect::<Result<_, _>>()?,
            ledger,
        })
    }

    /// Where a host finds it.
    pub(crate) fn directory(&self, id: SiteId) -> &Path {
        &self.view(id).directory
    }

    fn view(&self, id: SiteId) -> &View {
        &self.views[id.index()]
    }

    /// Cuts a host off: what it asks from now on waits.
    pub(crate) fn cut(&self, id: SiteId) {
        self.view(id).gate.cut();
    }

    /// It is there again for this host.
    pub(crate) fn mend(&self, id: SiteId) {
        self.view(id).gate.mend();
    }

    /// What this host writes from now on to files takes so much longer; zero ends it. What is held already
    /// stays held.
    pub(crate) fn hold_writes(&self, id: SiteId, time: Duration) {
        self.view(id).gate.hold_writes(time);
    }

    /// How many writes of this host are held.
    pub(crate) fn held(&self, id: SiteId) -> usize {
        self.view(id).gate.held()
    }

    /// On all that was written so far.
    pub(crate) fn verdict(&self) -> Verdict {
        ledger::lock(&self.ledger).verdict()
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        for view in &mut self.views {
            view.gate.mend();
            if let Some(session) = view.session.take()
                && let Err(error) = session.umount_and_join()
            {
                eprintln!("unmounting {}: {error}", view.directory.display());
            }
        }
    }
}

/// Gives this thread, and all that it starts from now on, mounts of its own.
///
/// # Errors
/// No right to.
#[allow(unsafe_code)] // the safe wrapper is deprecated, because some flags are not sound
pub(crate) fn own_mounts() -> Result<(), Failure> {
    use rustix::mount::{MountPropagationFlags, mount_change};
    // SAFETY: NEWNS leaves the descriptor table shared, which is what could break I/O safety.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }?;
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )?;
    Ok(())
}
