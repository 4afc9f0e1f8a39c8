//! What goes in and what comes out: inputs, effects, and the requests that join them.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::time::VirtualTime;

/// Bytes of a sector, the unit of disk addresses whatever the storage's own block size.
pub const SECTOR_BYTES: usize = 512;

/// Names a request to the outside. Assigned in the order of the requests, from 0, and never used again in the VM's
/// life, so it is the same on every replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RequestId(pub u64);

/// Something that an access or an input makes happen outside the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Send a frame: a 12-byte `virtio_net_hdr_v1` (virtio 1.2, 5.1.6) and the Ethernet frame. For the guest it is sent
    /// already.
    NetTx(Vec<u8>),
    /// The guest's driver now accepts frames with these offloads; the host side has to do what is not among them.
    NetOffloads(NetOffloads),
    /// Show a byte on the console.
    ConsoleTx(u8),
    /// Write `data`, a multiple of [`SECTOR_BYTES`], from `sector` on; answered by [`Input::DiskDone`].
    DiskWrite {
        /// The request to answer.
        id: RequestId,
        /// First sector.
        sector: u64,
        /// Shared with the board, which keeps it until the request is done.
        data: Arc<Vec<u8>>,
    },
    /// Read `len` bytes, a multiple of [`SECTOR_BYTES`], from `sector` on; answered by [`Input::DiskDone`].
    DiskRead {
        /// The request to answer.
        id: RequestId,
        /// First sector.
        sector: u64,
        /// Bytes.
        len: u32,
    },
    /// Make all writes durable that were done before; answered by [`Input::DiskDone`].
    DiskFlush {
        /// The request to answer.
        id: RequestId,
    },
    /// Supply 1 to `len` random bytes; answered by [`Input::Entropy`].
    EntropyWanted {
        /// The request to answer.
        id: RequestId,
        /// Bytes.
        len: u32,
    },
    /// The guest has switched the machine off.
    PowerOff,
    /// The guest has reset the machine.
    Reset,
}

impl Effect {
    /// The request that an input will answer.
    pub fn request(&self) -> Option<RequestId> {
        match self {
            Effect::DiskWrite { id, .. }
            | Effect::DiskRead { id, .. }
            | Effect::DiskFlush { id }
            | Effect::EntropyWanted { id, .. } => Some(*id),
            _ => None,
        }
    }
}

/// Offloads that the guest's network driver accepts on frames that it receives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetOffloads {
    /// Partial checksums (TUN_F_CSUM).
    pub checksum: bool,
    /// TCP segments over IPv4 larger than the MTU (TUN_F_TSO4).
    pub tso4: bool,
    /// TCP segments over IPv6 larger than the MTU (TUN_F_TSO6).
    pub tso6: bool,
    /// TCP segments with ECN bits (TUN_F_TSO_ECN).
    pub ecn: bool,
}

/// Something that comes from outside the machine. Every one is recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Virtual time goes on to this moment; timers due by then fire.
    Time(VirtualTime),
    /// Answers [`Effect::EntropyWanted`].
    Entropy {
        /// Which request.
        id: RequestId,
        /// 1 byte to as many as were wanted.
        data: Vec<u8>,
    },
    /// A frame arrives: a 12-byte `virtio_net_hdr_v1` (its `num_buffers` does not matter) and the Ethernet frame.
    NetRx(Vec<u8>),
    /// Keys arrive at the console, at most [`Board::console_rx_room`](crate::Board::console_rx_room) of them.
    ConsoleRx(Vec<u8>),
    /// Answers [`Effect::DiskWrite`], [`Effect::DiskRead`] or [`Effect::DiskFlush`].
    DiskDone {
        /// Which request.
        id: RequestId,
        /// How it went.
        status: DiskStatus,
        /// All the bytes of a read that went well; else nothing.
        data: Vec<u8>,
    },
}

/// How a disk request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DiskStatus {
    /// Done.
    Ok,
    /// The medium failed: the guest sees an I/O error.
    MediumError,
}

/// An input that the board did not take. Nothing has changed; a replica that is given the same answers the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    /// Virtual time cannot go back.
    #[error("virtual time {to:?} is before {now:?}")]
    TimeBackwards {
        /// The board's time.
        now: VirtualTime,
        /// The time offered.
        to: VirtualTime,
    },
    /// No such request is outstanding, or one of another kind: the guest may have reset the device meanwhile.
    #[error("no such request is outstanding: {0:?}")]
    UnknownRequest(RequestId),
    /// The data has not the length that the request calls for.
    #[error("request {id:?} calls for {wanted} bytes, not {got}")]
    WrongLength {
        /// Which request.
        id: RequestId,
        /// Bytes it calls for (entropy: at most).
        wanted: u32,
        /// Bytes offered.
        got: usize,
    },
    /// There is no such device, or its driver does not run.
    #[error("the device is not there or its driver does not run")]
    NotRunning,
    /// The guest has no room for it now.
    #[error("the guest has no room for it now")]
    NoRoom,
    /// The frame is too short, too long, or needs offloads that the guest does not accept.
    #[error("the guest cannot accept such a frame")]
    BadFrame,
}
