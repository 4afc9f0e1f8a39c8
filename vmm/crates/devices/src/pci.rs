//! PCI by configuration mechanism 1 (ports 0xcf8 and 0xcfc): bus 0 with a host bridge and the virtio devices.
//!
//! BARs and interrupt lines are set at power-on as firmware would leave them. There are no bridges, no option ROMs, no
//! MSI and no I/O BARs. A guest may move a BAR; RAM always wins over it.

pub(crate) mod function;

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemory;

use crate::StateError;
use crate::config::BoardConfig;
use crate::outbox::Outside;
pub use crate::pci::function::FunctionState;
use crate::pci::function::{Function, Identity};
use crate::virtio::{Blk, BlkState, Net, NetState, Rng, RngState, TransportState, VirtioPci};

const ADDRESS_ENABLE: u32 = 0x8000_0000;
const ADDRESS_WRITABLE: u32 = 0x80ff_fffc;

/// Where firmware would have put a device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    /// Device number on bus 0.
    pub(crate) number: u32,
    /// Address of BAR 0.
    pub(crate) bar: u32,
    /// IRQ of INTA. On the master 8259A, where an interrupt takes fewer exits than on the slave.
    pub(crate) irq: u8,
}

pub(crate) const NET_SLOT: Slot = Slot {
    number: 1,
    bar: 0xc000_0000,
    irq: 5,
};
pub(crate) const DISK_SLOT: Slot = Slot {
    number: 2,
    bar: 0xc000_1000,
    irq: 6,
};
pub(crate) const ENTROPY_SLOT: Slot = Slot {
    number: 3,
    bar: 0xc000_2000,
    irq: 3,
};

/// The bus.
#[derive(Debug)]
pub(crate) struct Pci {
    /// CONFIG_ADDRESS, port 0xcf8.
    address: u32,
    bridge: Function,
    pub(crate) net: Option<VirtioPci<Net>>,
    pub(crate) disk: Option<VirtioPci<Blk>>,
    pub(crate) entropy: Option<VirtioPci<Rng>>,
}

/// Saved state of the bus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciState {
    /// CONFIG_ADDRESS, port 0xcf8.
    pub address: u32,
    /// The network device.
    pub net: Option<VirtioPciState<NetState>>,
    /// The block device.
    pub disk: Option<VirtioPciState<BlkState>>,
    /// The entropy device.
    pub entropy: Option<VirtioPciState<RngState>>,
}

/// Saved state of a virtio device with its transport.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioPciState<D> {
    /// Its PCI registers.
    pub function: FunctionState,
    /// The virtio-pci configuration access capability: BAR, offset and length.
    pub window: (u8, u32, u32),
    /// The common part.
    pub transport: TransportState,
    /// The device's own part.
    pub device: D,
}

/// A device on the bus, whatever its kind.
macro_rules! with_device {
    ($pci:expr, $number:expr, $device:ident => $call:expr) => {
        match $number {
            number if number == NET_SLOT.number => $pci.net.as_mut().map(|$device| $call),
            number if number == DISK_SLOT.number => $pci.disk.as_mut().map(|$device| $call),
            number if number == ENTROPY_SLOT.number => $pci.entropy.as_mut().map(|$device| $call),
            _ => None,
        }
    };
}

/// The host bridge: the generic one that QEMU's virtual machines have, which needs no quirks.
fn host_bridge() -> Function {
    let identity = Identity {
        vendor: 0x1b36,
        device: 0x0008,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
        revision: 0,
        class: 0x06_00_00,
        bar_bytes: 0,
        capabilities: Vec::new(),
    };
    Function::new(identity, 0, 0)
}

impl Pci {
    pub(crate) fn new(config: &BoardConfig) -> Pci {
        Pci {
            address: 0,
            bridge: host_bridge(),
            net: config
                .net
                .as_ref()
                .map(|net| VirtioPci::new(Net::new(net), NET_SLOT)),
            disk: config
                .disk
                .as_ref()
                .map(|disk| VirtioPci::new(Blk::new(disk), DISK_SLOT)),
            entropy: config
                .entropy
                .then(|| VirtioPci::new(Rng::default(), ENTROPY_SLOT)),
        }
    }

    /// Levels of the devices' interrupt lines.
    pub(crate) fn lines(&self) -> [(u8, bool); 3] {
        [
            (NET_SLOT.irq, self.net.as_ref().is_some_and(VirtioPci::line)),
            (
                DISK_SLOT.irq,
                self.disk.as_ref().is_some_and(VirtioPci::line),
            ),
            (
                ENTROPY_SLOT.irq,
                self.entropy.as_ref().is_some_and(VirtioPci::line),
            ),
        ]
    }

    /// Reads CONFIG_ADDRESS, which answers to accesses of 4 bytes only.
    pub(crate) fn address(&self) -> u32 {
        self.address
    }

    pub(crate) fn set_address(&mut self, address: u32) {
        self.address = address & ADDRESS_WRITABLE;
    }

    /// Device number and register that CONFIG_ADDRESS selects, if there may be something.
    fn selected(&self) -> Option<(u32, usize)> {
        let bus_and_function = self.address & 0x00ff_0700;
        let enabled = self.address & ADDRESS_ENABLE != 0;
        (enabled && bus_and_function == 0)
            .then_some((self.address >> 11 & 0x1f, (self.address & 0xfc) as usize))
    }

    /// Reads CONFIG_DATA from byte `lane` on; what is not there reads as ones.
    pub(crate) fn read_data<M: GuestMemory>(
        &mut self,
        outside: &mut Outside<'_, M>,
        lane: usize,
        data: &mut [u8],
    ) {
        data.fill(0xff);
        let Some((number, register)) = self.selected() else {
            return;
        };
        let offset = register + lane;
        if number == 0 {
            for (i, byte) in data.iter_mut().enumerate() {
                *byte = self.bridge.read(offset + i, false);
            }
        }
        with_device!(self, number, device => device.read_config(outside, offset, data));
    }

    /// Writes CONFIG_DATA from byte `lane` on.
    pub(crate) fn write_data<M: GuestMemory>(
        &mut self,
        outside: &mut Outside<'_, M>,
        lane: usize,
        data: &[u8],
    ) {
        let Some((number, register)) = self.selected() else {
            return;
        };
        let offset = register + lane;
        if number == 0 {
            for (i, byte) in data.iter().enumerate() {
                self.bridge.write(offset + i, *byte);
            }
        }
        with_device!(self, number, device => device.write_config(outside, offset, data));
    }

    /// Reads memory that a BAR decodes; false when none does.
    pub(crate) fn read_memory<M: GuestMemory>(
        &mut self,
        outside: &mut Outside<'_, M>,
        addr: u64,
        data: &mut [u8],
    ) -> bool {
        [NET_SLOT, DISK_SLOT, ENTROPY_SLOT].iter().any(|slot| {
            with_device!(self, slot.number, device => device.read_memory(outside, addr, data))
                .unwrap_or(false)
        })
    }

    /// Writes memory that a BAR decodes.
    pub(crate) fn write_memory<M: GuestMemory>(
        &mut self,
        outside: &mut Outside<'_, M>,
        addr: u64,
        data: &[u8],
    ) {
        for slot in [NET_SLOT, DISK_SLOT, ENTROPY_SLOT] {
            with_device!(self, slot.number, device => device.write_memory(outside, addr, data));
        }
    }

    pub(crate) fn save(&self) -> PciState {
        PciState {
            address: self.address,
            net: self.net.as_ref().map(|device| device.save(Net::save)),
            disk: self.disk.as_ref().map(|device| device.save(Blk::save)),
            entropy: self.entropy.as_ref().map(|device| device.save(Rng::save)),
        }
    }

    pub(crate) fn restore(config: &BoardConfig, state: PciState) -> Result<Pci, StateError> {
        let net = match (&config.net, state.net) {
            (Some(net), Some(state)) => {
                Some(VirtioPci::restore(NET_SLOT, state, |state, features| {
                    Ok(Net::restore(net, features, &state))
                })?)
            }
            (None, None) => None,
            _ => return Err(StateError::Devices),
        };
        let disk = match (&config.disk, state.disk) {
            (Some(disk), Some(state)) => Some(VirtioPci::restore(DISK_SLOT, state, |state, _| {
                Blk::restore(disk, state)
            })?),
            (None, None) => None,
            _ => return Err(StateError::Devices),
        };
        let entropy = match (config.entropy, state.entropy) {
            (true, Some(state)) => Some(VirtioPci::restore(ENTROPY_SLOT, state, |state, _| {
                Rng::restore(state)
            })?),
            (false, None) => None,
            _ => return Err(StateError::Devices),
        };
        let address = state.address & ADDRESS_WRITABLE;
        Ok(Pci {
            address,
            bridge: host_bridge(),
            net,
            disk,
            entropy,
        })
    }
}
