//! Saved state of clock and CMOS memory.

use serde::{Deserialize, Serialize};

/// Clock and memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CmosState {
    /// Unix time at virtual time 0 by the guest's setting, seconds.
    pub base_s: i64,
    /// Register selected by port 0x70.
    pub index: u8,
    /// What the registers show while the guest has stopped the clock (register B, SET).
    pub stopped: Option<DateTimeState>,
    /// All 128 bytes; those of the running clock are not used.
    pub memory: Vec<u8>,
}

/// Clock registers in binary, 24 hours, as written: they need not make a date.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct DateTimeState {
    pub year: u16,
    pub month: u8,
    pub day: u8,
    pub hour: u8,
    pub minute: u8,
    pub second: u8,
}
