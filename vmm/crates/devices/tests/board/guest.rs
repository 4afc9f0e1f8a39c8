//! A guest: RAM, a board, and what Linux's virtio_pci_modern and virtio_ring do with them.
//!
//! Used by the tests and by the fuzz target, so it builds without either.

use devices::{
    Board, BoardConfig, DiskCache, DiskConfig, Effect, Input, NetConfig, Rejected, VirtualTime,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub(crate) const RAM_BYTES: usize = 4 << 20;
pub(crate) const SECTORS: u64 = 4096;
pub(crate) const MAC: [u8; 6] = [0x02, 0x50, 0x4f, 0x4c, 0x4c, 0x58];

pub(crate) const NET: u32 = 1;
pub(crate) const DISK: u32 = 2;
pub(crate) const ENTROPY: u32 = 3;

pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const INDIRECT: u64 = 1 << 28;
pub(crate) const EVENT_IDX: u64 = 1 << 29;

pub(crate) fn config() -> BoardConfig {
    BoardConfig {
        wall_clock_base_s: 1_795_451_708,
        net: Some(NetConfig {
            mac: MAC,
            offloads: true,
        }),
        disk: Some(DiskConfig {
            sectors: SECTORS,
            identity: "pollux-root".into(),
            cache: DiskCache::WriteBack,
        }),
        entropy: true,
    }
}

/// RAM and board; effects are collected from every access and input.
pub(crate) struct Machine {
    pub(crate) ram: GuestMemoryMmap<()>,
    pub(crate) board: Board,
    pub(crate) effects: Vec<Effect>,
}

impl Machine {
    pub(crate) fn new(config: &BoardConfig) -> Machine {
        Machine::with_ram(config, RAM_BYTES)
    }

    pub(crate) fn with_ram(config: &BoardConfig, bytes: usize) -> Machine {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).expect("RAM");
        Machine {
            ram,
            board: Board::new(config).expect("a valid configuration"),
            effects: Vec::new(),
        }
    }

    /// Writes RAM as the CPU would.
    pub(crate) fn write(&self, addr: u64, bytes: &[u8]) {
        let written = self.ram.write_slice(bytes, GuestAddress(addr));
        written.expect("the test's memory is in RAM");
    }

    /// Reads RAM as the CPU would.
    pub(crate) fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let read = self.ram.read_slice(&mut bytes, GuestAddress(addr));
        read.expect("the test's memory is in RAM");
        bytes
    }

    fn collect(&mut self) {
        self.effects.extend(self.board.take_effects());
    }

    pub(crate) fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    pub(crate) fn port_in(&mut self, port: u16, data: &mut [u8]) {
        self.board.port_read(&self.ram, port, data);
        self.collect();
    }

    pub(crate) fn port_out(&mut self, port: u16, data: &[u8]) {
        self.board.port_write(&self.ram, port, data);
        self.collect();
    }

    pub(crate) fn inb(&mut self, port: u16) -> u8 {
        let mut data = [0];
        self.port_in(port, &mut data);
        data[0]
    }

    pub(crate) fn outb(&mut self, port: u16, value: u8) {
        self.port_out(port, &[value]);
    }

    pub(crate) fn load(&mut self, addr: u64, data: &mut [u8]) {
        self.board.mmio_read(&self.ram, addr, data);
        self.collect();
    }

    pub(crate) fn store(&mut self, addr: u64, data: &[u8]) {
        self.board.mmio_write(&self.ram, addr, data);
        self.collect();
    }

    pub(crate) fn load_u8(&mut self, addr: u64) -> u8 {
        let mut data = [0];
        self.load(addr, &mut data);
        data[0]
    }

    pub(crate) fn load_u16(&mut self, addr: u64) -> u16 {
        let mut data = [0; 2];
        self.load(addr, &mut data);
        u16::from_le_bytes(data)
    }

    pub(crate) fn load_u32(&mut self, addr: u64) -> u32 {
        let mut data = [0; 4];
        self.load(addr, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn apply(&mut self, input: Input) -> Result<(), Rejected> {
        let result = self.board.apply(&self.ram, input);
        self.collect();
        result
    }

    pub(crate) fn set_time(&mut self, ns: u64) {
        self.apply(Input::Time(VirtualTime(ns)))
            .expect("time goes on");
    }

    pub(crate) fn config_read(&mut self, device: u32, offset: u32, data: &mut [u8]) {
        let address = 0x8000_0000 | device << 11 | (offset & 0xfc);
        self.port_out(0xcf8, &address.to_le_bytes());
        self.port_in(0xcfc + (offset & 3) as u16, data);
    }

    pub(crate) fn config_write(&mut self, device: u32, offset: u32, data: &[u8]) {
        let address = 0x8000_0000 | device << 11 | (offset & 0xfc);
        self.port_out(0xcf8, &address.to_le_bytes());
        self.port_out(0xcfc + (offset & 3) as u16, data);
    }

    pub(crate) fn config_u32(&mut self, device: u32, offset: u32) -> u32 {
        let mut data = [0; 4];
        self.config_read(device, offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn config_u8(&mut self, device: u32, offset: u32) -> u8 {
        let mut data = [0];
        self.config_read(device, offset, &mut data);
        data[0]
    }

    /// Initialises the interrupt controllers as Linux does: vectors from 0x30, nothing masked.
    pub(crate) fn init_pics(&mut self) {
        for (port, value) in [
            (0x20, 0x11),
            (0x21, 0x30),
            (0x21, 0x04),
            (0x21, 0x01),
            (0xa0, 0x11),
            (0xa1, 0x38),
            (0xa1, 0x02),
            (0xa1, 0x01),
            (0x21, 0x00),
            (0xa1, 0x00),
        ] {
            self.outb(port, value);
        }
    }

    /// Takes a pending interrupt and ends it at the controllers; its IRQ.
    pub(crate) fn take_irq(&mut self) -> Option<u8> {
        if !self.board.pending_interrupt() {
            return None;
        }
        let irq = self.board.ack_interrupt().wrapping_sub(0x30);
        if irq >= 8 {
            self.outb(0xa0, 0x20);
        }
        self.outb(0x20, 0x20);
        Some(irq)
    }
}

/// Where a capability says that a structure is.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Structures {
    pub(crate) common: u64,
    pub(crate) isr: u64,
    pub(crate) device: u64,
    pub(crate) notify: u64,
    pub(crate) notify_multiplier: u32,
    /// Offset of the configuration access capability.
    pub(crate) window: u32,
}

/// A virtio device as its driver sees it.
#[derive(Clone)]
pub(crate) struct Driver {
    pub(crate) number: u32,
    pub(crate) at: Structures,
    pub(crate) features: u64,
    pub(crate) queues: Vec<Ring>,
}

impl Driver {
    /// Probes and starts a device with those of `wanted` features that it offers and queues of at most `size`.
    pub(crate) fn start(machine: &mut Machine, number: u32, wanted: u64, size: u16) -> Driver {
        let mut driver = Driver::find(machine, number);
        driver.negotiate(machine, wanted);
        driver.set_up_queues(machine, size);
        driver.set_status(machine, 0x04);
        driver
    }

    /// Walks the capability list.
    pub(crate) fn find(machine: &mut Machine, number: u32) -> Driver {
        let bar = u64::from(machine.config_u32(number, 0x10) & !0xf);
        let mut at = Structures::default();
        let mut capability = u32::from(machine.config_u8(number, 0x34));
        while capability != 0 {
            let place = bar + u64::from(machine.config_u32(number, capability + 8));
            match machine.config_u8(number, capability + 3) {
                1 => at.common = place,
                2 => {
                    at.notify = place;
                    at.notify_multiplier = machine.config_u32(number, capability + 16);
                }
                3 => at.isr = place,
                4 => at.device = place,
                _ => at.window = capability,
            }
            capability = u32::from(machine.config_u8(number, capability + 1));
        }
        Driver {
            number,
            at,
            features: 0,
            queues: Vec::new(),
        }
    }

    pub(crate) fn status(&self, machine: &mut Machine) -> u8 {
        machine.load_u8(self.at.common + 0x14)
    }

    /// Adds status bits.
    pub(crate) fn set_status(&self, machine: &mut Machine, bits: u8) {
        let status = self.status(machine) | bits;
        machine.store(self.at.common + 0x14, &[status]);
    }

    pub(crate) fn reset(&mut self, machine: &mut Machine) {
        machine.store(self.at.common + 0x14, &[0]);
        self.queues.clear();
    }

    pub(crate) fn offered(&self, machine: &mut Machine) -> u64 {
        let mut word = |select: u32| {
            machine.store(self.at.common, &select.to_le_bytes());
            u64::from(machine.load_u32(self.at.common + 4))
        };
        word(0) | word(1) << 32
    }

    /// Acknowledges, chooses features and has them accepted; true when they are.
    pub(crate) fn negotiate(&mut self, machine: &mut Machine, wanted: u64) -> bool {
        self.set_status(machine, 0x01);
        self.set_status(machine, 0x02);
        self.features = self.offered(machine) & wanted;
        self.write_features(machine, self.features);
        self.set_status(machine, 0x08);
        self.status(machine) & 0x08 != 0
    }

    pub(crate) fn write_features(&self, machine: &mut Machine, features: u64) {
        for (select, word) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
            machine.store(self.at.common + 0x08, &select.to_le_bytes());
            machine.store(self.at.common + 0x0c, &word.to_le_bytes());
        }
    }

    pub(crate) fn set_up_queues(&mut self, machine: &mut Machine, size: u16) {
        // No device has more; one whose memory is switched off says 0xffff.
        let count = machine.load_u16(self.at.common + 0x12).min(2);
        self.queues = (0..count)
            .map(|index| self.set_up_queue(machine, index, size))
            .collect();
        for index in 0..count {
            machine.store(self.at.common + 0x16, &index.to_le_bytes());
            machine.store(self.at.common + 0x1c, &1u16.to_le_bytes());
        }
    }

    fn set_up_queue(&self, machine: &mut Machine, index: u16, size: u16) -> Ring {
        let common = self.at.common;
        machine.store(common + 0x16, &index.to_le_bytes());
        let size = machine.load_u16(common + 0x18).clamp(1, size);
        let offset = u64::from(machine.load_u16(common + 0x1e));
        let notify = self.at.notify + offset * u64::from(self.at.notify_multiplier);
        let base = 0x2000 * (u64::from(self.number) * 2 + u64::from(index));
        let ring = Ring::new(base, size, notify, index, self.features & EVENT_IDX != 0);
        ring.clear(machine);
        machine.store(common + 0x18, &size.to_le_bytes());
        for (at, addr) in [(0x20, ring.desc), (0x28, ring.avail), (0x30, ring.used)] {
            machine.store(common + at, &(addr as u32).to_le_bytes());
            machine.store(common + at + 4, &((addr >> 32) as u32).to_le_bytes());
        }
        ring
    }

    pub(crate) fn isr(&self, machine: &mut Machine) -> u8 {
        machine.load_u8(self.at.isr)
    }
}

/// A buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buffer {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) write: bool,
}

pub(crate) fn readable(addr: u64, len: u32) -> Buffer {
    Buffer {
        addr,
        len,
        write: false,
    }
}

pub(crate) fn writable(addr: u64, len: u32) -> Buffer {
    Buffer {
        addr,
        len,
        write: true,
    }
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT_FLAG: u16 = 4;

/// The driver's side of a split virtqueue.
#[derive(Clone)]
pub(crate) struct Ring {
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    pub(crate) size: u16,
    notify: u64,
    index: u16,
    event_idx: bool,
    next_desc: u16,
    pub(crate) avail_idx: u16,
    kicked_idx: u16,
    pub(crate) used_idx: u16,
    pub(crate) kicks: u32,
}

impl Ring {
    fn new(base: u64, size: u16, notify: u64, index: u16, event_idx: bool) -> Ring {
        Ring {
            desc: base,
            avail: base + 0x1000,
            used: base + 0x1400,
            size,
            notify,
            index,
            event_idx,
            next_desc: 0,
            avail_idx: 0,
            kicked_idx: 0,
            used_idx: 0,
            kicks: 0,
        }
    }

    fn clear(&self, machine: &Machine) {
        machine.write(self.desc, &[0; 0x2000]);
    }

    pub(crate) fn put<T: vm_memory::ByteValued>(&self, machine: &Machine, addr: u64, value: T) {
        machine
            .ram
            .write_obj(value, GuestAddress(addr))
            .expect("in RAM");
    }

    fn get(&self, machine: &Machine, addr: u64) -> u16 {
        machine.ram.read_obj(GuestAddress(addr)).expect("in RAM")
    }

    /// Address of descriptor `index` of a table.
    fn write_descriptor(
        &self,
        machine: &Machine,
        table: u64,
        index: u16,
        parts: (u64, u32, u16, u16),
    ) {
        let (addr, len, flags, next) = parts;
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        machine.write(table + 16 * u64::from(index), &bytes);
    }

    /// Writes a chain into the descriptor table and makes it available; its head.
    pub(crate) fn add(&mut self, machine: &Machine, chain: &[Buffer]) -> u16 {
        let head = self.next_desc;
        for (i, buffer) in chain.iter().enumerate() {
            let at = self.next_desc;
            self.next_desc = (self.next_desc + 1) % self.size;
            let next = if i + 1 < chain.len() { NEXT } else { 0 };
            let flags = next | if buffer.write { WRITE } else { 0 };
            self.write_descriptor(
                machine,
                self.desc,
                at,
                (buffer.addr, buffer.len, flags, self.next_desc),
            );
        }
        self.make_available(machine, head);
        head
    }

    /// The same with an indirect table at `table`.
    pub(crate) fn add_indirect(&mut self, machine: &Machine, table: u64, chain: &[Buffer]) -> u16 {
        for (i, buffer) in chain.iter().enumerate() {
            let next = if i + 1 < chain.len() { NEXT } else { 0 };
            let flags = next | if buffer.write { WRITE } else { 0 };
            let parts = (buffer.addr, buffer.len, flags, i as u16 + 1);
            self.write_descriptor(machine, table, i as u16, parts);
        }
        self.add_raw(machine, (table, 16 * chain.len() as u32, INDIRECT_FLAG, 0))
    }

    /// Makes a single descriptor available, whatever is in it: address, length, flags, next.
    pub(crate) fn add_raw(&mut self, machine: &Machine, parts: (u64, u32, u16, u16)) -> u16 {
        let head = self.next_desc;
        self.next_desc = (self.next_desc + 1) % self.size;
        self.write_descriptor(machine, self.desc, head, parts);
        self.make_available(machine, head);
        head
    }

    pub(crate) fn make_available(&mut self, machine: &Machine, head: u16) {
        let slot = u64::from(self.avail_idx % self.size);
        self.put(machine, self.avail + 4 + 2 * slot, head);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.put(machine, self.avail + 2, self.avail_idx);
    }

    /// Notifies the device if it wants that; whether it did.
    pub(crate) fn kick(&mut self, machine: &mut Machine) -> bool {
        let (old, new) = (self.kicked_idx, self.avail_idx);
        self.kicked_idx = new;
        let wanted = if self.event_idx {
            let event = self.get(machine, self.used + 4 + 8 * u64::from(self.size));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.get(machine, self.used) & 1 == 0
        };
        if wanted {
            self.notify(machine);
        }
        wanted
    }

    pub(crate) fn notify(&mut self, machine: &mut Machine) {
        self.kicks += 1;
        machine.store(self.notify, &self.index.to_le_bytes());
    }

    /// Chains that have come back: head and bytes written.
    pub(crate) fn take_used(&mut self, machine: &Machine) -> Vec<(u32, u32)> {
        let mut taken = Vec::new();
        while self.used_idx != self.get(machine, self.used + 2) {
            let slot = u64::from(self.used_idx % self.size);
            let entry: [u32; 2] = machine
                .ram
                .read_obj(GuestAddress(self.used + 4 + 8 * slot))
                .expect("in RAM");
            taken.push((entry[0], entry[1]));
            self.used_idx = self.used_idx.wrapping_add(1);
        }
        taken
    }

    /// Wants an interrupt for the next chain that comes back (or, without EVENT_IDX, for all).
    pub(crate) fn enable_interrupts(&self, machine: &Machine) {
        if self.event_idx {
            self.put(
                machine,
                self.avail + 4 + 2 * u64::from(self.size),
                self.used_idx,
            );
        } else {
            self.put(machine, self.avail, 0u16);
        }
    }

    /// Wants no interrupts.
    pub(crate) fn disable_interrupts(&self, machine: &Machine) {
        if self.event_idx {
            let far = self.used_idx.wrapping_sub(0x4000);
            self.put(machine, self.avail + 4 + 2 * u64::from(self.size), far);
        } else {
            self.put(machine, self.avail, 1u16);
        }
    }
}
