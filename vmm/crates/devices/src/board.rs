//! The board: every device of the machine, wired together.
//!
//! It is a pure function of the accesses and inputs that it is given, in their order: no clock, no I/O, no threads, no
//! randomness. Two boards with the same past answer the same, and so does one restored from the other's saved state.
//! Interrupt lines are recomputed from the devices' states after every access and input.

mod ports;
mod save;

use vm_memory::GuestMemory;

use crate::cmos::Cmos;
use crate::config::{BoardConfig, ConfigError};
use crate::effect::{Effect, Input, NetOffloads, Rejected};
use crate::outbox::{DeviceFault, Outbox, Outside};
use crate::pci::{DISK_SLOT, ENTROPY_SLOT, NET_SLOT, Pci};
use crate::pic::Pics;
use crate::pit::Pit;
use crate::time::VirtualTime;
use crate::uart::Uart;

const TIMER_IRQ: u8 = 0;
const UART_IRQ: u8 = 4;

/// PCI interrupts are levels.
const LEVEL_TRIGGERED: u16 = 1 << NET_SLOT.irq | 1 << DISK_SLOT.irq | 1 << ENTROPY_SLOT.irq;

/// An address on one of the two buses of the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BusAddress {
    /// An I/O port.
    Port(u16),
    /// A physical address that is not RAM.
    Memory(u64),
}

/// Counts of things that a board has done: for reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BoardCounters {
    /// Timer interrupts raised.
    pub timer_ticks: u64,
    /// Timer interrupts dropped because they fell due together with another.
    pub timer_ticks_lost: u64,
    /// Frames from the guest dropped as malformed.
    pub net_tx_dropped: u64,
}

/// All devices of a machine.
#[derive(Debug)]
pub struct Board {
    config: BoardConfig,
    now: VirtualTime,
    pics: Pics,
    pit: Pit,
    uart: Uart,
    cmos: Cmos,
    pci: Pci,
    outbox: Outbox,
}

impl Board {
    /// A board at power-on, virtual time 0.
    pub fn new(config: &BoardConfig) -> Result<Board, ConfigError> {
        config.validate()?;
        Ok(Board {
            config: config.clone(),
            now: VirtualTime(0),
            pics: Pics::new(LEVEL_TRIGGERED),
            pit: Pit::new(),
            uart: Uart::new(),
            cmos: Cmos::new(config.wall_clock_base_s),
            pci: Pci::new(config),
            outbox: Outbox::new(0),
        })
    }

    /// What the board is made of.
    pub fn config(&self) -> &BoardConfig {
        &self.config
    }

    /// Virtual time: what the last [`Input::Time`] said.
    pub fn now(&self) -> VirtualTime {
        self.now
    }

    /// Takes an input. One that is rejected has changed nothing.
    pub fn apply<M: GuestMemory>(&mut self, ram: &M, input: Input) -> Result<(), Rejected> {
        match input {
            Input::Time(to) => self.advance(ram, to)?,
            Input::ConsoleRx(bytes) if bytes.len() > self.uart.rx_room() => {
                return Err(Rejected::NoRoom);
            }
            Input::ConsoleRx(bytes) => self.uart.receive(&bytes),
            Input::NetRx(frame) => {
                let (pci, mut outside) = self.pci_and_outside(ram);
                let net = pci.net.as_mut().ok_or(Rejected::NotRunning)?;
                net.receive(&mut outside, &frame)?;
            }
            Input::DiskDone { id, status, data } => {
                let (pci, mut outside) = self.pci_and_outside(ram);
                let disk = pci.disk.as_mut().ok_or(Rejected::UnknownRequest(id))?;
                disk.done(&mut outside, id, status, &data)?;
            }
            Input::Entropy { id, data } => {
                let (pci, mut outside) = self.pci_and_outside(ram);
                let entropy = pci.entropy.as_mut().ok_or(Rejected::UnknownRequest(id))?;
                entropy.done(&mut outside, id, &data)?;
            }
        }
        self.wire();
        Ok(())
    }

    fn advance<M: GuestMemory>(&mut self, ram: &M, to: VirtualTime) -> Result<(), Rejected> {
        if to < self.now {
            return Err(Rejected::TimeBackwards { now: self.now, to });
        }
        self.now = to;
        if self.pit.advance(to) {
            self.pics.pulse(TIMER_IRQ);
        }
        let (pci, mut outside) = self.pci_and_outside(ram);
        if let Some(net) = &mut pci.net {
            net.advance(&mut outside);
        }
        Ok(())
    }

    /// The bus, and what its devices work with.
    fn pci_and_outside<'a, M: GuestMemory>(
        &'a mut self,
        ram: &'a M,
    ) -> (&'a mut Pci, Outside<'a, M>) {
        let outside = Outside {
            ram,
            outbox: &mut self.outbox,
            now: self.now,
        };
        (&mut self.pci, outside)
    }

    /// Brings the interrupt lines to what the devices' states say.
    fn wire(&mut self) {
        self.pics.set_line(UART_IRQ, self.uart.line());
        for (irq, level) in self.pci.lines() {
            self.pics.set_line(irq, level);
        }
    }

    /// When [`Input::Time`] is next needed for a timer to fire; a time that has passed is due now.
    pub fn next_timer(&self) -> Option<VirtualTime> {
        let net = self.pci.net.as_ref().and_then(|net| net.next_timer());
        [self.pit.next_tick(), net].into_iter().flatten().min()
    }

    /// Whether an interrupt waits for the CPU to take it.
    pub fn pending_interrupt(&self) -> bool {
        self.pics.pending()
    }

    /// The CPU takes the interrupt (the INTA cycle): its vector. Without a pending one it is the spurious vector.
    pub fn ack_interrupt(&mut self) -> u8 {
        self.pics.acknowledge()
    }

    /// Whether there are effects to take.
    pub fn has_effects(&self) -> bool {
        self.outbox.has_effects()
    }

    /// Takes the effects of the last access or input, in order. Called after each; allocates nothing when there are
    /// none.
    pub fn take_effects(&mut self) -> Vec<Effect> {
        self.outbox.take_effects()
    }

    /// Takes the reports of devices that have stopped for a fault of their driver. They are not part of the state.
    pub fn take_faults(&mut self) -> Vec<DeviceFault> {
        self.outbox.take_faults()
    }

    /// Whether [`Input::NetRx`] would find room for a frame of any length now; else frames should wait outside.
    pub fn net_rx_room<M: GuestMemory>(&self, ram: &M) -> bool {
        self.pci
            .net
            .as_ref()
            .is_some_and(|net| net.has_rx_room(ram))
    }

    /// What [`Effect::NetOffloads`] said last.
    pub fn net_offloads(&self) -> NetOffloads {
        self.pci
            .net
            .as_ref()
            .map_or_else(NetOffloads::default, |net| net.device().rx_offloads())
    }

    /// Bytes that [`Input::ConsoleRx`] may carry now.
    pub fn console_rx_room(&self) -> usize {
        self.uart.rx_room()
    }

    /// The effects that have not been answered yet, in the order of their requests: who goes live has them done again.
    pub fn outstanding(&self) -> Vec<Effect> {
        let disk = self
            .pci
            .disk
            .iter()
            .flat_map(|disk| disk.device().outstanding());
        let entropy = self
            .pci
            .entropy
            .iter()
            .flat_map(|rng| rng.device().outstanding());
        let mut effects: Vec<Effect> = disk.chain(entropy).collect();
        effects.sort_by_key(Effect::request);
        effects
    }

    /// Counts for reports.
    pub fn counters(&self) -> BoardCounters {
        let (timer_ticks, timer_ticks_lost) = self.pit.ticks();
        let net_tx_dropped = self
            .pci
            .net
            .as_ref()
            .map_or(0, |net| net.device().tx_dropped());
        BoardCounters {
            timer_ticks,
            timer_ticks_lost,
            net_tx_dropped,
        }
    }
}
