//! Applies a plan: from an image and its patches to the bytes that go into guest memory.
//!
//! What always holds: every patch's old bytes were there, or there is an error and no kernel.

use crate::error::PlanError;
use crate::image::{KernelImage, Segment};
use crate::patch::{PatchPlan, PlanId};

/// A part of a loaded kernel.
#[derive(Debug)]
pub struct LoadedSegment {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// The bytes to write there.
    pub bytes: Vec<u8>,
    /// Length in memory; what is behind `bytes` has to be zero.
    pub mem_size: u64,
}

/// A kernel that is ready to be written to guest memory.
#[derive(Debug)]
pub struct LoadedKernel {
    /// Guest-physical address of the 64-bit entry point.
    pub entry: u64,
    /// The parts, by address; they do not overlap.
    pub segments: Vec<LoadedSegment>,
    /// The id of the plan that was applied.
    pub plan: PlanId,
    /// The bzImage's setup header (from offset 0x1f1), if there was one.
    pub setup_header: Option<Vec<u8>>,
}

impl LoadedKernel {
    /// First guest-physical address behind the kernel.
    pub fn end(&self) -> u64 {
        self.segments
            .iter()
            .map(|segment| segment.gpa + segment.mem_size)
            .max()
            .unwrap_or(0)
    }
}

impl KernelImage {
    /// Applies `plan` and returns what has to be in guest memory.
    ///
    /// # Errors
    /// [`PlanError::OtherImage`] if the plan is for another kernel, [`PlanError::OldBytes`] if a
    /// patch does not fit.
    pub fn load(&self, plan: &PatchPlan) -> Result<LoadedKernel, PlanError> {
        if plan.kernel_hash() != self.hash() {
            return Err(PlanError::OtherImage);
        }
        let mut segments = self.segments().to_vec();
        for patch in plan.patches() {
            let place = place(&mut segments, patch.addr, patch.old.len());
            let found = place.as_deref().unwrap_or_default().to_vec();
            match place {
                Some(bytes) if *bytes == *patch.old => bytes.copy_from_slice(&patch.new),
                _ => {
                    return Err(PlanError::OldBytes {
                        set: patch.set,
                        symbol: self.symbols().describe(patch.addr),
                        addr: patch.addr,
                        expected: patch.old.to_vec(),
                        found,
                        why: patch.why,
                    });
                }
            }
        }
        Ok(LoadedKernel {
            entry: self.entry(),
            segments: segments
                .into_iter()
                .map(|s| LoadedSegment {
                    gpa: s.paddr,
                    bytes: s.data,
                    mem_size: s.mem_size,
                })
                .collect(),
            plan: plan.id(),
            setup_header: self.setup_header().map(<[u8]>::to_vec),
        })
    }
}

fn place(segments: &mut [Segment], addr: u64, len: usize) -> Option<&mut [u8]> {
    segments.iter_mut().find_map(|segment| {
        let offset = usize::try_from(addr.checked_sub(segment.vaddr)?).ok()?;
        segment.data.get_mut(offset..offset.checked_add(len)?)
    })
}
