//! Virtio over PCI, modern interface (virtio 1.2, 4.1): all structures in one memory BAR of 4 KiB, INTx, no MSI-X.
//!
//! The common structure's state is here, with the device behind it. State of a device in the driver's eyes:
//! ```text
//!  reset ── ACKNOWLEDGE, DRIVER ── FEATURES_OK ── DRIVER_OK: running ── malformed ring: NEEDS_RESET
//!    ▲                                                 │                          │
//!    └── (requests on their way have ended) ◄── resetting ◄── status 0 ◄──────────┘
//! ```
//! The guest writes status 0 and reads it back until it is 0, so it waits for the requests that a reset waits for.

mod common;
mod inputs;
mod layout;

use layout::{BAR_BYTES, COMMON, DEVICE, ISR, NOTIFY, WINDOW_AT};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestMemory;

use super::queue::{QueueError, Virtqueue};
use super::state::TransportState;
use super::{Context, DEVICE_CONFIG_BYTES, Interrupt, VirtioDevice};
use crate::StateError;
use crate::outbox::Outside;
use crate::pci::function::Function;
use crate::pci::{Slot, VirtioPciState};

const STATUS_FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const STATUS_DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const STATUS_NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;

/// Bits of the interrupt status (4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Features of every device.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// What the window of the configuration access capability looks at (4.1.4.9).
#[derive(Clone, Copy, Debug, Default)]
struct Window {
    bar: u8,
    offset: u32,
    length: u32,
}

/// A virtio device on the PCI bus.
#[derive(Debug)]
pub(crate) struct VirtioPci<D> {
    function: Function,
    window: Window,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    status: u8,
    resetting: bool,
    queue_select: u16,
    isr: u8,
    queues: Vec<Virtqueue>,
    device: D,
}

impl<D: VirtioDevice> VirtioPci<D> {
    pub(crate) fn new(device: D, slot: Slot) -> VirtioPci<D> {
        VirtioPci {
            function: Function::new(layout::identity(&D::KIND), slot.bar, slot.irq),
            window: Window::default(),
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            status: 0,
            resetting: false,
            queue_select: 0,
            isr: 0,
            queues: D::KIND
                .queue_sizes
                .iter()
                .map(|size| Virtqueue::new(*size))
                .collect(),
            device,
        }
    }

    pub(crate) fn device(&self) -> &D {
        &self.device
    }

    /// The level of INTA.
    pub(crate) fn line(&self) -> bool {
        self.isr != 0 && self.function.intx_enabled()
    }

    /// The driver may have requests served.
    fn running(&self) -> bool {
        self.status & (STATUS_DRIVER_OK | STATUS_NEEDS_RESET) == STATUS_DRIVER_OK
    }

    fn has(&self, feature: u32) -> bool {
        self.driver_features & 1 << feature != 0
    }

    fn offered_features(&self) -> u64 {
        TRANSPORT_FEATURES | self.device.offered_features()
    }

    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.offered_features() == 0
            && self.has(VIRTIO_F_VERSION_1)
            && self.device.accepts_features(self.driver_features)
    }

    /// Calls into the device while the driver runs, and sees to interrupts and errors.
    fn call<M: GuestMemory>(
        &mut self,
        outside: &mut Outside<'_, M>,
        call: impl FnOnce(&mut D, &mut Context<'_, M>) -> Result<Interrupt, QueueError>,
    ) {
        let mut context = Context {
            ram: outside.ram,
            queues: &mut self.queues,
            outbox: outside.outbox,
            now: outside.now,
            interrupt_asserted: self.isr & ISR_QUEUE != 0,
        };
        match call(&mut self.device, &mut context) {
            Ok(Interrupt::Yes) => self.isr |= ISR_QUEUE,
            Ok(Interrupt::No) => {}
            Err(error) => self.fail(outside, &error),
        }
    }

    /// The driver has broken the rules: nothing more happens until it resets the device (2.1.2).
    fn fail<M: GuestMemory>(&mut self, outside: &mut Outside<'_, M>, error: &QueueError) {
        outside.outbox.fault(D::KIND.name, error);
        self.status |= STATUS_NEEDS_RESET;
        if self.status & STATUS_DRIVER_OK != 0 {
            self.isr |= ISR_CONFIG;
        }
    }

    fn reset<M: GuestMemory>(&mut self, outside: &mut Outside<'_, M>) {
        self.device.reset(outside.outbox);
        for queue in &mut self.queues {
            queue.reset();
        }
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = 0;
        self.status = 0;
        self.queue_select = 0;
        self.isr = 0;
        self.resetting = self.device.busy();
    }

    fn notify<M: GuestMemory>(&mut self, outside: &mut Outside<'_, M>, index: usize) {
        if self.running() && self.queues.get(index).is_some_and(Virtqueue::enabled) {
            self.call(outside, |device, context| device.notify(context, index));
        }
    }

    /// Reads configuration space; `data` lies within 4 bytes that are aligned.
    pub(crate) fn read_config<M: GuestMemory>(
        &mut self,
        outside: &mut Outside<'_, M>,
        offset: usize,
        data: &mut [u8],
    ) {
        if offset == WINDOW_AT + layout::WINDOW_DATA {
            data.fill(0);
            if let Some((at, len)) = self.window_target(data.len()) {
                self.read_bar(outside, at, &mut data[..len]);
            }
            return;
        }
        let interrupt = self.isr != 0;
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = match self.read_window(offset + i) {
                Some(value) => value,
                None => self.function.read(offset + i, interrupt),
            };
        }
    }

    /// Writes configuration space; `data` lies within 4 bytes that are aligned.
    pub(crate) fn write_config<M: GuestMemory>(
        &mut self,
        outside: &mut Outside<'_, M>,
        offset: usize,
        data: &[u8],
    ) {
        if offset == WINDOW_AT + layout::WINDOW_DATA {
            if let Some((at, len)) = self.window_target(data.len()) {
                self.write_bar(outside, at, &data[..len]);
            }
            return;
        }
        for (i, byte) in data.iter().enumerate() {
            if !self.write_window(offset + i, *byte) {
                self.function.write(offset + i, *byte);
            }
        }
    }

    /// A byte of the window's writable registers.
    fn read_window(&self, offset: usize) -> Option<u8> {
        match offset.checked_sub(WINDOW_AT)? {
            4 => Some(self.window.bar),
            at @ 8..=11 => Some(self.window.offset.to_le_bytes()[at - 8]),
            at @ 12..=15 => Some(self.window.length.to_le_bytes()[at - 12]),
            _ => None,
        }
    }

    fn write_window(&mut self, offset: usize, value: u8) -> bool {
        let set = |register: &mut u32, byte: usize| {
            let mut bytes = register.to_le_bytes();
            bytes[byte] = value;
            *register = u32::from_le_bytes(bytes);
        };
        match offset.checked_sub(WINDOW_AT) {
            Some(4) => self.window.bar = value,
            Some(at @ 8..=11) => set(&mut self.window.offset, at - 8),
            Some(at @ 12..=15) => set(&mut self.window.length, at - 12),
            _ => return false,
        }
        true
    }

    /// Offset in the BAR and number of bytes of an access through the window of up to `len` bytes.
    fn window_target(&self, len: usize) -> Option<(u64, usize)> {
        let Window {
            bar,
            offset,
            length,
        } = self.window;
        let aligned = matches!(length, 1 | 2 | 4) && offset % length == 0;
        let inside = bar == 0 && u64::from(offset) < u64::from(BAR_BYTES);
        (aligned && inside && length as usize <= len)
            .then_some((u64::from(offset), length as usize))
    }

    /// Reads memory; false when it is not in the BAR.
    pub(crate) fn read_memory<M: GuestMemory>(
        &mut self,
        outside: &mut Outside<'_, M>,
        addr: u64,
        data: &mut [u8],
    ) -> bool {
        let Some(offset) = self.function.bar_offset(addr) else {
            return false;
        };
        self.read_bar(outside, offset, data);
        true
    }

    /// Writes memory, if it is in the BAR.
    pub(crate) fn write_memory<M: GuestMemory>(
        &mut self,
        outside: &mut Outside<'_, M>,
        addr: u64,
        data: &[u8],
    ) {
        if let Some(offset) = self.function.bar_offset(addr) {
            self.write_bar(outside, offset, data);
        }
    }

    /// What is in no structure reads as zero.
    fn read_bar<M: GuestMemory>(
        &mut self,
        _outside: &mut Outside<'_, M>,
        offset: u64,
        data: &mut [u8],
    ) {
        data.fill(0);
        if let Some(at) = COMMON.find(offset) {
            copy_at(&self.read_common(), at, data);
        } else if ISR.find(offset).is_some() {
            data[0] = std::mem::take(&mut self.isr);
        } else if let Some(at) = DEVICE.find(offset) {
            let config: [u8; DEVICE_CONFIG_BYTES] = self.device.config();
            copy_at(&config, at, data);
        }
    }

    fn write_bar<M: GuestMemory>(
        &mut self,
        outside: &mut Outside<'_, M>,
        offset: u64,
        data: &[u8],
    ) {
        if let Some(at) = COMMON.find(offset) {
            self.write_common(outside, at, data);
        } else if let Some(at) = NOTIFY.find(offset) {
            self.notify(outside, at / layout::NOTIFY_MULTIPLIER as usize);
        }
    }

    pub(crate) fn save<S>(&self, save: impl FnOnce(&D) -> S) -> VirtioPciState<S> {
        VirtioPciState {
            function: self.function.save(),
            window: (self.window.bar, self.window.offset, self.window.length),
            transport: TransportState {
                device_feature_select: self.device_feature_select,
                driver_feature_select: self.driver_feature_select,
                driver_features: self.driver_features,
                device_status: self.status,
                resetting: self.resetting,
                queue_select: self.queue_select,
                isr_status: self.isr,
                queues: self.queues.iter().map(Virtqueue::save).collect(),
            },
            device: save(&self.device),
        }
    }

    /// `restore` makes the device from its own state and the features of a running driver (else 0).
    pub(crate) fn restore<S>(
        slot: Slot,
        state: VirtioPciState<S>,
        restore: impl FnOnce(S, u64) -> Result<D, StateError>,
    ) -> Result<VirtioPci<D>, StateError> {
        let invalid = |field| StateError::Invalid {
            device: D::KIND.name,
            field,
        };
        let transport = state.transport;
        let started = transport.device_status & STATUS_DRIVER_OK != 0;
        let features = if started {
            transport.driver_features
        } else {
            0
        };
        let (bar, offset, length) = state.window;
        let mut device = VirtioPci {
            function: Function::restore(layout::identity(&D::KIND), &state.function),
            window: Window {
                bar,
                offset,
                length,
            },
            device_feature_select: transport.device_feature_select,
            driver_feature_select: transport.driver_feature_select,
            driver_features: transport.driver_features,
            status: transport.device_status,
            resetting: transport.resetting,
            queue_select: transport.queue_select,
            isr: transport.isr_status,
            ..VirtioPci::new(restore(state.device, features)?, slot)
        };
        let agreed = device.status & STATUS_FEATURES_OK != 0;
        if (started && !agreed) || (agreed && !device.features_acceptable()) {
            return Err(invalid("status or features"));
        }
        if device.resetting && (device.status != 0 || !device.device.busy()) {
            return Err(invalid("reset"));
        }
        if transport.queues.len() != device.queues.len() {
            return Err(invalid("number of queues"));
        }
        let event_idx = device.has(VIRTIO_RING_F_EVENT_IDX);
        for (queue, state) in device.queues.iter_mut().zip(&transport.queues) {
            if state.enabled && !agreed {
                return Err(invalid("queue"));
            }
            *queue = Virtqueue::restore(state, queue.max_size(), event_idx)?;
        }
        Ok(device)
    }
}

/// Copies what `source` has from `at` on.
fn copy_at(source: &[u8], at: usize, data: &mut [u8]) {
    for (to, from) in data.iter_mut().zip(source.iter().skip(at)) {
        *to = *from;
    }
}
