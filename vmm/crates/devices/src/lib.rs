//! The machine's devices as pure functions of execution point and logged inputs.
//!
//! [`Board`] is the whole machine beside CPU and RAM: interrupt controllers, timer, UART, clock, reset, and virtio
//! network, disk and entropy on PCI. Accesses of the guest and [`Input`]s go in; answers, interrupts and [`Effect`]s
//! come out. Nothing here does I/O, reads a clock, starts a thread or draws a random number, so a replica that is given
//! the same accesses and inputs in the same order is the same machine. Guest memory is touched within these calls only.
//!
//! What the guest sees is in `docs/devices.md`.

mod board;
mod cmos;
mod config;
mod effect;
mod outbox;
mod pci;
mod pic;
mod pit;
pub mod state;
mod time;
mod uart;
mod virtio;

pub use board::{Board, BoardCounters, BusAddress};
pub use config::{
    BoardConfig, ConfigError, DISK_IDENTITY_BYTES, DISK_SECTORS_MAX, DiskCache, DiskConfig,
    NetConfig,
};
pub use effect::{DiskStatus, Effect, Input, NetOffloads, Rejected, RequestId, SECTOR_BYTES};
pub use outbox::{DeviceFault, EFFECTS_MAX, FAULTS_MAX};
pub use state::{BOARD_STATE_SCHEMA, BoardState, StateError};
pub use time::VirtualTime;
