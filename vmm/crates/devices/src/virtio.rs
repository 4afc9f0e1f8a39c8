//! Virtio 1.2 devices over PCI: network, block, entropy.
//!
//! Rings and buffers are touched only inside an access or an input, on the caller's thread. Whatever the guest puts
//! there is validated: a malformed ring or chain stops the device (DEVICE_NEEDS_RESET) until the driver resets it; it
//! never panics, and work and memory stay within the named limits.

mod blk;
mod chain;
mod net;
mod queue;
mod rng;
mod state;
mod transport;

pub(crate) use blk::Blk;
pub(crate) use net::Net;
pub(crate) use rng::Rng;
pub use state::{
    BlkState, DeferredState, DiskRequestState, EntropyRequestState, NetState, OutstandingDiskState,
    QueueState, RngState, SegmentState, TransportState,
};
pub(crate) use transport::VirtioPci;

use queue::{QueueError, Virtqueue};

use crate::outbox::Outbox;
use crate::time::VirtualTime;

/// Bytes of a device's own configuration space.
const DEVICE_CONFIG_BYTES: usize = 64;

/// What a device works with during one call.
pub(crate) struct Context<'a, M> {
    ram: &'a M,
    queues: &'a mut [Virtqueue],
    outbox: &'a mut Outbox,
    now: VirtualTime,
    /// An interrupt of the device is asserted already, and its handler looks at all queues.
    interrupt_asserted: bool,
}

/// Whether the driver is to be interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Interrupt {
    No,
    Yes,
}

impl Interrupt {
    fn when(wanted: bool) -> Interrupt {
        if wanted {
            Interrupt::Yes
        } else {
            Interrupt::No
        }
    }
}

/// What tells one kind of device from another on the bus.
pub(crate) struct Kind {
    /// Device ID of virtio 1.2, section 5.
    virtio_id: u16,
    /// PCI class, subclass and programming interface.
    pci_class: u32,
    /// Largest size of each queue.
    queue_sizes: &'static [u16],
    /// For error messages.
    name: &'static str,
}

/// The part of a virtio device behind the transport. The transport calls `notify` only while the driver runs and the
/// queue is enabled; after an error or a reset the queues are no more to be touched for requests made before.
pub(crate) trait VirtioDevice {
    const KIND: Kind;

    /// Feature bits of this kind of device; the transport adds its own.
    fn offered_features(&self) -> u64;

    /// Whether a subset of the offered features makes sense.
    fn accepts_features(&self, _features: u64) -> bool {
        true
    }

    /// The device's configuration space. It never changes.
    fn config(&self) -> [u8; DEVICE_CONFIG_BYTES];

    /// The driver runs, with these features.
    fn start(&mut self, features: u64, outbox: &mut Outbox);

    /// The driver has put buffers into queue `index`.
    fn notify<M: vm_memory::GuestMemory>(
        &mut self,
        context: &mut Context<'_, M>,
        index: usize,
    ) -> Result<Interrupt, QueueError>;

    /// Forgets the driver and its buffers.
    fn reset(&mut self, outbox: &mut Outbox);

    /// Requests are on their way that a reset has to wait for.
    fn busy(&self) -> bool {
        false
    }
}
