//! Series: what fails in them, and how often, if nothing else is said.

use super::cause::{CAUSES, Cause};

/// A series of runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Series {
    /// Everything that can fail, mixed.
    Mixed,
    /// The hosts of the pair do not hear each other, and both reach the storage: exactly one goes on.
    Partition,
    /// No host reaches the storage: both wait, and go on when it is back.
    Storage,
    /// The backup is killed: the client sees nothing, and redundancy comes back.
    Backup,
    /// Failover after failover: the guest's clock stays with the host's.
    Clock,
    /// Both hosts of the pair are lost at once and come back: no VM starts from what is out of date, and an
    /// operator is told what to do.
    Cold,
}

impl Series {
    /// What fails.
    pub(super) const fn causes(self) -> &'static [Cause] {
        match self {
            Self::Mixed => &CAUSES,
            Self::Partition => &[Cause::Partition],
            Self::Storage => &[
                Cause::StorageUnreachable,
                Cause::StorageUnreachableAndVmmKilled,
            ],
            Self::Backup => &[Cause::BackupKilled],
            Self::Clock => &[Cause::VmmKilled, Cause::HostLost],
            Self::Cold => &[],
        }
    }

    /// How often.
    pub(super) const fn runs(self) -> usize {
        match self {
            Self::Mixed => 100,
            Self::Partition | Self::Storage | Self::Cold => 50,
            Self::Backup | Self::Clock => 20,
        }
    }
}
