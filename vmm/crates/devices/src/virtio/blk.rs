//! The block device (virtio 1.2, 5.2): one queue, sectors of 512 bytes.
//!
//! A request becomes an effect with a number; data to write is copied in the notification that brings it. The guest sees
//! its status when `DiskDone` comes, in whatever order. Requests with a content that makes no sense get an error status,
//! those with broken chains stop the device. Not offered: discard, write zeroes, multiple queues, read-only.

mod request;

use std::sync::Arc;

use request::{Header, Job, REQUEST_HEADER_BYTES, immediate};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::GuestMemory;

use super::chain::{self, Chain, Segment};
use super::queue::{QueueError, Virtqueue};
use super::state::{BlkState, OutstandingDiskState};
use super::{Context, DEVICE_CONFIG_BYTES, Interrupt, Kind, VirtioDevice};
use crate::StateError;
use crate::config::{DiskCache, DiskConfig};
use crate::effect::{DiskStatus, Effect, Rejected, RequestId, SECTOR_BYTES};
use crate::outbox::Outbox;

const QUEUE_SIZE: u16 = 128;
/// Segments of data in a request: what a chain has beside header and status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes of such a segment.
const SEGMENT_BYTES_MAX: u32 = 32 * 1024;
/// Bytes of data in one request: what the two limits above allow, so no driver that keeps them exceeds it.
pub(crate) const REQUEST_BYTES_MAX: u32 = SEGMENTS_MAX * SEGMENT_BYTES_MAX;
/// Bytes of data on their way, reads included. No further request is taken beyond it until one is done; one that is
/// taken may exceed it.
const OUTSTANDING_BYTES_MAX: u64 = 32 * 1024 * 1024;

/// A request on its way.
#[derive(Debug)]
struct Outstanding {
    id: RequestId,
    job: Job,
    /// Its chain's head; none when the driver has reset the device since.
    head: Option<u16>,
    writable: Vec<Segment>,
}

#[derive(Debug)]
pub(crate) struct Blk {
    config: DiskConfig,
    /// In the order of their numbers.
    outstanding: Vec<Outstanding>,
}

impl Blk {
    pub(crate) fn new(config: &DiskConfig) -> Blk {
        Blk {
            config: config.clone(),
            outstanding: Vec::new(),
        }
    }

    /// Whether another request may be taken.
    fn has_room(&self) -> bool {
        let bytes: u64 = self
            .outstanding
            .iter()
            .map(|request| request.job.bytes())
            .sum();
        self.outstanding.len() < usize::from(QUEUE_SIZE) && bytes < OUTSTANDING_BYTES_MAX
    }

    /// The effects of the requests on their way, to be done again by whoever takes over.
    pub(crate) fn outstanding(&self) -> impl Iterator<Item = Effect> {
        self.outstanding
            .iter()
            .map(|request| request.job.effect(request.id))
    }

    /// Takes requests from the queue while there is room.
    fn take_requests<M: GuestMemory>(
        &mut self,
        context: &mut Context<'_, M>,
    ) -> Result<(), QueueError> {
        let mut taken = 0;
        // Statuses written at once may lie in the ring of a hostile driver: the number taken is limited, too.
        while self.has_room() && taken < QUEUE_SIZE && !context.outbox.crowded() {
            let Some(chain) = context.queues[0].pop(context.ram)? else {
                break;
            };
            taken += 1;
            self.take_request(context, chain)?;
        }
        context.queues[0].ask_for_kick(context.ram)
    }

    fn take_request<M: GuestMemory>(
        &mut self,
        context: &mut Context<'_, M>,
        chain: Chain,
    ) -> Result<(), QueueError> {
        let ram = context.ram;
        let room = chain::total(&chain.writable)
            .checked_sub(1)
            .ok_or(QueueError::TooShort)?;
        let mut header = [0; REQUEST_HEADER_BYTES];
        chain::gather(ram, &chain.readable, 0, &mut header)?;
        let header = Header::decode(&header);
        let payload = chain::total(&chain.readable) - REQUEST_HEADER_BYTES as u64;
        let job = match header.job(&self.config, payload, room) {
            Ok(Job::Write { sector, .. }) => {
                let mut data = vec![0; payload as usize];
                chain::gather(ram, &chain.readable, REQUEST_HEADER_BYTES as u64, &mut data)?;
                Job::Write {
                    sector,
                    data: Arc::new(data),
                }
            }
            Ok(job) => job,
            Err(refusal) => {
                let (data, status) = immediate(&refusal, &self.config, room);
                return finish(
                    ram,
                    &mut context.queues[0],
                    chain.head,
                    &chain.writable,
                    &data,
                    status,
                );
            }
        };
        let id = context.outbox.next_id();
        context.outbox.push(job.effect(id));
        self.outstanding.push(Outstanding {
            id,
            job,
            head: Some(chain.head),
            writable: chain.writable,
        });
        Ok(())
    }

    /// Whether `DiskDone` answers a request, and with the right data.
    pub(crate) fn check_done(
        &self,
        id: RequestId,
        status: DiskStatus,
        data: &[u8],
    ) -> Result<(), Rejected> {
        let request = self.outstanding.iter().find(|request| request.id == id);
        let wanted = match (&request.ok_or(Rejected::UnknownRequest(id))?.job, status) {
            (Job::Read { len, .. }, DiskStatus::Ok) => *len,
            _ => 0,
        };
        if data.len() == wanted as usize {
            Ok(())
        } else {
            Err(Rejected::WrongLength {
                id,
                wanted,
                got: data.len(),
            })
        }
    }

    /// Ends a request that passed [`Blk::check_done`]. With `context`, the driver that made it still runs.
    pub(super) fn done<M: GuestMemory>(
        &mut self,
        context: Option<&mut Context<'_, M>>,
        id: RequestId,
        status: DiskStatus,
        data: &[u8],
    ) -> Result<Interrupt, QueueError> {
        let was_full = !self.has_room();
        let index = self.outstanding.iter().position(|request| request.id == id);
        let request = self
            .outstanding
            .remove(index.expect("check_done has found it"));
        let (Some(head), Some(context)) = (request.head, context) else {
            return Ok(Interrupt::No);
        };
        let ram = context.ram;
        let status = match status {
            DiskStatus::Ok => VIRTIO_BLK_S_OK,
            DiskStatus::MediumError => VIRTIO_BLK_S_IOERR,
        };
        let used_before = context.queues[0].next_used();
        finish(
            ram,
            &mut context.queues[0],
            head,
            &request.writable,
            data,
            status as u8,
        )?;
        if was_full {
            self.take_requests(context)?;
        }
        context.queues[0]
            .owes_interrupt(ram, used_before)
            .map(Interrupt::when)
    }

    pub(crate) fn save(&self) -> BlkState {
        let outstanding = self.outstanding.iter().map(|request| OutstandingDiskState {
            id: request.id,
            request: request.job.save(),
            head: request.head,
            writable: request
                .writable
                .iter()
                .map(|segment| segment.save())
                .collect(),
        });
        BlkState {
            outstanding: outstanding.collect(),
        }
    }

    pub(crate) fn restore(config: &DiskConfig, state: BlkState) -> Result<Blk, StateError> {
        let invalid = |field| StateError::Invalid {
            device: "blk",
            field,
        };
        if state.outstanding.len() > usize::from(QUEUE_SIZE) {
            return Err(invalid("number of outstanding requests"));
        }
        if !state.outstanding.is_sorted_by(|a, b| a.id < b.id) {
            return Err(invalid("order of outstanding requests"));
        }
        let restore_one = |request: OutstandingDiskState| -> Result<Outstanding, StateError> {
            let job =
                Job::restore(request.request, config).ok_or(invalid("outstanding request"))?;
            let writable: Vec<Segment> =
                request.writable.into_iter().map(Segment::restore).collect();
            Ok(Outstanding {
                id: request.id,
                job,
                head: request.head,
                writable,
            })
        };
        let outstanding = state.outstanding.into_iter().map(restore_one);
        Ok(Blk {
            config: config.clone(),
            outstanding: outstanding.collect::<Result<_, _>>()?,
        })
    }
}

/// Writes data and status, the last writable byte, and completes the chain.
fn finish<M: GuestMemory>(
    ram: &M,
    queue: &mut Virtqueue,
    head: u16,
    writable: &[Segment],
    data: &[u8],
    status: u8,
) -> Result<(), QueueError> {
    let status_at = chain::total(writable)
        .checked_sub(1)
        .ok_or(QueueError::TooShort)?;
    chain::scatter(ram, writable, 0, data)?;
    chain::scatter(ram, writable, status_at, &[status])?;
    queue.complete(ram, head, data.len() as u32 + 1)
}

impl VirtioDevice for Blk {
    const KIND: Kind = Kind {
        virtio_id: VIRTIO_ID_BLOCK as u16,
        pci_class: 0x01_80_00,
        queue_sizes: &[QUEUE_SIZE],
        name: "blk",
    };

    fn offered_features(&self) -> u64 {
        let flush = match self.config.cache {
            DiskCache::WriteThrough => 0,
            DiskCache::WriteBack => 1 << VIRTIO_BLK_F_FLUSH,
        };
        1 << VIRTIO_BLK_F_SIZE_MAX | 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | flush
    }

    fn config(&self) -> [u8; DEVICE_CONFIG_BYTES] {
        let mut config = [0; DEVICE_CONFIG_BYTES];
        config[..8].copy_from_slice(&self.config.sectors.to_le_bytes());
        config[8..12].copy_from_slice(&SEGMENT_BYTES_MAX.to_le_bytes());
        config[12..16].copy_from_slice(&SEGMENTS_MAX.to_le_bytes());
        config[20..24].copy_from_slice(&(SECTOR_BYTES as u32).to_le_bytes());
        config
    }

    fn start(&mut self, _features: u64, _outbox: &mut Outbox) {}

    fn notify<M: GuestMemory>(
        &mut self,
        context: &mut Context<'_, M>,
        _index: usize,
    ) -> Result<Interrupt, QueueError> {
        let used_before = context.queues[0].next_used();
        self.take_requests(context)?;
        context.queues[0]
            .owes_interrupt(context.ram, used_before)
            .map(Interrupt::when)
    }

    fn reset(&mut self, _outbox: &mut Outbox) {
        for request in &mut self.outstanding {
            request.head = None;
        }
    }

    fn busy(&self) -> bool {
        !self.outstanding.is_empty()
    }
}
