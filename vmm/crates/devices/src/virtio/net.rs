//! The network device (virtio 1.2, 5.1): one queue to receive, one to transmit, no control queue.
//!
//! A frame to transmit is copied and completed within the notification. Its interrupt only lets the driver free memory,
//! and costs half a dozen exits, so it is held back: it goes with the next received frame, or when much has been sent at
//! once, or after [`TX_INTERRUPT_DELAY_NS`]; the driver may have freed the memory by itself until then. Received frames
//! interrupt at once where the driver wants it.

mod header;

use header::{HEADER_BYTES, Header};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use vm_memory::GuestMemory;

use super::chain::{self, Chain};
use super::queue::{QueueError, Virtqueue};
use super::state::{DeferredState, NetState};
use super::{Context, DEVICE_CONFIG_BYTES, Interrupt, Kind, VirtioDevice};
use crate::config::NetConfig;
use crate::effect::{Effect, NetOffloads, Rejected};
use crate::outbox::Outbox;
use crate::time::VirtualTime;

const RX: usize = 0;
const TX: usize = 1;

const ETHERNET_HEADER_BYTES: usize = 14;
/// Shortest frame with its header.
const FRAME_BYTES_MIN: usize = HEADER_BYTES + ETHERNET_HEADER_BYTES;
/// Longest frame with its header: 64 KiB of segments to be, an Ethernet header and a VLAN tag.
pub(crate) const FRAME_BYTES_MAX: usize = HEADER_BYTES + ETHERNET_HEADER_BYTES + 4 + 65_536;
/// Longest frame with its header for a driver without segmentation offload: an MTU of 1500.
const FRAME_BYTES_MAX_UNSEGMENTED: usize = HEADER_BYTES + ETHERNET_HEADER_BYTES + 4 + 1500;

/// How long an interrupt for sent frames may be held back.
const TX_INTERRUPT_DELAY_NS: u64 = 4_000_000;
/// Frames sent in one notification that are not held back any longer, as a share of the queue: the driver may have
/// filled the queue and wait.
const TX_BURST_SHARE: u16 = 4;
/// Completions that a held-back interrupt may stand for. Half of what indices can tell apart.
const TX_DEFERRED_MAX: u16 = 0x4000;

/// A held-back interrupt.
#[derive(Clone, Copy, Debug)]
struct Deferred {
    since: u16,
    until: VirtualTime,
}

#[derive(Debug)]
pub(crate) struct Net {
    mac: [u8; 6],
    offloads: bool,
    /// Negotiated features while the driver runs, else 0.
    features: u64,
    tx_interrupt: Option<Deferred>,
    tx_dropped: u64,
}

impl Net {
    pub(crate) fn new(config: &NetConfig) -> Net {
        Net {
            mac: config.mac,
            offloads: config.offloads,
            features: 0,
            tx_interrupt: None,
            tx_dropped: 0,
        }
    }

    fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// Offloads that the driver accepts on receiving.
    pub(crate) fn rx_offloads(&self) -> NetOffloads {
        NetOffloads {
            checksum: self.has(VIRTIO_NET_F_GUEST_CSUM),
            tso4: self.has(VIRTIO_NET_F_GUEST_TSO4),
            tso6: self.has(VIRTIO_NET_F_GUEST_TSO6),
            ecn: self.has(VIRTIO_NET_F_GUEST_ECN),
        }
    }

    /// Offloads that the driver may ask for on transmitting.
    fn tx_offloads(&self) -> NetOffloads {
        NetOffloads {
            checksum: self.has(VIRTIO_NET_F_CSUM),
            tso4: self.has(VIRTIO_NET_F_HOST_TSO4),
            tso6: self.has(VIRTIO_NET_F_HOST_TSO6),
            ecn: self.has(VIRTIO_NET_F_HOST_ECN),
        }
    }

    fn rx_frame_bytes_max(&self) -> usize {
        let offloads = self.rx_offloads();
        if offloads.tso4 || offloads.tso6 {
            FRAME_BYTES_MAX
        } else {
            FRAME_BYTES_MAX_UNSEGMENTED
        }
    }

    /// Frames from the guest dropped as malformed.
    pub(crate) fn tx_dropped(&self) -> u64 {
        self.tx_dropped
    }

    /// Whether the longest frame that may come has room in the driver's buffers.
    pub(super) fn has_rx_room<M: GuestMemory>(
        &self,
        ram: &M,
        queues: &[Virtqueue],
    ) -> Result<bool, QueueError> {
        if !queues[RX].enabled() {
            return Ok(false);
        }
        let mut ahead = queues[RX].preview();
        Ok(self
            .take_rx_buffers(ram, &mut ahead, self.rx_frame_bytes_max())?
            .is_some())
    }

    /// Takes buffers for `bytes`, or `None` and takes none when there are not enough. Without mergeable buffers one
    /// buffer is what there is for a frame, whatever its size.
    fn take_rx_buffers<M: GuestMemory>(
        &self,
        ram: &M,
        queue: &mut Virtqueue,
        bytes: usize,
    ) -> Result<Option<Vec<Chain>>, QueueError> {
        let mut room = 0;
        let mut taken = Vec::new();
        while room < bytes as u64 {
            let Some(buffer) = queue.pop(ram)? else {
                queue.undo_pops(taken.len() as u16);
                return Ok(None);
            };
            let buffer_bytes = chain::total(&buffer.writable);
            if buffer_bytes < HEADER_BYTES as u64 {
                return Err(QueueError::TooShort);
            }
            room += buffer_bytes;
            taken.push(buffer);
            if !self.has(VIRTIO_NET_F_MRG_RXBUF) {
                break;
            }
        }
        Ok(Some(taken))
    }

    /// Puts a frame into the driver's buffers.
    pub(super) fn receive<M: GuestMemory>(
        &mut self,
        context: &mut Context<'_, M>,
        frame: &[u8],
    ) -> Result<Result<Interrupt, Rejected>, QueueError> {
        let Some((header, payload)) = Header::split(frame) else {
            return Ok(Err(Rejected::BadFrame));
        };
        let fits = (FRAME_BYTES_MIN..=self.rx_frame_bytes_max()).contains(&frame.len());
        if !fits || !header.needs_only(self.rx_offloads()) {
            return Ok(Err(Rejected::BadFrame));
        }
        let ram = context.ram;
        let queue = &mut context.queues[RX];
        if !queue.enabled() {
            return Ok(Err(Rejected::NoRoom));
        }
        let Some(buffers) = self.take_rx_buffers(ram, queue, frame.len())? else {
            return Ok(Err(Rejected::NoRoom));
        };
        let room: u64 = buffers
            .iter()
            .map(|buffer| chain::total(&buffer.writable))
            .sum();
        if room < frame.len() as u64 {
            queue.undo_pops(buffers.len() as u16);
            return Ok(Err(Rejected::BadFrame));
        }
        let used_before = queue.next_used();
        let header = header.received(buffers.len() as u16, self.rx_offloads());
        fill_rx_buffers(ram, queue, &buffers, &header, payload)?;
        let interrupt = queue.owes_interrupt(ram, used_before)?;
        self.mind_rx_kicks(ram, context.queues)?;
        if interrupt {
            self.tx_interrupt = None;
        }
        Ok(Ok(Interrupt::when(interrupt)))
    }

    /// The driver need not tell of new buffers while there is room for a frame.
    fn mind_rx_kicks<M: GuestMemory>(
        &self,
        ram: &M,
        queues: &[Virtqueue],
    ) -> Result<(), QueueError> {
        if self.has_rx_room(ram, queues)? {
            queues[RX].spare_kicks(ram)
        } else {
            queues[RX].ask_for_kick(ram)
        }
    }

    fn transmit<M: GuestMemory>(
        &mut self,
        context: &mut Context<'_, M>,
    ) -> Result<Interrupt, QueueError> {
        let ram = context.ram;
        let queue = &mut context.queues[TX];
        let used_before = queue.next_used();
        let mut sent = 0;
        // Nothing fills the ring meanwhile, but a hostile driver may have let buffers overlap it.
        while sent < queue.size() && !context.outbox.crowded() {
            let Some(buffer) = queue.pop(ram)? else { break };
            sent += 1;
            match self.take_frame(ram, &buffer)? {
                Some(frame) => context.outbox.push(Effect::NetTx(frame)),
                None => self.tx_dropped = self.tx_dropped.saturating_add(1),
            }
            queue.complete(ram, buffer.head, 0)?;
        }
        queue.ask_for_kick(ram)?;
        if !queue.owes_interrupt(ram, used_before)? {
            return Ok(Interrupt::No);
        }
        if sent >= queue.size() / TX_BURST_SHARE || context.interrupt_asserted {
            self.tx_interrupt = None;
            return Ok(Interrupt::Yes);
        }
        let until = context.now.plus_ns(TX_INTERRUPT_DELAY_NS);
        let held = self.tx_interrupt.get_or_insert(Deferred {
            since: used_before,
            until,
        });
        if context.queues[TX].next_used().wrapping_sub(held.since) < TX_DEFERRED_MAX {
            return Ok(Interrupt::No);
        }
        self.tx_interrupt = None;
        Ok(Interrupt::Yes)
    }

    /// Copies a frame out; `None` when it is malformed.
    fn take_frame<M: GuestMemory>(
        &self,
        ram: &M,
        buffer: &Chain,
    ) -> Result<Option<Vec<u8>>, QueueError> {
        let bytes = chain::total(&buffer.readable);
        if !(FRAME_BYTES_MIN as u64..=FRAME_BYTES_MAX as u64).contains(&bytes) {
            return Ok(None);
        }
        let mut frame = vec![0; bytes as usize];
        chain::gather(ram, &buffer.readable, 0, &mut frame)?;
        let acceptable =
            Header::split(&frame).is_some_and(|(header, _)| header.needs_only(self.tx_offloads()));
        Ok(acceptable.then_some(frame))
    }

    /// When an interrupt held back is due.
    pub(crate) fn next_timer(&self) -> Option<VirtualTime> {
        self.tx_interrupt.map(|held| held.until)
    }

    /// Virtual time has gone on.
    pub(super) fn advance<M: GuestMemory>(
        &mut self,
        context: &mut Context<'_, M>,
    ) -> Result<Interrupt, QueueError> {
        match self.tx_interrupt {
            Some(held) if held.until <= context.now => {
                self.tx_interrupt = None;
                // Not if the driver has moved on by itself.
                context.queues[TX]
                    .owes_interrupt(context.ram, held.since)
                    .map(Interrupt::when)
            }
            _ => Ok(Interrupt::No),
        }
    }

    pub(crate) fn save(&self) -> NetState {
        let tx_interrupt = self.tx_interrupt.map(|held| DeferredState {
            since: held.since,
            until: held.until,
        });
        NetState {
            tx_interrupt,
            tx_dropped: self.tx_dropped,
        }
    }

    /// `features`: negotiated, if the driver runs, else 0.
    pub(crate) fn restore(config: &NetConfig, features: u64, state: &NetState) -> Net {
        let tx_interrupt = state.tx_interrupt.map(|held| Deferred {
            since: held.since,
            until: held.until,
        });
        Net {
            features,
            tx_interrupt,
            tx_dropped: state.tx_dropped,
            ..Net::new(config)
        }
    }
}

/// Spreads a frame over `buffers`, which have room for it, and completes them.
fn fill_rx_buffers<M: GuestMemory>(
    ram: &M,
    queue: &mut Virtqueue,
    buffers: &[Chain],
    header: &[u8; HEADER_BYTES],
    mut payload: &[u8],
) -> Result<(), QueueError> {
    for (index, buffer) in buffers.iter().enumerate() {
        let header: &[u8] = if index == 0 { header } else { &[] };
        let room = chain::total(&buffer.writable) - header.len() as u64;
        let (piece, rest) = payload.split_at(payload.len().min(room as usize));
        payload = rest;
        chain::scatter(ram, &buffer.writable, 0, header)?;
        chain::scatter(ram, &buffer.writable, header.len() as u64, piece)?;
        queue.complete(ram, buffer.head, (header.len() + piece.len()) as u32)?;
    }
    Ok(())
}

const fn bits<const N: usize>(features: [u32; N]) -> u64 {
    let mut set = 0;
    let mut index = 0;
    while index < N {
        set |= 1 << features[index];
        index += 1;
    }
    set
}

const FEATURES: u64 = bits([
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_F_MRG_RXBUF,
]);
const OFFLOAD_FEATURES: u64 = bits([
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
]);

/// Virtio 1.2, 5.1.3.1: a feature of the first set needs the second's.
const REQUIREMENTS: [(u64, u64); 6] = [
    (
        bits([VIRTIO_NET_F_GUEST_TSO4]),
        bits([VIRTIO_NET_F_GUEST_CSUM]),
    ),
    (
        bits([VIRTIO_NET_F_GUEST_TSO6]),
        bits([VIRTIO_NET_F_GUEST_CSUM]),
    ),
    (bits([VIRTIO_NET_F_HOST_TSO4]), bits([VIRTIO_NET_F_CSUM])),
    (bits([VIRTIO_NET_F_HOST_TSO6]), bits([VIRTIO_NET_F_CSUM])),
    // One of the two is enough for these.
    (
        bits([VIRTIO_NET_F_GUEST_ECN]),
        bits([VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6]),
    ),
    (
        bits([VIRTIO_NET_F_HOST_ECN]),
        bits([VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6]),
    ),
];

impl VirtioDevice for Net {
    const KIND: Kind = Kind {
        virtio_id: VIRTIO_ID_NET as u16,
        pci_class: 0x02_00_00,
        queue_sizes: &[256, 256],
        name: "net",
    };

    fn offered_features(&self) -> u64 {
        FEATURES | if self.offloads { OFFLOAD_FEATURES } else { 0 }
    }

    fn accepts_features(&self, features: u64) -> bool {
        debug_assert!(features & 1 << VIRTIO_F_VERSION_1 != 0);
        REQUIREMENTS
            .iter()
            .all(|(feature, any_of)| features & feature == 0 || features & any_of != 0)
    }

    fn config(&self) -> [u8; DEVICE_CONFIG_BYTES] {
        let mut config = [0; DEVICE_CONFIG_BYTES];
        config[..6].copy_from_slice(&self.mac);
        config[6..8].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        config
    }

    fn start(&mut self, features: u64, outbox: &mut Outbox) {
        self.features = features;
        outbox.push(Effect::NetOffloads(self.rx_offloads()));
    }

    fn notify<M: GuestMemory>(
        &mut self,
        context: &mut Context<'_, M>,
        index: usize,
    ) -> Result<Interrupt, QueueError> {
        if index == TX {
            return self.transmit(context);
        }
        self.mind_rx_kicks(context.ram, context.queues)?;
        Ok(Interrupt::No)
    }

    fn reset(&mut self, outbox: &mut Outbox) {
        if self.features != 0 {
            self.features = 0;
            outbox.push(Effect::NetOffloads(NetOffloads::default()));
        }
        self.tx_interrupt = None;
    }
}
