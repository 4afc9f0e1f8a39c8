//! The entropy device (virtio 1.2, 5.4): one queue of buffers to fill.
//!
//! Where the bytes come from is the outside's affair; it may supply fewer than wanted. A reset forgets the requests on
//! their way: answers to them are refused.

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::GuestMemory;

use super::chain::{self, Segment};
use super::queue::QueueError;
use super::state::{EntropyRequestState, RngState};
use super::{Context, DEVICE_CONFIG_BYTES, Interrupt, Kind, VirtioDevice};
use crate::StateError;
use crate::effect::{Effect, Rejected, RequestId};
use crate::outbox::Outbox;

const QUEUE_SIZE: u16 = 8;
/// Bytes asked for at once, however large the driver's buffer is.
const REQUEST_BYTES_MAX: u32 = 1024;

#[derive(Debug)]
struct Outstanding {
    id: RequestId,
    len: u32,
    head: u16,
    writable: Vec<Segment>,
}

#[derive(Debug, Default)]
pub(crate) struct Rng {
    /// In the order of their numbers.
    outstanding: Vec<Outstanding>,
}

impl Rng {
    /// The effects of the requests on their way, to be done again by whoever takes over.
    pub(crate) fn outstanding(&self) -> impl Iterator<Item = Effect> {
        self.outstanding
            .iter()
            .map(|request| Effect::EntropyWanted {
                id: request.id,
                len: request.len,
            })
    }

    fn take_requests<M: GuestMemory>(
        &mut self,
        context: &mut Context<'_, M>,
    ) -> Result<(), QueueError> {
        while self.outstanding.len() < usize::from(QUEUE_SIZE) {
            let Some(chain) = context.queues[0].pop(context.ram)? else {
                break;
            };
            let room = chain::total(&chain.writable).min(u64::from(REQUEST_BYTES_MAX)) as u32;
            if room == 0 {
                return Err(QueueError::TooShort);
            }
            let id = context.outbox.next_id();
            context.outbox.push(Effect::EntropyWanted { id, len: room });
            let request = Outstanding {
                id,
                len: room,
                head: chain.head,
                writable: chain.writable,
            };
            self.outstanding.push(request);
        }
        context.queues[0].ask_for_kick(context.ram)
    }

    /// Whether `Entropy` answers a request, and with a possible number of bytes.
    pub(crate) fn check_done(&self, id: RequestId, data: &[u8]) -> Result<(), Rejected> {
        let request = self.outstanding.iter().find(|request| request.id == id);
        let wanted = request.ok_or(Rejected::UnknownRequest(id))?.len;
        if (1..=wanted as usize).contains(&data.len()) {
            Ok(())
        } else {
            Err(Rejected::WrongLength {
                id,
                wanted,
                got: data.len(),
            })
        }
    }

    /// Ends a request that passed [`Rng::check_done`]. With `context`, the driver that made it still runs.
    pub(super) fn done<M: GuestMemory>(
        &mut self,
        context: Option<&mut Context<'_, M>>,
        id: RequestId,
        data: &[u8],
    ) -> Result<Interrupt, QueueError> {
        let index = self.outstanding.iter().position(|request| request.id == id);
        let request = self
            .outstanding
            .remove(index.expect("check_done has found it"));
        let Some(context) = context else {
            return Ok(Interrupt::No);
        };
        let ram = context.ram;
        let used_before = context.queues[0].next_used();
        chain::scatter(ram, &request.writable, 0, data)?;
        context.queues[0].complete(ram, request.head, data.len() as u32)?;
        // There may have been more than fitted.
        self.take_requests(context)?;
        context.queues[0]
            .owes_interrupt(ram, used_before)
            .map(Interrupt::when)
    }

    pub(crate) fn save(&self) -> RngState {
        let outstanding = self.outstanding.iter().map(|request| EntropyRequestState {
            id: request.id,
            len: request.len,
            head: request.head,
            writable: request
                .writable
                .iter()
                .map(|segment| segment.save())
                .collect(),
        });
        RngState {
            outstanding: outstanding.collect(),
        }
    }

    pub(crate) fn restore(state: RngState) -> Result<Rng, StateError> {
        let invalid = |field| StateError::Invalid {
            device: "rng",
            field,
        };
        if state.outstanding.len() > usize::from(QUEUE_SIZE) {
            return Err(invalid("number of outstanding requests"));
        }
        if !state.outstanding.is_sorted_by(|a, b| a.id < b.id) {
            return Err(invalid("order of outstanding requests"));
        }
        if state
            .outstanding
            .iter()
            .any(|request| !(1..=REQUEST_BYTES_MAX).contains(&request.len))
        {
            return Err(invalid("length of an outstanding request"));
        }
        let restore_one = |request: EntropyRequestState| Outstanding {
            id: request.id,
            len: request.len,
            head: request.head,
            writable: request.writable.into_iter().map(Segment::restore).collect(),
        };
        Ok(Rng {
            outstanding: state.outstanding.into_iter().map(restore_one).collect(),
        })
    }
}

impl VirtioDevice for Rng {
    const KIND: Kind = Kind {
        virtio_id: VIRTIO_ID_RNG as u16,
        pci_class: 0xff_00_00,
        queue_sizes: &[QUEUE_SIZE],
        name: "rng",
    };

    fn offered_features(&self) -> u64 {
        0
    }

    fn config(&self) -> [u8; DEVICE_CONFIG_BYTES] {
        [0; DEVICE_CONFIG_BYTES]
    }

    fn start(&mut self, _features: u64, _outbox: &mut Outbox) {}

    fn notify<M: GuestMemory>(
        &mut self,
        context: &mut Context<'_, M>,
        _index: usize,
    ) -> Result<Interrupt, QueueError> {
        self.take_requests(context)?;
        Ok(Interrupt::No)
    }

    fn reset(&mut self, _outbox: &mut Outbox) {
        self.outstanding.clear();
    }
}
