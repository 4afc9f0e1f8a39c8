//! Deltas: how a point without a number gets from one machine to another.
//!
//! A delta holds the vCPU's whole state and every page that the guest, or a device on its behalf, may
//! have written since the dirty log was last cleared. Device state is not in it: it follows from the
//! same inputs on both sides. Pages may be more than those that differ, never fewer.

use hypervisor::{Gfn, PAGE_SIZE, Vcpu, VcpuState, Vm};
use thiserror::Error;

use crate::Machine;
use crate::machine::{MachineError, Stage};

/// The version of a delta's encoding.
const DELTA_VERSION: u8 = 1;

/// A delta that cannot be applied.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub(crate) enum DeltaError {
    /// The bytes are no delta of this version.
    #[error("the delta does not decode: {0}")]
    Bad(&'static str),
    /// A page outside guest memory.
    #[error("the delta has page {0:#x}, which is outside guest memory")]
    Page(u64),
}

impl<V: Vm, C: Vcpu> Machine<V, C> {
    /// At a kicked stop where an interrupt can be taken: writes the delta since the last clearing of
    /// the dirty log to `out` and opens the point for inputs.
    ///
    /// # Errors
    /// The hypervisor refuses.
    pub fn take_delta(&mut self, out: &mut Vec<u8>) -> Result<u64, MachineError> {
        assert_eq!(self.stage, Stage::Left, "a delta is taken between exits");
        let exit = self.exit;
        let refused = |source| MachineError::Hypervisor { exit, source };
        let state = self.vcpu.save().map_err(refused)?;
        let mut dirty = self.vm.dirty_log().map_err(refused)?;
        dirty.merge(&self.vm.memory().take_vmm_dirty());
        out.clear();
        out.push(DELTA_VERSION);
        let encoded = postcard::to_stdvec(&state).expect("a vCPU's state always encodes");
        out.extend_from_slice(&(encoded.len() as u32).to_le_bytes());
        out.extend_from_slice(&encoded);
        let mut pages = 0;
        let mut page = [0; PAGE_SIZE];
        for gfn in dirty.iter() {
            self.vm
                .memory()
                .read_page(gfn, &mut page)
                .map_err(|source| MachineError::Hypervisor {
                    exit,
                    source: hypervisor::Error::Ram(source),
                })?;
            out.extend_from_slice(&gfn.0.to_le_bytes());
            out.extend_from_slice(&page);
            pages += 1;
        }
        self.stage = Stage::Between;
        Ok(pages)
    }

    /// Opens a kicked stop for inputs without a delta: for a machine that nobody follows.
    pub fn open_between(&mut self) {
        assert_eq!(self.stage, Stage::Left, "a point between exits");
        self.stage = Stage::Between;
    }

    /// Clears the dirty log at a numbered exit: the next delta goes on from here, and is small.
    ///
    /// # Errors
    /// The hypervisor refuses, or the log is off.
    pub fn clear_dirty_log(&mut self) -> Result<(), MachineError> {
        let exit = self.exit;
        let _ = self.vm.memory().take_vmm_dirty();
        self.vm
            .dirty_log()
            .map_err(|source| MachineError::Hypervisor { exit, source })?;
        Ok(())
    }

    /// On a replica that has left exit n: goes to the point without number that `bytes` describe.
    ///
    /// # Errors
    /// `Ok(Err)` where the bytes are bad, `Err` where the hypervisor refuses; the machine cannot go on
    /// after either, but nothing was changed where the bytes do not decode.
    pub(crate) fn apply_delta(
        &mut self,
        bytes: &[u8],
    ) -> Result<Result<(), DeltaError>, MachineError> {
        assert_eq!(self.stage, Stage::Left, "a delta is applied between exits");
        let (state, pages) = match decode(bytes) {
            Ok(parts) => parts,
            Err(error) => return Ok(Err(error)),
        };
        let exit = self.exit;
        let refused = |source| MachineError::Hypervisor { exit, source };
        if !self.settle()? {
            // The access of the exit comes in several parts; a primary in the same place has had the
            // same, as exits with numbers. So the log does not fit this machine.
            return Ok(Err(DeltaError::Bad(
                "it follows an exit that is not complete here",
            )));
        }
        let (mut written, mut old) = (Vec::new(), [0; PAGE_SIZE]);
        for record in pages.chunks_exact(8 + PAGE_SIZE) {
            let (gfn, page) = record.split_first_chunk::<8>().expect("chunks are longer");
            let gfn = Gfn(u64::from_le_bytes(*gfn));
            let page = page.first_chunk().expect("a record ends with a whole page");
            let ram = self.vm.memory();
            if ram.read_page(gfn, &mut old).is_err() {
                return Ok(Err(DeltaError::Page(gfn.0)));
            }
            if old != *page {
                ram.write_page(gfn, page).expect("it has just been read");
                written.push(gfn);
            }
        }
        self.vcpu.notice_writes(&written).map_err(refused)?;
        self.vcpu.restore(&state).map_err(refused)?;
        // KVM_RUN refreshes what the host says about taking interrupts.
        if !self.settle()? {
            return Ok(Err(DeltaError::Bad("its vCPU state is not at rest")));
        }
        self.stage = Stage::Between;
        Ok(Ok(()))
    }
}

/// What a delta holds, in a few words.
pub(crate) fn summary(bytes: &[u8]) -> String {
    match decode(bytes) {
        Ok((state, pages)) => format!(
            "{} pages, RIP {:#x}, CPL {}, {} bytes",
            pages.len() / (8 + PAGE_SIZE),
            state.regs.rip,
            state.sregs.cs.dpl,
            bytes.len()
        ),
        Err(error) => error.to_string(),
    }
}

fn decode(bytes: &[u8]) -> Result<(VcpuState, &[u8]), DeltaError> {
    let Some((&DELTA_VERSION, rest)) = bytes.split_first() else {
        return Err(DeltaError::Bad("unknown version"));
    };
    let Some((len, rest)) = rest.split_first_chunk() else {
        return Err(DeltaError::Bad("too short"));
    };
    let len = u32::from_le_bytes(*len) as usize;
    let Some((state, pages)) = rest.split_at_checked(len) else {
        return Err(DeltaError::Bad("too short for its vCPU state"));
    };
    let state = postcard::from_bytes(state).map_err(|_| DeltaError::Bad("its vCPU state"))?;
    if pages.len() % (8 + PAGE_SIZE) != 0 {
        return Err(DeltaError::Bad("not whole pages"));
    }
    Ok((state, pages))
}
