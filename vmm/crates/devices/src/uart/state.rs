//! Saved state of the UART.

use serde::{Deserialize, Serialize};

/// Registers and FIFO.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are the registers'")]
pub struct UartState {
    pub ier: u8,
    pub fcr: u8,
    pub lcr: u8,
    pub mcr: u8,
    pub scratch: u8,
    /// Low and high byte.
    pub divisor: [u8; 2],
    /// IIR has not yet told that the transmitter is empty.
    pub tx_empty_pending: bool,
    pub overrun: bool,
    /// Bits 0 to 3 of MSR.
    pub modem_changes: u8,
    /// Bytes received and not read, oldest first; 16 at most.
    pub rx: Vec<u8>,
}
