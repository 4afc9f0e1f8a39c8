//! The saved state of a board: plain data, apart from the runtime types, complete.
//!
//! A board restored from it answers every access and input as the saved one would have. The schema number changes
//! with any change of meaning or layout; a state of another schema is refused.

use serde::{Deserialize, Serialize};

pub use crate::cmos::{CmosState, DateTimeState};
use crate::config::{BoardConfig, ConfigError};
pub use crate::pci::{FunctionState, PciState, VirtioPciState};
pub use crate::pic::{ChipState, InitStepState, PicState};
pub use crate::pit::{AccessState, ChannelState, CountingState, PitState};
use crate::time::VirtualTime;
pub use crate::uart::UartState;
pub use crate::virtio::{
    BlkState, DeferredState, DiskRequestState, EntropyRequestState, NetState, OutstandingDiskState,
    QueueState, RngState, SegmentState, TransportState,
};

/// Schema of [`BoardState`].
pub const BOARD_STATE_SCHEMA: u32 = 1;

/// A whole board.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoardState {
    /// [`BOARD_STATE_SCHEMA`].
    pub schema: u32,
    /// What the board is made of.
    pub config: BoardConfig,
    /// Virtual time.
    pub now: VirtualTime,
    /// The number that the next request gets.
    pub next_request_id: u64,
    /// Interrupt controllers.
    pub pic: PicState,
    /// Timer and port 0x61.
    pub pit: PitState,
    /// Console UART.
    pub uart: UartState,
    /// Clock and CMOS memory.
    pub cmos: CmosState,
    /// PCI and the virtio devices on it.
    pub pci: PciState,
}

/// A saved state that no board can have had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// It was written by a version with another schema.
    #[error("board state has schema {0}, this version knows {BOARD_STATE_SCHEMA}")]
    Schema(u32),
    /// The configuration in it makes no board.
    #[error("board state has an impossible configuration")]
    Config(#[from] ConfigError),
    /// A value is outside its range or contradicts another.
    #[error("board state of device {device} has an impossible {field}")]
    Invalid {
        /// The device.
        device: &'static str,
        /// The value or values.
        field: &'static str,
    },
    /// The virtio devices are not those of the configuration.
    #[error("board state and its configuration disagree about which virtio devices there are")]
    Devices,
}
