//! The configuration space of one PCI function (PCI Local Bus 3.0, chapter 6): header type 0, one 32-bit memory BAR at
//! most, a capability list of fixed content.
//!
//! Of the registers only command, BAR 0 and interrupt line can be written here; what a capability lets write is its
//! owner's affair.

use serde::{Deserialize, Serialize};

/// Offset of the first capability.
pub(crate) const CAPABILITIES_AT: usize = 0x40;

const COMMAND_MEMORY: u16 = 0x0002;
const COMMAND_MASTER: u16 = 0x0004;
const COMMAND_INTX_DISABLE: u16 = 0x0400;
const COMMAND_WRITABLE: u16 = COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_DISABLE;
const STATUS_INTERRUPT: u16 = 0x0008;
const STATUS_CAPABILITIES: u16 = 0x0010;
const INTERRUPT_PIN_A: u8 = 1;

/// What never changes about a function.
#[derive(Debug)]
pub(crate) struct Identity {
    pub(crate) vendor: u16,
    pub(crate) device: u16,
    pub(crate) subsystem_vendor: u16,
    pub(crate) subsystem: u16,
    pub(crate) revision: u8,
    /// Class, subclass, programming interface.
    pub(crate) class: u32,
    /// Bytes of BAR 0, a power of two of at least 16; 0 when there is none.
    pub(crate) bar_bytes: u32,
    /// The capabilities from [`CAPABILITIES_AT`] on.
    pub(crate) capabilities: Vec<u8>,
}

/// One function.
#[derive(Debug)]
pub(crate) struct Function {
    identity: Identity,
    command: u16,
    bar: u32,
    interrupt_line: u8,
}

/// Saved state of a function's registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are the registers'")]
pub struct FunctionState {
    pub command: u16,
    /// Base address register 0.
    pub bar: u32,
    pub interrupt_line: u8,
}

impl Function {
    /// A function as firmware leaves it: BAR placed and decoded, interrupt routed to IRQ `interrupt_line`.
    pub(crate) fn new(identity: Identity, bar: u32, interrupt_line: u8) -> Function {
        let command = if identity.bar_bytes > 0 {
            COMMAND_MEMORY
        } else {
            0
        };
        Function {
            identity,
            command,
            bar,
            interrupt_line,
        }
    }

    /// Offset of a physical address in BAR 0, if it is decoded there.
    pub(crate) fn bar_offset(&self, addr: u64) -> Option<u64> {
        let offset = addr.checked_sub(u64::from(self.bar))?;
        let decoded = self.command & COMMAND_MEMORY != 0;
        (decoded && offset < u64::from(self.identity.bar_bytes)).then_some(offset)
    }

    /// Whether an asserted interrupt shows on the line.
    pub(crate) fn intx_enabled(&self) -> bool {
        self.command & COMMAND_INTX_DISABLE == 0
    }

    /// Reads a byte of the space.
    pub(crate) fn read(&self, offset: usize, interrupt: bool) -> u8 {
        let id = &self.identity;
        let byte = |value: u32, first: usize| value.to_le_bytes()[offset - first];
        match offset {
            0x00..=0x03 => byte(u32::from(id.vendor) | u32::from(id.device) << 16, 0x00),
            0x04..=0x07 => {
                let status = u32::from(self.status(interrupt));
                byte(u32::from(self.command) | status << 16, 0x04)
            }
            0x08..=0x0b => byte(u32::from(id.revision) | id.class << 8, 0x08),
            0x10..=0x13 => byte(self.bar, 0x10),
            0x2c..=0x2f => byte(
                u32::from(id.subsystem_vendor) | u32::from(id.subsystem) << 16,
                0x2c,
            ),
            0x34 if !id.capabilities.is_empty() => CAPABILITIES_AT as u8,
            0x3c => self.interrupt_line,
            0x3d if id.bar_bytes > 0 => INTERRUPT_PIN_A,
            _ => {
                let capability = offset.checked_sub(CAPABILITIES_AT);
                capability
                    .and_then(|at| id.capabilities.get(at))
                    .copied()
                    .unwrap_or(0)
            }
        }
    }

    fn status(&self, interrupt: bool) -> u16 {
        let capabilities = if self.identity.capabilities.is_empty() {
            0
        } else {
            STATUS_CAPABILITIES
        };
        capabilities | if interrupt { STATUS_INTERRUPT } else { 0 }
    }

    /// Writes a byte of the space.
    pub(crate) fn write(&mut self, offset: usize, value: u8) {
        match offset {
            0x04 | 0x05 => {
                let mut bytes = self.command.to_le_bytes();
                bytes[offset - 0x04] = value;
                self.command = u16::from_le_bytes(bytes) & COMMAND_WRITABLE;
            }
            0x10..=0x13 if self.identity.bar_bytes > 0 => {
                let mut bytes = self.bar.to_le_bytes();
                bytes[offset - 0x10] = value;
                self.bar = u32::from_le_bytes(bytes) & !(self.identity.bar_bytes - 1);
            }
            0x3c => self.interrupt_line = value,
            _ => {}
        }
    }

    pub(crate) fn save(&self) -> FunctionState {
        FunctionState {
            command: self.command,
            bar: self.bar,
            interrupt_line: self.interrupt_line,
        }
    }

    /// A function of this identity with saved registers.
    pub(crate) fn restore(identity: Identity, state: &FunctionState) -> Function {
        Function {
            command: state.command & COMMAND_WRITABLE,
            bar: state.bar & !identity.bar_bytes.saturating_sub(1),
            interrupt_line: state.interrupt_line,
            identity,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function() -> Function {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1041,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
            revision: 1,
            class: 0x02_00_00,
            bar_bytes: 0x1000,
            capabilities: vec![9, 0, 16],
        };
        Function::new(identity, 0xc000_0000, 5)
    }

    fn read_u32(function: &Function, offset: usize) -> u32 {
        u32::from_le_bytes([0, 1, 2, 3].map(|i| function.read(offset + i, false)))
    }

    fn write_u32(function: &mut Function, offset: usize, value: u32) {
        for (i, byte) in value.to_le_bytes().into_iter().enumerate() {
            function.write(offset + i, byte);
        }
    }

    #[test]
    fn the_header_tells_who_it_is() {
        let f = function();
        assert_eq!(read_u32(&f, 0x00), 0x1041_1af4);
        assert_eq!(read_u32(&f, 0x04), 0x0010_0002);
        assert_eq!(read_u32(&f, 0x08), 0x0200_0001);
        assert_eq!(read_u32(&f, 0x0c), 0);
        assert_eq!(read_u32(&f, 0x2c), 0x1100_1af4);
        assert_eq!(read_u32(&f, 0x34), 0x40);
        assert_eq!(read_u32(&f, 0x3c), 0x0105);
        assert_eq!(read_u32(&f, 0x40), 0x0010_0009);
        assert_eq!(read_u32(&f, 0xfc), 0);
        assert_eq!(f.read(0x06, true), 0x18, "interrupt status");
    }

    #[test]
    fn the_bar_can_be_sized_moved_and_switched_off() {
        let mut f = function();
        write_u32(&mut f, 0x10, 0xffff_ffff);
        assert_eq!(read_u32(&f, 0x10), 0xffff_f000);
        write_u32(&mut f, 0x10, 0xd000_0000);
        assert_eq!(f.bar_offset(0xd000_0fff), Some(0xfff));
        assert_eq!(f.bar_offset(0xd000_1000), None);
        assert_eq!(f.bar_offset(0xc000_0000), None);
        write_u32(&mut f, 0x04, 0);
        assert_eq!(f.bar_offset(0xd000_0000), None);
        write_u32(&mut f, 0x14, 0xffff_ffff);
        assert_eq!(read_u32(&f, 0x14), 0, "no other BAR");
    }

    #[test]
    fn only_known_command_bits_stick() {
        let mut f = function();
        write_u32(&mut f, 0x04, 0xffff_ffff);
        assert_eq!(read_u32(&f, 0x04) & 0xffff, u32::from(COMMAND_WRITABLE));
        assert!(!f.intx_enabled());
    }
}
