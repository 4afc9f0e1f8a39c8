//! What can fail, and in which order it does in a run of the benchmark.

use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// A failure. Its name is part of the names of results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, clap::ValueEnum)]
pub(crate) enum Cause {
    /// SIGKILL of the primary's VMM.
    VmmKilled,
    /// SIGKILL of the primary's channel daemon.
    ChannelKilled,
    /// Of both.
    VmmAndChannelKilled,
    /// Of the primary's VMM and of the backup's channel daemon.
    VmmAndBackupChannelKilled,
    /// SIGKILL of the backup's VMM: nobody takes over, redundancy comes back.
    BackupKilled,
    /// The backup is killed, and then the next standby while the state is on its way to it.
    StandbyKilledInTransfer,
    /// The primary's cable to the logging network is pulled; the client still reaches both hosts.
    LinkCut,
    /// The primary's host is lost with everything on it.
    HostLost,
    /// SIGSTOP of the primary's VMM for longer than the time-out, then SIGCONT.
    VmmStopped,
    /// The same of the primary's channel daemon.
    ChannelStopped,
    /// The same of the backup's channel daemon.
    BackupChannelStopped,
    /// SIGKILL of the primary's VMM while the storage holds writes of it, which land seconds later.
    VmmKilledWriting,
    /// SIGSTOP of the primary's VMM while the storage holds writes of it, and SIGCONT.
    VmmStoppedWriting,
    /// No host reaches the storage, for longer than any time-out.
    StorageUnreachable,
    /// Nothing passes between the two hosts of the pair; both reach the storage, the client and the third.
    Partition,
    /// The primary's host alone does not reach the storage.
    PrimaryStorageLost,
    /// The backup's host alone.
    BackupStorageLost,
    /// No host reaches the storage, and then the primary's VMM is killed.
    StorageUnreachableAndVmmKilled,
}

/// All of them.
pub(crate) const CAUSES: [Cause; 18] = [
    Cause::VmmKilled,
    Cause::ChannelKilled,
    Cause::VmmAndChannelKilled,
    Cause::VmmAndBackupChannelKilled,
    Cause::BackupKilled,
    Cause::StandbyKilledInTransfer,
    Cause::LinkCut,
    Cause::HostLost,
    Cause::VmmStopped,
    Cause::ChannelStopped,
    Cause::BackupChannelStopped,
    Cause::VmmKilledWriting,
    Cause::VmmStoppedWriting,
    Cause::StorageUnreachable,
    Cause::Partition,
    Cause::PrimaryStorageLost,
    Cause::BackupStorageLost,
    Cause::StorageUnreachableAndVmmKilled,
];

impl Cause {
    /// Its name.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::VmmKilled => "vmm_killed",
            Self::ChannelKilled => "channel_killed",
            Self::VmmAndChannelKilled => "vmm_and_channel_killed",
            Self::VmmAndBackupChannelKilled => "vmm_and_backup_channel_killed",
            Self::BackupKilled => "backup_killed",
            Self::StandbyKilledInTransfer => "standby_killed_in_transfer",
            Self::LinkCut => "link_cut",
            Self::HostLost => "host_lost",
            Self::VmmStopped => "vmm_stopped",
            Self::ChannelStopped => "channel_stopped",
            Self::BackupChannelStopped => "backup_channel_stopped",
            Self::VmmKilledWriting => "vmm_killed_writing",
            Self::VmmStoppedWriting => "vmm_stopped_writing",
            Self::StorageUnreachable => "storage_unreachable",
            Self::Partition => "partition",
            Self::PrimaryStorageLost => "primary_storage_lost",
            Self::BackupStorageLost => "backup_storage_lost",
            Self::StorageUnreachableAndVmmKilled => "storage_unreachable_and_vmm_killed",
        }
    }

    /// Who goes on.
    pub(crate) const fn effect(self) -> Effect {
        match self {
            Self::VmmKilled
            | Self::VmmAndChannelKilled
            | Self::VmmAndBackupChannelKilled
            | Self::VmmStopped
            | Self::VmmKilledWriting
            | Self::VmmStoppedWriting
            | Self::PrimaryStorageLost
            | Self::StorageUnreachableAndVmmKilled
            | Self::HostLost => Effect::Moves,
            Self::BackupKilled | Self::StandbyKilledInTransfer => Effect::Stays,
            Self::LinkCut | Self::Partition | Self::ChannelStopped | Self::BackupChannelStopped => {
                Effect::Either
            }
            Self::ChannelKilled | Self::StorageUnreachable | Self::BackupStorageLost => {
                Effect::Mends
            }
        }
    }

    /// Whether it is a failure of the storage, or needs its help.
    pub(crate) const fn needs_storage(self) -> bool {
        matches!(
            self,
            Self::VmmKilledWriting
                | Self::VmmStoppedWriting
                | Self::StorageUnreachable
                | Self::PrimaryStorageLost
                | Self::BackupStorageLost
                | Self::StorageUnreachableAndVmmKilled
        )
    }

    /// Whether both hosts of the pair live on and do not hear each other.
    pub(crate) const fn splits_the_pair(self) -> bool {
        matches!(self, Self::LinkCut | Self::Partition)
    }
}

/// Who goes on after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Another host: the old primary cannot.
    Moves,
    /// The primary, where it is, with another backup.
    Stays,
    /// One of the pair, and exactly one, with another backup.
    Either,
    /// One of the pair; perhaps as before, in the same epoch and as a pair, because what failed is
    /// replaced before anybody is taken for lost.
    Mends,
}

/// So many causes: each as often as any other, or once more, in an order that the seed gives.
pub(crate) fn order(among: &[Cause], runs: usize, rng: &mut ChaCha8Rng) -> Vec<Cause> {
    let mut order = Vec::with_capacity(runs + among.len());
    while order.len() < runs && !among.is_empty() {
        let mut block = among.to_vec();
        block.shuffle(rng);
        order.extend(block);
    }
    order.truncate(runs);
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn causes_are_mixed_evenly_and_as_the_seed_says() {
        let order_of = |seed| order(&CAUSES, 100, &mut ChaCha8Rng::seed_from_u64(seed));
        let order = order_of(1);
        assert_eq!(order.len(), 100);
        for cause in CAUSES {
            let times = order.iter().filter(|c| **c == cause).count();
            assert!((5..=6).contains(&times), "{cause:?} {times} times");
        }
        assert_eq!(order, order_of(1));
        assert_ne!(order, order_of(2));
    }

    #[test]
    fn names_are_those_of_the_command_line() {
        for cause in CAUSES {
            let value = clap::ValueEnum::to_possible_value(&cause).unwrap();
            assert_eq!(value.get_name().replace('-', "_"), cause.name());
        }
    }
}
