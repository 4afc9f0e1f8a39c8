//! A 16550A UART at 0x3f8 with IRQ 4 (TI TL16C550C data sheet): the guest's console.
//!
//! What is transmitted leaves at once, so the transmitter is always empty. Input comes 16 bytes at a time at most: the
//! host asks for the room and keeps the rest, so there is no overrun. The receive time-out is immediate: bytes below the
//! trigger level interrupt as a time-out does. Line settings are kept and have no effect; the modem lines are those of a
//! connected terminal.

mod state;

use std::collections::VecDeque;

pub use state::UartState;

use crate::StateError;

/// Receive FIFO of the 16550A, bytes.
pub(crate) const RX_FIFO_BYTES: usize = 16;

const IER_RX: u8 = 0x01;
const IER_TX_EMPTY: u8 = 0x02;
const IER_LINE: u8 = 0x04;
const IER_MODEM: u8 = 0x08;

const IIR_NONE: u8 = 0x01;
const IIR_MODEM: u8 = 0x00;
const IIR_TX_EMPTY: u8 = 0x02;
const IIR_RX: u8 = 0x04;
const IIR_LINE: u8 = 0x06;
const IIR_RX_TIMEOUT: u8 = 0x0c;
const IIR_FIFO: u8 = 0xc0;

const FCR_ENABLE: u8 = 0x01;
const FCR_CLEAR_RX: u8 = 0x02;

const LCR_DLAB: u8 = 0x80;
const MCR_LOOP: u8 = 0x10;

const LSR_DATA_READY: u8 = 0x01;
const LSR_OVERRUN: u8 = 0x02;
const LSR_TX_EMPTY: u8 = 0x60;

/// CTS, DSR and DCD: a terminal is there.
const MSR_CONNECTED: u8 = 0xb0;

/// The UART.
#[derive(Debug, Default)]
pub(crate) struct Uart {
    ier: u8,
    /// FCR bit 0 and the trigger level, bits 6 and 7.
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    divisor: [u8; 2],
    /// The transmitter became empty and IIR has not told yet.
    tx_empty_pending: bool,
    /// In loopback the guest can overrun its own receiver.
    overrun: bool,
    /// Bits 0 to 3 of MSR: modem lines that changed since it was read.
    modem_changes: u8,
    rx: VecDeque<u8>,
}

impl Uart {
    pub(crate) fn new() -> Uart {
        Uart {
            divisor: [1, 0],
            rx: VecDeque::with_capacity(RX_FIFO_BYTES),
            ..Uart::default()
        }
    }

    /// The interrupt output.
    pub(crate) fn line(&self) -> bool {
        self.interrupt_cause() != IIR_NONE
    }

    /// Bytes that can be received now.
    pub(crate) fn rx_room(&self) -> usize {
        // Outside bytes do not reach the receiver in loopback.
        if self.mcr & MCR_LOOP != 0 {
            0
        } else {
            self.fifo_bytes() - self.rx.len().min(self.fifo_bytes())
        }
    }

    /// Receives `bytes`, no more than [`Uart::rx_room`].
    pub(crate) fn receive(&mut self, bytes: &[u8]) {
        assert!(bytes.len() <= self.rx_room(), "the caller checks the room");
        self.rx.extend(bytes);
    }

    fn fifo_bytes(&self) -> usize {
        if self.fcr & FCR_ENABLE != 0 {
            RX_FIFO_BYTES
        } else {
            1
        }
    }

    fn rx_trigger(&self) -> usize {
        if self.fcr & FCR_ENABLE == 0 {
            1
        } else {
            [1, 4, 8, 14][usize::from(self.fcr >> 6)]
        }
    }

    /// The interrupt with the highest priority, as in IIR.
    fn interrupt_cause(&self) -> u8 {
        if self.ier & IER_LINE != 0 && self.overrun {
            IIR_LINE
        } else if self.ier & IER_RX != 0 && self.rx.len() >= self.rx_trigger() {
            IIR_RX
        } else if self.ier & IER_RX != 0 && !self.rx.is_empty() {
            IIR_RX_TIMEOUT
        } else if self.ier & IER_TX_EMPTY != 0 && self.tx_empty_pending {
            IIR_TX_EMPTY
        } else if self.ier & IER_MODEM != 0 && self.modem_changes != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }

    fn divisor_latched(&self) -> bool {
        self.lcr & LCR_DLAB != 0
    }

    /// Reads register `offset` (0 to 7).
    pub(crate) fn read(&mut self, offset: u16) -> u8 {
        match offset {
            0 | 1 if self.divisor_latched() => self.divisor[usize::from(offset)],
            0 => self.rx.pop_front().unwrap_or(0),
            1 => self.ier,
            2 => self.read_iir(),
            3 => self.lcr,
            4 => self.mcr,
            5 => self.read_lsr(),
            6 => {
                let value = self.modem_lines() | self.modem_changes;
                self.modem_changes = 0;
                value
            }
            _ => self.scratch,
        }
    }

    fn read_iir(&mut self) -> u8 {
        let cause = self.interrupt_cause();
        if cause == IIR_TX_EMPTY {
            self.tx_empty_pending = false;
        }
        cause
            | if self.fcr & FCR_ENABLE != 0 {
                IIR_FIFO
            } else {
                0
            }
    }

    fn read_lsr(&mut self) -> u8 {
        let ready = if self.rx.is_empty() {
            0
        } else {
            LSR_DATA_READY
        };
        let overrun = if self.overrun { LSR_OVERRUN } else { 0 };
        self.overrun = false;
        LSR_TX_EMPTY | ready | overrun
    }

    /// Bits 4 to 7 of MSR.
    fn modem_lines(&self) -> u8 {
        if self.mcr & MCR_LOOP == 0 {
            return MSR_CONNECTED;
        }
        // RTS to CTS, DTR to DSR, OUT1 to RI, OUT2 to DCD.
        let m = self.mcr;
        (m & 0x02) << 3 | (m & 0x01) << 5 | (m & 0x04) << 4 | (m & 0x08) << 4
    }

    /// Writes register `offset` (0 to 7); a byte returned is one transmitted to the outside.
    pub(crate) fn write(&mut self, offset: u16, value: u8) -> Option<u8> {
        match offset {
            0 | 1 if self.divisor_latched() => self.divisor[usize::from(offset)] = value,
            0 => return self.transmit(value),
            1 => {
                // Enabling the interrupt of an empty transmitter raises it.
                if value & IER_TX_EMPTY != 0 && self.ier & IER_TX_EMPTY == 0 {
                    self.tx_empty_pending = true;
                }
                self.ier = value & 0x0f;
            }
            2 => self.write_fcr(value),
            3 => self.lcr = value,
            4 => self.write_mcr(value & 0x1f),
            7 => self.scratch = value,
            _ => {}
        }
        None
    }

    fn transmit(&mut self, value: u8) -> Option<u8> {
        self.tx_empty_pending = true;
        if self.mcr & MCR_LOOP == 0 {
            return Some(value);
        }
        if self.rx.len() < self.fifo_bytes() {
            self.rx.push_back(value);
        } else {
            self.overrun = true;
        }
        None
    }

    fn write_fcr(&mut self, value: u8) {
        // Changing bit 0 clears the FIFOs, too.
        if value & FCR_CLEAR_RX != 0 || (value ^ self.fcr) & FCR_ENABLE != 0 {
            self.rx.clear();
        }
        self.fcr = if value & FCR_ENABLE != 0 {
            value & 0xc1
        } else {
            0
        };
    }

    fn write_mcr(&mut self, value: u8) {
        let before = self.modem_lines();
        self.mcr = value;
        let after = self.modem_lines();
        // RI (bit 6) tells its trailing edge only.
        let changed = (before ^ after) & 0xb0 | (before & !after) & 0x40;
        self.modem_changes |= changed >> 4;
    }

    pub(crate) fn save(&self) -> UartState {
        UartState {
            ier: self.ier,
            fcr: self.fcr,
            lcr: self.lcr,
            mcr: self.mcr,
            scratch: self.scratch,
            divisor: self.divisor,
            tx_empty_pending: self.tx_empty_pending,
            overrun: self.overrun,
            modem_changes: self.modem_changes,
            rx: self.rx.iter().copied().collect(),
        }
    }

    pub(crate) fn restore(state: &UartState) -> Result<Uart, StateError> {
        if state.rx.len() > RX_FIFO_BYTES {
            return Err(StateError::Invalid {
                device: "uart",
                field: "rx",
            });
        }
        let mut uart = Uart {
            ier: state.ier,
            fcr: state.fcr,
            lcr: state.lcr,
            mcr: state.mcr,
            scratch: state.scratch,
            divisor: state.divisor,
            tx_empty_pending: state.tx_empty_pending,
            overrun: state.overrun,
            modem_changes: state.modem_changes,
            ..Uart::new()
        };
        uart.rx.extend(&state.rx);
        Ok(uart)
    }
}

#[cfg(test)]
mod tests;
