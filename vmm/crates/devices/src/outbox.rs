//! What a device call works with beside the device's own state: guest memory, the time, and where effects go.

use vm_memory::GuestMemory;

use crate::effect::{Effect, RequestId};
use crate::time::VirtualTime;

/// Most effects that the board holds before they are taken. Room for one exit: a string instruction of 4,096 bytes, each
/// an access with an effect, and what devices take from their queues until 1,024 wait.
pub const EFFECTS_MAX: usize = 8192;

/// While so many effects wait, devices take no further frames or requests from their queues. More than one access makes
/// unless a guest makes it with string instructions.
const EFFECTS_CROWDED: usize = 1024;

/// Most faults kept for reporting; later ones are dropped until they are taken.
pub const FAULTS_MAX: usize = 16;

/// Why a device stopped until its driver resets it: for reports. It is not part of the board's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFault {
    /// The device.
    pub device: &'static str,
    /// What the driver did.
    pub reason: String,
}

/// The surroundings of one call.
pub(crate) struct Outside<'a, M: GuestMemory> {
    pub(crate) ram: &'a M,
    pub(crate) outbox: &'a mut Outbox,
    pub(crate) now: VirtualTime,
}

/// Collects effects in order and numbers the requests among them.
#[derive(Debug)]
pub(crate) struct Outbox {
    effects: Vec<Effect>,
    faults: Vec<DeviceFault>,
    next_request_id: u64,
}

impl Outbox {
    pub(crate) fn new(next_request_id: u64) -> Outbox {
        Outbox {
            effects: Vec::new(),
            faults: Vec::new(),
            next_request_id,
        }
    }

    pub(crate) fn push(&mut self, effect: Effect) {
        assert!(
            self.effects.len() < EFFECTS_MAX,
            "effects must be taken after every exit"
        );
        self.effects.push(effect);
    }

    /// So many effects wait that none should be made that need not.
    pub(crate) fn crowded(&self) -> bool {
        self.effects.len() >= EFFECTS_CROWDED
    }

    pub(crate) fn fault(&mut self, device: &'static str, reason: &dyn std::error::Error) {
        if self.faults.len() < FAULTS_MAX {
            self.faults.push(DeviceFault {
                device,
                reason: reason.to_string(),
            });
        }
    }

    /// A number for a new request.
    pub(crate) fn next_id(&mut self) -> RequestId {
        let id = RequestId(self.next_request_id);
        self.next_request_id += 1;
        id
    }

    pub(crate) fn next_request_id(&self) -> u64 {
        self.next_request_id
    }

    pub(crate) fn has_effects(&self) -> bool {
        !self.effects.is_empty()
    }

    pub(crate) fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    pub(crate) fn take_faults(&mut self) -> Vec<DeviceFault> {
        std::mem::take(&mut self.faults)
    }
}
