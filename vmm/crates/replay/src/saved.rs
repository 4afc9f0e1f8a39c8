//! A machine's saved state: one type for snapshot, state transfer and the start of a recording.
//!
//! It is taken with the machine at rest: at an exit that was left and whose access is complete, in
//! HLT, or at a delta. Guest memory goes beside it as runs of pages.

use std::io::{Read, Write};

use devices::{Board, BoardState};
use format::ExitNumber;
use hypervisor::{Gfn, GuestRam, PAGE_SIZE, Vcpu, VcpuState, Vm};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use transfer::{Item, Reader, Writer};

use crate::machine::{MachineConfig, MachineError, Stage};
use crate::{Digest, Machine};

/// The schema number of [`MachineState`].
pub const MACHINE_SCHEMA: u32 = 2;
const TAG: &str = "machine";

/// Why a machine cannot be saved or loaded.
#[derive(Debug, Error)]
pub enum SavedError {
    /// The stream.
    #[error(transparent)]
    Stream(#[from] transfer::Error),
    /// The hypervisor refuses.
    #[error("the hypervisor does not take the saved state: {0}")]
    Hypervisor(#[from] hypervisor::Error),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The board does not take its state.
    #[error("the board does not take its saved state: {0}")]
    Board(#[from] devices::StateError),
    /// The guest goes round none of these defects of this host.
    #[error(
        "the saved guest was started on a host without {}, and is not patched for one with: \
         start it anew here, or let it run on a host like its first", missing.join(", ")
    )]
    Host {
        /// The defects, by name.
        missing: Vec<String>,
    },
    /// The saved memory does not fit.
    #[error("saved page {0:#x} is outside the guest's memory")]
    Page(u64),
}

/// Everything of a machine but its memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineState {
    config: MachineConfig,
    exit: ExitNumber,
    digest: Digest,
    stage: Stage,
    ended: bool,
    vcpu: VcpuState,
    board: BoardState,
    memory_bytes: u64,
}

impl MachineState {
    /// What the machine knows of its guest kernel.
    #[must_use]
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// Bytes of guest memory that the machine has.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// The last exit.
    #[must_use]
    pub fn exit(&self) -> ExitNumber {
        self.exit
    }

    /// The vCPU's state.
    #[must_use]
    pub fn vcpu(&self) -> &VcpuState {
        &self.vcpu
    }

    /// The devices' state.
    #[must_use]
    pub fn board(&self) -> &BoardState {
        &self.board
    }
}

impl<V: Vm, C: Vcpu> Machine<V, C> {
    /// The state of the machine at rest. None where the access of its last exit led to another exit,
    /// which has to be handled first.
    ///
    /// # Errors
    /// The machine cannot go on, or the hypervisor refuses.
    pub fn save(&mut self) -> Result<Option<MachineState>, MachineError> {
        if !self.come_to_rest()? {
            return Ok(None);
        }
        let exit = self.exit;
        let vcpu = self
            .vcpu
            .save()
            .map_err(|source| MachineError::Hypervisor { exit, source })?;
        Ok(Some(MachineState {
            config: self.config.clone(),
            exit,
            digest: self.digest,
            stage: self.stage,
            ended: self.ended,
            vcpu,
            board: self.board.save(),
            memory_bytes: self.vm.memory().size_bytes(),
        }))
    }

    /// A machine in the saved state, over a VM and a vCPU that have not run, whose memory is loaded.
    ///
    /// # Errors
    /// The hypervisor does not take the state.
    pub fn from_state(vm: V, mut vcpu: C, state: MachineState) -> Result<Self, SavedError> {
        vcpu.restore(&state.vcpu)?;
        let board = Board::restore(state.board)?;
        let mut machine = Self::new(vm, vcpu, board, state.config);
        machine.exit = state.exit;
        machine.digest = state.digest;
        machine.stage = state.stage;
        machine.ended = state.ended;
        // KVM_RUN refreshes what the host says about taking interrupts.
        let exit = machine.exit;
        machine
            .vcpu
            .settle()
            .map_err(|source| MachineError::Run { exit, source })?;
        Ok(machine)
    }
}

/// Writes state and memory. `memory` may be read in another process that was forked where the state
/// was taken.
///
/// # Errors
/// The stream failed.
pub fn save_machine<W: Write>(
    writer: &mut Writer<W>,
    state: &MachineState,
    memory: &GuestRam,
) -> Result<(), SavedError> {
    writer.section(TAG, MACHINE_SCHEMA, state)?;
    let mut page = [0; PAGE_SIZE];
    let touched = memory.touched_pages().map_err(hypervisor::Error::Ram)?;
    for gfn in touched.iter() {
        memory
            .read_page(gfn, &mut page)
            .map_err(hypervisor::Error::Ram)?;
        writer.page(gfn.0, &page)?;
    }
    Ok(())
}

/// Reads a stream that [`save_machine`] wrote: `make` builds the VM over its memory once that is loaded, if
/// the host can run such a machine; sections of others go to `other`.
///
/// # Errors
/// The stream is bad or has no machine, or the hypervisor does not take it.
pub fn load_machine<R: Read, V: Vm, C: Vcpu, E: From<SavedError>>(
    reader: &mut Reader<R>,
    mut other: impl FnMut(&transfer::Section<'_>) -> Result<(), E>,
    make: impl FnOnce(&MachineConfig, GuestRam) -> Result<(V, C), E>,
) -> Result<Machine<V, C>, E> {
    let mut loaded: Option<(GuestRam, MachineState)> = None;
    let stream = |error: transfer::Error| E::from(SavedError::from(error));
    while let Some(item) = reader.next_item().map_err(stream)? {
        match item {
            Item::Section(section) if section.tag == TAG => {
                let state: MachineState = section.decode(MACHINE_SCHEMA).map_err(stream)?;
                if loaded.is_some() {
                    return Err(stream(transfer::Error::Damaged(
                        "two machines in one stream",
                    )));
                }
                let ram = GuestRam::new(state.memory_bytes())
                    .map_err(hypervisor::Error::Ram)
                    .map_err(SavedError::from)?;
                loaded = Some((ram, state));
            }
            Item::Section(section) => other(&section)?,
            Item::Pages { first, bytes } => {
                let Some((ram, _)) = &loaded else {
                    return Err(stream(transfer::Error::Damaged(
                        "memory before its machine",
                    )));
                };
                load_pages(ram, first, bytes)?;
            }
        }
    }
    let (ram, state) = loaded.ok_or_else(|| stream(transfer::Error::Missing(TAG.to_owned())))?;
    let (vm, vcpu) = make(&state.config, ram)?;
    Ok(Machine::from_state(vm, vcpu, state)?)
}

fn load_pages(ram: &GuestRam, first: u64, bytes: &[u8]) -> Result<(), SavedError> {
    for (index, page) in bytes.chunks_exact(PAGE_SIZE).enumerate() {
        let gfn = Gfn(first.wrapping_add(index as u64));
        let page = page.first_chunk().expect("chunks are whole pages");
        ram.write_page(gfn, page)
            .map_err(|_| SavedError::Page(gfn.0))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
