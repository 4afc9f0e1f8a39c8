//! Descriptor chains as two lists of segments, and the copying between them and our own memory.
//!
//! A chain handed on is whole and its segments lie in guest memory: loops, dangling or nested tables, segments outside
//! RAM and readable segments behind writable ones are errors when the chain is read.

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use super::queue::QueueError;
use super::state::SegmentState;

/// A piece of guest memory. It lay in RAM when its chain was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    addr: GuestAddress,
    len: u32,
}

impl Segment {
    pub(super) fn save(self) -> SegmentState {
        SegmentState {
            addr: self.addr.0,
            len: self.len,
        }
    }

    pub(super) fn restore(state: SegmentState) -> Segment {
        Segment {
            addr: GuestAddress(state.addr),
            len: state.len,
        }
    }
}

/// A chain of buffers that the driver has made available.
#[derive(Debug)]
pub(super) struct Chain {
    /// Its name in the used ring.
    pub(super) head: u16,
    /// For the device to read.
    pub(super) readable: Vec<Segment>,
    /// For the device to write.
    pub(super) writable: Vec<Segment>,
}

impl Chain {
    /// Reads a chain of at most `limit` descriptors.
    pub(super) fn read<M: GuestMemory>(
        descriptors: DescriptorChain<&M>,
        limit: u16,
    ) -> Result<Chain, QueueError> {
        let ram = descriptors.memory();
        let mut chain = Chain {
            head: descriptors.head_index(),
            readable: Vec::new(),
            writable: Vec::new(),
        };
        // The iterator ends early where a chain is broken; only its last descriptor has no successor.
        let mut complete = false;
        let mut count = 0;
        for descriptor in descriptors.clone() {
            count += 1;
            if count > limit {
                return Err(QueueError::ChainTooLong);
            }
            complete = !descriptor.has_next();
            let segment = Segment {
                addr: descriptor.addr(),
                len: descriptor.len(),
            };
            let (list, access) = if descriptor.is_write_only() {
                (&mut chain.writable, Permissions::Write)
            } else if chain.writable.is_empty() {
                (&mut chain.readable, Permissions::Read)
            } else {
                return Err(QueueError::ReadableAfterWritable);
            };
            if segment.len == 0 {
                continue;
            }
            if !ram.check_range(segment.addr, segment.len as usize, access) {
                return Err(QueueError::OutsideRam(segment.addr.0));
            }
            list.push(segment);
        }
        if complete {
            Ok(chain)
        } else {
            Err(QueueError::BrokenChain)
        }
    }
}

/// Bytes in all segments. A chain has less than 2^32.
pub(super) fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.len)).sum()
}

/// Copies from the segments, `skip` bytes from their start, until `buffer` is full.
pub(super) fn gather<M: GuestMemory>(
    ram: &M,
    segments: &[Segment],
    skip: u64,
    mut buffer: &mut [u8],
) -> Result<(), QueueError> {
    for (addr, len) in pieces(segments, skip) {
        let (piece, rest) = buffer.split_at_mut(buffer.len().min(len));
        ram.read_slice(piece, addr)?;
        buffer = rest;
        if buffer.is_empty() {
            break;
        }
    }
    if buffer.is_empty() {
        Ok(())
    } else {
        Err(QueueError::TooShort)
    }
}

/// Copies `data` into the segments, `skip` bytes from their start.
pub(super) fn scatter<M: GuestMemory>(
    ram: &M,
    segments: &[Segment],
    skip: u64,
    mut data: &[u8],
) -> Result<(), QueueError> {
    for (addr, len) in pieces(segments, skip) {
        let (piece, rest) = data.split_at(data.len().min(len));
        ram.write_slice(piece, addr)?;
        data = rest;
        if data.is_empty() {
            break;
        }
    }
    if data.is_empty() {
        Ok(())
    } else {
        Err(QueueError::TooShort)
    }
}

/// What is left of the segments behind the first `skip` bytes.
fn pieces(segments: &[Segment], skip: u64) -> impl Iterator<Item = (GuestAddress, usize)> {
    let mut skip = skip;
    segments.iter().filter_map(move |segment| {
        let skipped = skip.min(u64::from(segment.len));
        skip -= skipped;
        let left = u64::from(segment.len) - skipped;
        // In RAM, so the sum cannot overflow; a restored segment may be anywhere and fails at its access.
        (left > 0).then(|| {
            (
                GuestAddress(segment.addr.0.wrapping_add(skipped)),
                left as usize,
            )
        })
    })
}
