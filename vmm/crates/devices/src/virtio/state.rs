//! Saved state of the virtio devices.

use serde::{Deserialize, Serialize};

use crate::effect::RequestId;
use crate::time::VirtualTime;

/// What every virtio device has: common configuration, interrupt status, queues (virtio 1.2, 4.1.4.3).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are the specification's")]
pub struct TransportState {
    pub device_feature_select: u32,
    pub driver_feature_select: u32,
    pub driver_features: u64,
    pub device_status: u8,
    /// A reset waits for requests on their way.
    pub resetting: bool,
    pub queue_select: u16,
    pub isr_status: u8,
    pub queues: Vec<QueueState>,
}

/// One virtqueue. Its EVENT_IDX fields lie in guest memory; whether they count is in the features.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Descriptors, by the driver's choice.
    pub size: u16,
    /// In use.
    pub enabled: bool,
    /// Guest physical address of the descriptor table.
    pub desc: u64,
    /// Guest physical address of the available ring.
    pub driver: u64,
    /// Guest physical address of the used ring.
    pub device: u64,
    /// The next entry of the available ring to take.
    pub next_avail: u16,
    /// The next entry of the used ring to fill.
    pub next_used: u16,
}

/// A piece of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentState {
    /// Guest physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
}

/// The network device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// The interrupt for sent frames that is held back.
    pub tx_interrupt: Option<DeferredState>,
    /// Frames from the guest that were malformed and dropped.
    pub tx_dropped: u64,
}

/// An interrupt held back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeferredState {
    /// Used index before the first chain that it is for.
    pub since: u16,
    /// When it is raised at the latest.
    pub until: VirtualTime,
}

/// The block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkState {
    /// Requests on their way, in the order of their numbers.
    pub outstanding: Vec<OutstandingDiskState>,
}

/// A disk request on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutstandingDiskState {
    /// Its number.
    pub id: RequestId,
    /// What is asked for.
    pub request: DiskRequestState,
    /// Head of its descriptor chain; none when the driver has reset the device since.
    pub head: Option<u16>,
    /// Where data and status go.
    pub writable: Vec<SegmentState>,
}

/// What a disk request asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "as in Effect")]
pub enum DiskRequestState {
    Read { sector: u64, len: u32 },
    Write { sector: u64, data: Vec<u8> },
    Flush,
}

/// The entropy device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {
    /// Requests on their way, in the order of their numbers.
    pub outstanding: Vec<EntropyRequestState>,
}

/// A request for entropy on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntropyRequestState {
    /// Its number.
    pub id: RequestId,
    /// Bytes wanted.
    pub len: u32,
    /// Head of its descriptor chain.
    pub head: u16,
    /// Where the bytes go.
    pub writable: Vec<SegmentState>,
}
