//! The end of a quarantine: side files are folded back into the image, and then let go.

use std::io;
use std::time::{Duration, Instant};

use super::super::backend::Backend;
use super::super::handle::Delivery;
use super::super::storage::Storage;

/// Pause before side files that could not be folded back are tried again.
pub(super) const FOLD_PAUSE: Duration = Duration::from_millis(200);

/// The end of a quarantine. Parts on side files that are under way have to end first: a write that the
/// guest was told of must be in what is folded, and no file is closed under a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Fold {
    /// Nobody asked.
    #[default]
    No,
    /// Writes to quarantined sectors wait in `parked`; what is under way ends, then all is copied, at
    /// this time at the earliest.
    Copying(Instant),
    /// Copied; the record still names the side files.
    Copied,
    /// Reads wait, too; what is under way ends, then the side files are removed.
    Releasing,
}

impl Backend {
    /// The quarantine is to end: its sectors are copied back into the image.
    pub(in crate::io) fn fold(&mut self) -> io::Result<()> {
        if self.requests.fold == Fold::No {
            self.requests.fold = Fold::Copying(Instant::now());
        }
        self.drive_fold()
    }

    /// The record does not name the side files any more.
    pub(in crate::io) fn unquarantine(&mut self) -> io::Result<()> {
        self.requests.fold = Fold::Releasing;
        self.drive_fold()
    }

    /// Goes on with the end of the quarantine as far as it can.
    pub(super) fn drive_fold(&mut self) -> io::Result<()> {
        let (reads, writes) = self.requests.on_sides;
        match self.requests.fold {
            Fold::Copying(at) if writes == 0 && at <= Instant::now() => {
                let folded = self.config.disk.as_ref().map_or(Ok(()), Storage::fold);
                match folded {
                    Ok(()) => {
                        self.requests.fold = Fold::Copied;
                        (self.config.deliver)(Delivery::Folded);
                    }
                    Err(error) => {
                        tracing::error!(%error, "side files cannot be folded back; it is tried again");
                        self.requests.fold = Fold::Copying(Instant::now() + FOLD_PAUSE);
                    }
                }
                Ok(())
            }
            Fold::Releasing if reads + writes == 0 => {
                self.requests.fold = Fold::No;
                if let Some(storage) = &mut self.config.disk {
                    storage.release();
                }
                std::mem::take(&mut self.requests.parked)
                    .into_iter()
                    .try_for_each(|effect| self.start(effect))
            }
            _ => Ok(()),
        }
    }
}
