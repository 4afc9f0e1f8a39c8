//! What a block request asks for (virtio 1.2, 5.2.6), checked against the disk.

use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};

use super::REQUEST_BYTES_MAX;
use crate::config::{DISK_IDENTITY_BYTES, DiskCache, DiskConfig};
use crate::effect::{Effect, RequestId, SECTOR_BYTES};
use crate::virtio::state::DiskRequestState;

/// type, reserved, sector.
pub(super) const REQUEST_HEADER_BYTES: usize = 16;

/// The fixed part of a request.
#[derive(Clone, Copy)]
pub(super) struct Header {
    kind: u32,
    sector: u64,
}

/// What the storage has to do.
#[derive(Clone, Debug)]
pub(super) enum Job {
    Read { sector: u64, len: u32 },
    Write { sector: u64, data: Arc<Vec<u8>> },
    Flush,
}

/// A request that never reaches the storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Answered from the configuration.
    Identity,
    /// Outside the disk, of an impossible length or too long.
    Impossible,
    /// Of a type that is not offered.
    Unsupported,
}

impl Header {
    pub(super) fn decode(bytes: &[u8; REQUEST_HEADER_BYTES]) -> Header {
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = *bytes;
        Header {
            kind: u32::from_le_bytes([k0, k1, k2, k3]),
            sector: u64::from_le_bytes(sector),
        }
    }

    /// The job of a request with `payload` bytes behind the header and `room` bytes before the status. A write comes
    /// without its data.
    pub(super) fn job(self, disk: &DiskConfig, payload: u64, room: u64) -> Result<Job, Refusal> {
        match self.kind {
            VIRTIO_BLK_T_IN => {
                let len = self.check_span(disk, room)?;
                Ok(Job::Read {
                    sector: self.sector,
                    len,
                })
            }
            VIRTIO_BLK_T_OUT => {
                self.check_span(disk, payload)?;
                Ok(Job::Write {
                    sector: self.sector,
                    data: Arc::default(),
                })
            }
            VIRTIO_BLK_T_FLUSH if disk.cache == DiskCache::WriteBack => Ok(Job::Flush),
            VIRTIO_BLK_T_GET_ID => Err(Refusal::Identity),
            _ => Err(Refusal::Unsupported),
        }
    }

    fn check_span(self, disk: &DiskConfig, bytes: u64) -> Result<u32, Refusal> {
        check_span(disk, self.sector, bytes).ok_or(Refusal::Impossible)
    }
}

/// `bytes`, if so many from `sector` on are whole sectors of the disk and not too many for a request.
fn check_span(disk: &DiskConfig, sector: u64, bytes: u64) -> Option<u32> {
    let len = u32::try_from(bytes)
        .ok()
        .filter(|len| (1..=REQUEST_BYTES_MAX).contains(len))?;
    let whole = bytes.is_multiple_of(SECTOR_BYTES as u64);
    let end = sector.checked_add(bytes / SECTOR_BYTES as u64)?;
    (whole && end <= disk.sectors).then_some(len)
}

/// Data and status that answer a refused request, given room for data.
pub(super) fn immediate(refusal: &Refusal, disk: &DiskConfig, room: u64) -> (Vec<u8>, u8) {
    match refusal {
        Refusal::Identity => {
            let mut identity = disk.identity.clone().into_bytes();
            identity.resize(DISK_IDENTITY_BYTES, 0);
            identity.truncate(room.min(DISK_IDENTITY_BYTES as u64) as usize);
            (identity, VIRTIO_BLK_S_OK as u8)
        }
        Refusal::Impossible => (Vec::new(), VIRTIO_BLK_S_IOERR as u8),
        Refusal::Unsupported => (Vec::new(), VIRTIO_BLK_S_UNSUPP as u8),
    }
}

impl Job {
    /// Bytes of data that it moves.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Job::Read { len, .. } => u64::from(*len),
            Job::Write { data, .. } => data.len() as u64,
            Job::Flush => 0,
        }
    }

    pub(super) fn effect(&self, id: RequestId) -> Effect {
        match self {
            Job::Read { sector, len } => Effect::DiskRead {
                id,
                sector: *sector,
                len: *len,
            },
            Job::Write { sector, data } => Effect::DiskWrite {
                id,
                sector: *sector,
                data: Arc::clone(data),
            },
            Job::Flush => Effect::DiskFlush { id },
        }
    }

    pub(super) fn save(&self) -> DiskRequestState {
        match self {
            Job::Read { sector, len } => DiskRequestState::Read {
                sector: *sector,
                len: *len,
            },
            Job::Write { sector, data } => DiskRequestState::Write {
                sector: *sector,
                data: data.to_vec(),
            },
            Job::Flush => DiskRequestState::Flush,
        }
    }

    /// `None` when no guest can have asked for it.
    pub(super) fn restore(state: DiskRequestState, disk: &DiskConfig) -> Option<Job> {
        match state {
            DiskRequestState::Read { sector, len } => {
                check_span(disk, sector, u64::from(len))?;
                Some(Job::Read { sector, len })
            }
            DiskRequestState::Write { sector, data } => {
                check_span(disk, sector, data.len() as u64)?;
                Some(Job::Write {
                    sector,
                    data: Arc::new(data),
                })
            }
            DiskRequestState::Flush => Some(Job::Flush),
        }
    }
}
