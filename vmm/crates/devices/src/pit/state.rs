//! Saved state of the 8254.

use serde::{Deserialize, Serialize};

use crate::time::VirtualTime;

/// The timer and port 0x61.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitState {
    /// Channels 0 to 2.
    pub channels: [ChannelState; 3],
    /// Bits 0 to 3 of port 0x61 as written.
    pub port61: u8,
    /// Ticks of channel 0 at which IRQ 0 rises next.
    pub next_edge: Option<u64>,
    /// Interrupts raised so far.
    pub ticks: u64,
    /// Interrupts dropped because they fell due together with another.
    pub lost_ticks: u64,
}

/// One channel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelState {
    /// 0 to 5.
    pub mode: u8,
    /// Counts in decimal.
    pub bcd: bool,
    /// Which bytes of the count are read and written.
    pub access: AccessState,
    /// Level of the gate input.
    pub gate: bool,
    /// The count to start from, 1 to 65536.
    pub initial: u32,
    /// A count was written since the last control word.
    pub loaded: bool,
    /// Whether and since when it counts.
    pub counting: CountingState,
    /// Low byte written, high byte awaited.
    pub low_written: Option<u8>,
    /// The next read gives the high byte.
    pub read_high_next: bool,
    /// Count held by a latch command.
    pub latched_count: Option<u16>,
    /// Status held by a read-back command.
    pub latched_status: Option<u8>,
}

/// Bytes of the count that an access moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names say it")]
pub enum AccessState {
    Low,
    High,
    LowThenHigh,
}

/// Whether a channel counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CountingState {
    /// It stands after so many ticks.
    Halted {
        /// Ticks counted before it stopped.
        elapsed: u64,
    },
    /// It counts.
    Since {
        /// When it was last let go.
        start: VirtualTime,
        /// Ticks counted before that.
        elapsed: u64,
    },
}
