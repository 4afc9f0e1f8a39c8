//! Patches as values, and the plan that they make.
//!
//! What always holds of a [`PatchPlan`]: its patches are sorted by address, do not overlap, old and
//! new bytes are of one length, and the old bytes are those of the image that the plan was made for.
//! The plan's id is a hash of that image and all patches: two VMs with the same id run the same code.

use std::fmt;

use sha2::{Digest, Sha256};

use crate::plan::PlanReport;

/// Which need a patch serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PatchSet {
    /// Without it a replay would not be identical. Always applied.
    Determinism,
    /// Goes round a defect of the host's KVM that a probe found.
    HostQuirks,
    /// Shortens the start where KVM emulates ring 0.
    FastBoot,
}

/// One replacement of bytes in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patch {
    /// Virtual address of the first byte.
    pub addr: u64,
    /// What has to be there.
    pub old: Box<[u8]>,
    /// What is put there; as long as `old`.
    pub new: Box<[u8]>,
    /// The set it belongs to.
    pub set: PatchSet,
    /// The reason, for a person.
    pub why: &'static str,
}

impl Patch {
    /// Virtual address behind the last byte.
    pub fn end(&self) -> u64 {
        self.addr + self.old.len() as u64
    }
}

/// Identifies a kernel with its patches (SHA-256). Part of the VM's fingerprint.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PlanId(pub [u8; 32]);

impl fmt::Display for PlanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for PlanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PlanId({self})")
    }
}

/// All patches for one image.
pub struct PatchPlan {
    kernel_hash: [u8; 32],
    id: PlanId,
    patches: Vec<Patch>,
    report: PlanReport,
}

impl PatchPlan {
    /// `patches` are sorted and do not overlap: the planner keeps them so.
    pub(crate) fn new(kernel_hash: [u8; 32], patches: Vec<Patch>, report: PlanReport) -> Self {
        let ordered = patches.windows(2).all(|pair| pair[0].end() <= pair[1].addr);
        assert!(ordered, "patches are sorted and do not overlap");
        let id = plan_id(&kernel_hash, &patches);
        PatchPlan {
            kernel_hash,
            id,
            patches,
            report,
        }
    }

    /// The id of kernel and patches.
    pub fn id(&self) -> PlanId {
        self.id
    }

    /// SHA-256 of the kernel file that the plan was made for.
    pub fn kernel_hash(&self) -> [u8; 32] {
        self.kernel_hash
    }

    /// All patches, by address.
    pub fn patches(&self) -> &[Patch] {
        &self.patches
    }

    /// What was found while planning.
    pub fn report(&self) -> &PlanReport {
        &self.report
    }
}

impl fmt::Debug for PatchPlan {
    /// Without the patches: there are a hundred thousand.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PatchPlan")
            .field("id", &self.id)
            .field("patches", &self.patches.len())
            .finish_non_exhaustive()
    }
}

fn plan_id(kernel_hash: &[u8; 32], patches: &[Patch]) -> PlanId {
    let mut hash = Sha256::new();
    hash.update(b"pollux patch plan 1\0");
    hash.update(kernel_hash);
    for patch in patches {
        hash.update(patch.addr.to_le_bytes());
        hash.update((patch.old.len() as u64).to_le_bytes());
        hash.update(&patch.old);
        hash.update(&patch.new);
    }
    PlanId(hash.finalize().into())
}
