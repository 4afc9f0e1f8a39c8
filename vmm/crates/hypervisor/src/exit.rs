//! What a vCPU stops at.
//!
//! An [`Exit`] is a synchronous stop: the guest reaches it at the same instruction in every
//! execution with the same inputs, so exits can be counted and compared. The bytes of a port or
//! MMIO access are not part of it; [`crate::Vcpu::access_data`] holds them.

use serde::{Deserialize, Serialize};

/// One synchronous exit of the vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Exit {
    /// The guest reads `count` items of `size` bytes from a port and waits for the bytes.
    PortIn {
        /// Port number.
        port: u16,
        /// Bytes of one item: 1, 2 or 4.
        size: u8,
        /// Items; more than one for string instructions.
        count: u32,
    },
    /// The guest has written `count` items of `size` bytes to a port.
    PortOut {
        /// Port number.
        port: u16,
        /// Bytes of one item: 1, 2 or 4.
        size: u8,
        /// Items; more than one for string instructions.
        count: u32,
    },
    /// The guest reads `len` bytes outside its RAM and waits for them.
    MmioRead {
        /// Guest physical address.
        addr: u64,
        /// Bytes, at most 8: a wider access comes as several exits.
        len: u8,
    },
    /// The guest has written `len` bytes outside its RAM.
    MmioWrite {
        /// Guest physical address.
        addr: u64,
        /// Bytes, at most 8.
        len: u8,
    },
    /// HLT. RIP is behind the instruction.
    Halt,
    /// The guest can take an interrupt now, as asked for by the interrupt window.
    InterruptWindow,
    /// Triple fault.
    Shutdown,
    /// KVM's instruction emulator met an instruction of ring 0 that it does not know; RIP is at
    /// the instruction. [`crate::Vcpu::skip_unemulated`] knows some of them.
    EmulationFailed,
    /// KVM reports an event of its own (`KVM_SYSTEM_EVENT_*`).
    SystemEvent(u32),
    /// Any other `KVM_EXIT_*` reason.
    Unknown(u32),
}

impl Exit {
    /// Whether the guest waits for bytes in [`crate::Vcpu::access_data`].
    #[must_use]
    pub fn wants_data(self) -> bool {
        matches!(self, Self::PortIn { .. } | Self::MmioRead { .. })
    }

    /// Bytes in [`crate::Vcpu::access_data`]; 0 for exits that are no access.
    #[must_use]
    pub fn access_len(self) -> usize {
        match self {
            Self::PortIn { size, count, .. } | Self::PortOut { size, count, .. } => {
                size as usize * count as usize
            }
            Self::MmioRead { len, .. } | Self::MmioWrite { len, .. } => len as usize,
            _ => 0,
        }
    }
}

/// Why the vCPU has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// At a synchronous exit, which has a number.
    Exit(Exit),
    /// Between two exits, because it was kicked (or asked to settle): no number.
    Kicked,
}
