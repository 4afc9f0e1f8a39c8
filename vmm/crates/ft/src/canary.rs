//! Planted bugs, each switched on by name, so that the simulator can show that it finds them.
//!
//! Without the feature `canaries` every question is answered `false` at compile time: a product
//! build contains none of them. With it, one canary can be on in one thread.

/// A planted bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Canary {
    /// The gate lets effects out that nobody acknowledged.
    ReleaseBeforeAck,
    /// The gate lets the newest acknowledged effect out first.
    ReleaseOutOfOrder,
    /// An acknowledgement of an earlier session opens the gate of a later one.
    AcksOutliveTheirSession,
    /// An epoch is taken for won without asking the arbiter.
    SkipTestAndSet,
    /// An arbiter that cannot be reached is taken for won.
    UnreachableIsWon,
    /// A record that already exists is taken for lost without looking whose it is.
    ExistsIsLost,
    /// Records of earlier epochs are deleted, and nobody looks whether they are there.
    RecordPruned,
    /// The record is linked before it is synced.
    LinkBeforeSync,
    /// Protection is committed before the gate holds.
    EligibleBeforeHold,
    /// A standby confirms before it has what it is asked to confirm.
    ConfirmBeforeComplete,
    /// Late writes of the old primary are not quarantined.
    QuarantineSkipped,
    /// A quarantine is folded back while the old primary may still write.
    FoldBeforeGone,
    /// A side file begins empty.
    SideWithHoles,
    /// A standby that was never named gives up without making sure that no record can name it.
    GivesUpUnasked,
    /// A cold start does not mind an open record of a pair.
    ColdStartOnOpenRecord,
    /// A backup that began to drain follows again when its primary comes back.
    ResumeAfterDraining,
    /// A backup that diverged competes for the next epoch.
    DivergedCompetes,
    /// The lag control never stops the primary.
    LagUnlimited,
    /// The daemon acknowledges before it publishes.
    AckBeforePublish,
    /// The daemon goes on acknowledging after the session is closed.
    AckAfterClose,
    /// The daemon takes frames of whatever session and epoch.
    AcceptOldEpoch,
    /// The daemon of a dead VMM goes on acknowledging.
    AckForDeadVmm,
    /// The replayer does not wait for the log to pass the exit.
    RunPastHorizon,
    /// A Delta takes effect with its first part.
    PartialDelta,
    /// A Delta leaves out pages that equal their content at the last numbered exit, although an
    /// earlier Delta changed them on the replica.
    AbaPage,
    /// Data to write is read from the guest when it is issued again, not when it was submitted.
    WriteNotCaptured,
    /// Outstanding writes are not issued again at go-live.
    ForgetReissue,
    /// Virtual time jumps to the host's clock at go-live.
    TimeJumps,
    /// Inputs that arrived at one exit are applied in another order on replay.
    InputsReordered,
}

impl Canary {
    /// Every canary.
    pub const ALL: [Self; 29] = [
        Self::ReleaseBeforeAck,
        Self::ReleaseOutOfOrder,
        Self::AcksOutliveTheirSession,
        Self::SkipTestAndSet,
        Self::UnreachableIsWon,
        Self::ExistsIsLost,
        Self::RecordPruned,
        Self::LinkBeforeSync,
        Self::EligibleBeforeHold,
        Self::ConfirmBeforeComplete,
        Self::QuarantineSkipped,
        Self::FoldBeforeGone,
        Self::SideWithHoles,
        Self::GivesUpUnasked,
        Self::ColdStartOnOpenRecord,
        Self::ResumeAfterDraining,
        Self::DivergedCompetes,
        Self::LagUnlimited,
        Self::AckBeforePublish,
        Self::AckAfterClose,
        Self::AcceptOldEpoch,
        Self::AckForDeadVmm,
        Self::RunPastHorizon,
        Self::PartialDelta,
        Self::AbaPage,
        Self::WriteNotCaptured,
        Self::ForgetReissue,
        Self::TimeJumps,
        Self::InputsReordered,
    ];

    /// Its name on a command line: `release-before-ack`.
    #[must_use]
    pub fn name(self) -> String {
        let mut name = String::new();
        for letter in format!("{self:?}").chars() {
            if letter.is_ascii_uppercase() && !name.is_empty() {
                name.push('-');
            }
            name.push(letter.to_ascii_lowercase());
        }
        name
    }
}

#[cfg(feature = "canaries")]
mod switch {
    use std::cell::Cell;

    use super::Canary;

    thread_local! {
        static ON: Cell<Option<Canary>> = const { Cell::new(None) };
    }

    /// Switches one canary on in this thread, or all off.
    pub fn set(canary: Option<Canary>) {
        ON.set(canary);
    }

    /// Whether `canary` is on in this thread.
    #[must_use]
    pub fn on(canary: Canary) -> bool {
        ON.get() == Some(canary)
    }
}

#[cfg(not(feature = "canaries"))]
mod switch {
    use super::Canary;

    /// Whether `canary` is on: never, in a build without them.
    #[must_use]
    #[inline(always)]
    pub const fn on(_: Canary) -> bool {
        false
    }
}

pub use switch::*;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_kebab_case() {
        assert_eq!(Canary::ReleaseBeforeAck.name(), "release-before-ack");
    }
}
