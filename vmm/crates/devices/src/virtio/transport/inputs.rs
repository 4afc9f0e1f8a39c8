//! Inputs from outside on their way to a device: taken only by a running driver, refused without any change.

use vm_memory::GuestMemory;

use super::super::{Blk, Interrupt, Net, Rng};
use super::{VirtioDevice, VirtioPci};
use crate::effect::{DiskStatus, Rejected, RequestId};
use crate::outbox::Outside;
use crate::time::VirtualTime;

impl VirtioPci<Net> {
    /// A frame has come.
    pub(crate) fn receive<M: GuestMemory>(
        &mut self,
        outside: &mut Outside<'_, M>,
        frame: &[u8],
    ) -> Result<(), Rejected> {
        if !self.running() {
            return Err(Rejected::NotRunning);
        }
        // A malformed ring takes the frame: it is lost, as on a broken card.
        let mut answer = Ok(());
        self.call(outside, |net, context| {
            net.receive(context, frame).map(|received| {
                received.unwrap_or_else(|rejected| {
                    answer = Err(rejected);
                    Interrupt::No
                })
            })
        });
        answer
    }

    /// Whether a frame would find room now.
    pub(crate) fn has_rx_room<M: GuestMemory>(&self, ram: &M) -> bool {
        // Into a malformed ring goes one more frame, which stops the device.
        self.running() && self.device.has_rx_room(ram, &self.queues).unwrap_or(true)
    }

    /// When virtual time is needed next.
    pub(crate) fn next_timer(&self) -> Option<VirtualTime> {
        self.device.next_timer().filter(|_| self.running())
    }

    /// Virtual time has gone on.
    pub(crate) fn advance<M: GuestMemory>(&mut self, outside: &mut Outside<'_, M>) {
        if self.next_timer().is_some_and(|due| due <= outside.now) {
            self.call(outside, Net::advance);
        }
    }
}

impl VirtioPci<Blk> {
    /// A disk request has ended.
    pub(crate) fn done<M: GuestMemory>(
        &mut self,
        outside: &mut Outside<'_, M>,
        id: RequestId,
        status: DiskStatus,
        data: &[u8],
    ) -> Result<(), Rejected> {
        self.device.check_done(id, status, data)?;
        let running = self.running();
        self.call(outside, |blk, context| {
            blk.done(running.then_some(context), id, status, data)
        });
        self.resetting &= self.device.busy();
        Ok(())
    }
}

impl VirtioPci<Rng> {
    /// Entropy has come.
    pub(crate) fn done<M: GuestMemory>(
        &mut self,
        outside: &mut Outside<'_, M>,
        id: RequestId,
        data: &[u8],
    ) -> Result<(), Rejected> {
        self.device.check_done(id, data)?;
        let running = self.running();
        self.call(outside, |rng, context| {
            rng.done(running.then_some(context), id, data)
        });
        Ok(())
    }
}
