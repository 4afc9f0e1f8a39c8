//! The state at the end of a recording, as hashes: what a replay must come to.

use hypervisor::{Vcpu, Vm};
use replay::{Machine, MachineError};
use serde::{Deserialize, Serialize};

/// Hashes of everything that a guest can see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndState {
    /// All guest memory.
    pub memory: u64,
    /// General, segment and control registers.
    pub registers: u64,
    /// x87 and SSE registers.
    pub fpu: u64,
    /// The devices.
    pub board: u64,
}

impl EndState {
    /// Hashes a machine at rest ([`Machine::come_to_rest`]).
    ///
    /// # Errors
    /// The hypervisor refuses.
    pub fn of<V: Vm, C: Vcpu>(machine: &mut Machine<V, C>) -> Result<Self, MachineError> {
        let exit = machine.exit();
        let refused = |source| MachineError::Hypervisor { exit, source };
        let vcpu = machine.vcpu_mut().save().map_err(refused)?;
        let memory = machine
            .memory()
            .digest()
            .map_err(|source| refused(hypervisor::Error::Ram(source)))?;
        let board =
            postcard::to_stdvec(&machine.board().save()).expect("a board's state always encodes");
        Ok(Self {
            memory,
            registers: vcpu.digest(),
            fpu: vcpu.fpu_digest(),
            board: hypervisor::digest::bytes(&board),
        })
    }

    /// Names of the parts with their hashes.
    #[must_use]
    pub fn parts(&self) -> [(&'static str, u64); 4] {
        [
            ("memory", self.memory),
            ("registers", self.registers),
            ("FPU", self.fpu),
            ("board", self.board),
        ]
    }
}
