//! The board's address map: which device answers where.
//!
//! Devices with 8-bit registers see a wider access as one access a byte, lowest address first. What nobody claims reads
//! as ones and swallows writes.

use vm_memory::GuestMemory;

use super::{Board, BusAddress};
use crate::effect::Effect;

const UART: u16 = 0x3f8;
const UART_LAST: u16 = UART + 7;
const CMOS_INDEX: u16 = 0x70;
const CMOS_DATA: u16 = 0x71;
const KEYBOARD_DATA: u16 = 0x60;
const KEYBOARD_COMMAND: u16 = 0x64;
const POWER_OFF: u16 = 0xf4;
const PCI_ADDRESS: u16 = 0xcf8;
const RESET_CONTROL: u16 = 0xcf9;
const PCI_DATA: u16 = 0xcfc;
const PCI_DATA_LAST: u16 = PCI_DATA + 3;

/// Keyboard controller command: pulse the CPU's reset line.
const KEYBOARD_RESET: u8 = 0xfe;
/// Keyboard controller status: everything but "input buffer full". To a driver that looks for a controller its output
/// buffer never drains, so it gives up at once; to one that waits before it writes the reset command it is ready.
const KEYBOARD_STATUS: u8 = 0xfd;
/// Bit of port 0xcf9 that resets the CPU when it is set.
const RESET_CPU: u8 = 0x04;

impl Board {
    /// Whether an access depends on the present time, so that [`Input::Time`](crate::Input::Time) should come first:
    /// the timer's counters, port 0x61 and the clock. Without it the device takes the time it knows.
    pub fn reads_time(address: BusAddress, is_read: bool) -> bool {
        match address {
            BusAddress::Port(0x40..=0x42 | 0x61 | CMOS_DATA) => true,
            // Latch commands.
            BusAddress::Port(0x43) => !is_read,
            _ => false,
        }
    }

    /// An IN of 1, 2 or 4 bytes.
    pub fn port_read<M: GuestMemory>(&mut self, ram: &M, port: u16, data: &mut [u8]) {
        match (port, data.len()) {
            (PCI_ADDRESS, 4) => data.copy_from_slice(&self.pci.address().to_le_bytes()),
            (PCI_DATA..=PCI_DATA_LAST, len) if usize::from(port - PCI_DATA) + len <= 4 => {
                let (pci, mut outside) = self.pci_and_outside(ram);
                pci.read_data(&mut outside, usize::from(port - PCI_DATA), data);
            }
            _ => {
                for (port, byte) in ports_from(port).zip(data.iter_mut()) {
                    *byte = self.read_byte(port);
                }
            }
        }
        self.wire();
    }

    /// An OUT of 1, 2 or 4 bytes.
    pub fn port_write<M: GuestMemory>(&mut self, ram: &M, port: u16, data: &[u8]) {
        match (port, data) {
            (PCI_ADDRESS, &[b0, b1, b2, b3]) => {
                self.pci.set_address(u32::from_le_bytes([b0, b1, b2, b3]));
            }
            (PCI_DATA..=PCI_DATA_LAST, data) if usize::from(port - PCI_DATA) + data.len() <= 4 => {
                let (pci, mut outside) = self.pci_and_outside(ram);
                pci.write_data(&mut outside, usize::from(port - PCI_DATA), data);
            }
            _ => {
                for (port, byte) in ports_from(port).zip(data) {
                    self.write_byte(port, *byte);
                }
            }
        }
        self.wire();
    }

    /// A load from a physical address that is not RAM.
    pub fn mmio_read<M: GuestMemory>(&mut self, ram: &M, addr: u64, data: &mut [u8]) {
        let (pci, mut outside) = self.pci_and_outside(ram);
        if !pci.read_memory(&mut outside, addr, data) {
            data.fill(0xff);
        }
        self.wire();
    }

    /// A store to a physical address that is not RAM.
    pub fn mmio_write<M: GuestMemory>(&mut self, ram: &M, addr: u64, data: &[u8]) {
        let (pci, mut outside) = self.pci_and_outside(ram);
        pci.write_memory(&mut outside, addr, data);
        self.wire();
    }

    fn read_byte(&mut self, port: u16) -> u8 {
        match port {
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => self.pics.read(port),
            0x40..=0x43 | 0x61 => self.pit.read(port, self.now),
            UART..=UART_LAST => self.uart.read(port - UART),
            CMOS_DATA => self.cmos.read_data(self.now),
            KEYBOARD_COMMAND => KEYBOARD_STATUS,
            KEYBOARD_DATA => 0,
            RESET_CONTROL => 0,
            _ => 0xff,
        }
    }

    fn write_byte(&mut self, port: u16, value: u8) {
        match port {
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => self.pics.write(port, value),
            0x40..=0x43 | 0x61 => self.pit.write(port, value, self.now),
            UART..=UART_LAST => {
                if let Some(byte) = self.uart.write(port - UART, value) {
                    self.outbox.push(Effect::ConsoleTx(byte));
                }
            }
            CMOS_INDEX => self.cmos.write_index(value),
            CMOS_DATA => self.cmos.write_data(value, self.now),
            KEYBOARD_COMMAND if value == KEYBOARD_RESET => self.outbox.push(Effect::Reset),
            RESET_CONTROL if value & RESET_CPU != 0 => self.outbox.push(Effect::Reset),
            POWER_OFF => self.outbox.push(Effect::PowerOff),
            _ => {}
        }
    }
}

/// The ports of a wider access. Behind the last one comes the first, as on the bus.
fn ports_from(port: u16) -> impl Iterator<Item = u16> {
    (0..).map(move |offset| port.wrapping_add(offset))
}
