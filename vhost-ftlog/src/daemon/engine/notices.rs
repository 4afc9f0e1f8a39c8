//! The event queue: notices into the VMM's buffers, in order.

use std::collections::VecDeque;
use std::sync::Arc;

use ring::{Desc, Device, Error, MappedVring};

use super::stats::Stats;
use crate::daemon::memory::DeviceMemory;
use crate::notice::{NOTICE_LEN, Notice};

/// Notices that wait for a buffer; more are dropped and counted.
const MAX_WAITING: usize = 64;

/// The event queue and what waits for it.
#[derive(Default)]
pub(super) struct Notices {
    queue: Option<(Device<MappedVring>, Arc<DeviceMemory>)>,
    waiting: VecDeque<Notice>,
}

impl Notices {
    /// Begins to use a queue.
    pub(super) fn start(&mut self, queue: Device<MappedVring>, memory: Arc<DeviceMemory>) {
        self.queue = Some((queue, memory));
    }

    /// Lets go of the queue; its used index, for GET_VRING_BASE.
    pub(super) fn stop(&mut self) -> Option<u16> {
        self.queue.take().map(|(queue, _)| queue.used() as u16)
    }

    /// Adds a notice.
    pub(super) fn push(&mut self, notice: Notice, stats: &mut Stats) {
        if self.waiting.len() == MAX_WAITING {
            self.waiting.pop_front();
            stats.counters.notices_dropped += 1;
        }
        self.waiting.push_back(notice);
    }

    /// Whether notices wait.
    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty() && self.queue.is_some()
    }

    /// Writes what fits; true where the VMM is to be called.
    ///
    /// # Errors
    /// [`Error::Broken`] where the VMM broke the rules of the ring.
    pub(super) fn flush(&mut self) -> Result<bool, Error> {
        let Some((queue, memory)) = &mut self.queue else {
            return Ok(false);
        };
        let mut call = false;
        while !self.waiting.is_empty() {
            let position = queue.used();
            if queue.available()? == position {
                // A kick tells when there is a buffer again.
                queue.ask_kick(position)?;
                if queue.seen() == position {
                    break;
                }
            }
            let desc = queue.desc(position)?;
            let offset = memory
                .of_guest(desc.addr, desc.len)
                .filter(|_| desc.flags & Desc::WRITE != 0 && desc.len as usize >= NOTICE_LEN)
                .ok_or(Error::Broken("event buffer"))?;
            let Some(notice) = self.waiting.pop_front() else {
                break;
            };
            memory.mapping().write(offset, &notice.encode());
            call |= queue.use_up_to(position + 1, NOTICE_LEN as u32);
        }
        Ok(call)
    }
}
