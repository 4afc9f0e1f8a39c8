//! The common configuration structure (virtio 1.2, 4.1.4.3): features, status, queues.
//!
//! Fields are written with their own width, 64-bit fields in halves, too; other writes do nothing. MSI-X vectors read as
//! none. The configuration never changes, so its generation stays 0.

use vm_memory::GuestMemory;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_FAILED,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::{
    STATUS_DRIVER_OK, STATUS_FEATURES_OK, STATUS_NEEDS_RESET, VirtioDevice, VirtioPci, Virtqueue,
};
use crate::outbox::Outside;

const COMMON_BYTES: usize = 0x38;

const DEVICE_FEATURE_SELECT: usize = 0x00;
const DEVICE_FEATURE: usize = 0x04;
const DRIVER_FEATURE_SELECT: usize = 0x08;
const DRIVER_FEATURE: usize = 0x0c;
const CONFIG_MSIX_VECTOR: usize = 0x10;
const NUM_QUEUES: usize = 0x12;
const DEVICE_STATUS: usize = 0x14;
const QUEUE_SELECT: usize = 0x16;
const QUEUE_SIZE: usize = 0x18;
const QUEUE_MSIX_VECTOR: usize = 0x1a;
const QUEUE_ENABLE: usize = 0x1c;
const QUEUE_NOTIFY_OFF: usize = 0x1e;
const QUEUE_DESC: usize = 0x20;
const QUEUE_DRIVER: usize = 0x28;
const QUEUE_DEVICE: usize = 0x30;

const NO_VECTOR: u16 = 0xffff;

/// Status bits that a driver sets.
const STATUS_BY_DRIVER: u8 =
    (VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FAILED) as u8
        | STATUS_FEATURES_OK
        | STATUS_DRIVER_OK;

impl<D: VirtioDevice> VirtioPci<D> {
    /// The structure as the driver would read it now.
    pub(super) fn read_common(&self) -> [u8; COMMON_BYTES] {
        let mut image = [0; COMMON_BYTES];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        let word = |features: u64, select: u32| match select {
            0 => (features as u32).to_le_bytes(),
            1 => ((features >> 32) as u32).to_le_bytes(),
            _ => [0; 4],
        };
        put(
            DEVICE_FEATURE_SELECT,
            &self.device_feature_select.to_le_bytes(),
        );
        put(
            DEVICE_FEATURE,
            &word(self.offered_features(), self.device_feature_select),
        );
        put(
            DRIVER_FEATURE_SELECT,
            &self.driver_feature_select.to_le_bytes(),
        );
        put(
            DRIVER_FEATURE,
            &word(self.driver_features, self.driver_feature_select),
        );
        put(CONFIG_MSIX_VECTOR, &NO_VECTOR.to_le_bytes());
        put(NUM_QUEUES, &(self.queues.len() as u16).to_le_bytes());
        // A reset is over when this is 0.
        put(
            DEVICE_STATUS,
            &[if self.resetting {
                STATUS_NEEDS_RESET
            } else {
                self.status
            }],
        );
        put(QUEUE_SELECT, &self.queue_select.to_le_bytes());
        put(QUEUE_MSIX_VECTOR, &NO_VECTOR.to_le_bytes());
        let Some(queue) = self.queues.get(usize::from(self.queue_select)) else {
            return image;
        };
        let rings = queue.rings();
        put(QUEUE_SIZE, &queue.size().to_le_bytes());
        put(QUEUE_ENABLE, &u16::from(queue.enabled()).to_le_bytes());
        put(QUEUE_NOTIFY_OFF, &self.queue_select.to_le_bytes());
        put(QUEUE_DESC, &rings.desc.to_le_bytes());
        put(QUEUE_DRIVER, &rings.driver.to_le_bytes());
        put(QUEUE_DEVICE, &rings.device.to_le_bytes());
        image
    }

    pub(super) fn write_common<M: GuestMemory>(
        &mut self,
        outside: &mut Outside<'_, M>,
        at: usize,
        data: &[u8],
    ) {
        // Nothing can be set up before the reset is over.
        if self.resetting {
            return;
        }
        match *data {
            [status] if at == DEVICE_STATUS => self.write_status(outside, status),
            [b0, b1] => self.write_u16(outside, at, u16::from_le_bytes([b0, b1])),
            [b0, b1, b2, b3] => self.write_u32(at, u32::from_le_bytes([b0, b1, b2, b3])),
            [b0, b1, b2, b3, b4, b5, b6, b7] if at >= QUEUE_DESC => {
                self.write_u32(at, u32::from_le_bytes([b0, b1, b2, b3]));
                self.write_u32(at + 4, u32::from_le_bytes([b4, b5, b6, b7]));
            }
            _ => {}
        }
    }

    fn write_status<M: GuestMemory>(&mut self, outside: &mut Outside<'_, M>, value: u8) {
        if value == 0 {
            self.reset(outside);
            return;
        }
        let before = self.status;
        let mut status = before | value & STATUS_BY_DRIVER;
        if before & STATUS_FEATURES_OK == 0 && !self.features_acceptable() {
            status &= !STATUS_FEATURES_OK;
        }
        if status & STATUS_FEATURES_OK == 0 {
            status &= !STATUS_DRIVER_OK;
        }
        self.status = status;
        if status & !before & STATUS_DRIVER_OK != 0 {
            self.device.start(self.driver_features, outside.outbox);
        }
    }

    fn write_u16<M: GuestMemory>(&mut self, outside: &mut Outside<'_, M>, at: usize, value: u16) {
        match at {
            QUEUE_SELECT => self.queue_select = value,
            QUEUE_SIZE => {
                if let Some(queue) = self.selected_queue() {
                    queue.set_size(value);
                }
            }
            QUEUE_ENABLE if value == 1 => self.enable_queue(outside),
            _ => {}
        }
    }

    fn write_u32(&mut self, at: usize, value: u32) {
        match at {
            DEVICE_FEATURE_SELECT => self.device_feature_select = value,
            DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
            DRIVER_FEATURE => self.write_driver_features(value),
            QUEUE_DESC..=0x37 => self.write_ring_address(at, value),
            _ => {}
        }
    }

    fn write_driver_features(&mut self, value: u32) {
        let shift = match self.driver_feature_select {
            0 => 0,
            1 => 32,
            _ => return,
        };
        if self.status & STATUS_FEATURES_OK == 0 {
            self.driver_features &= !(0xffff_ffff << shift);
            self.driver_features |= u64::from(value) << shift;
        }
    }

    fn write_ring_address(&mut self, at: usize, value: u32) {
        let Some(queue) = self.selected_queue() else {
            return;
        };
        let mut rings = queue.rings();
        let field = match at & !7 {
            QUEUE_DESC => &mut rings.desc,
            QUEUE_DRIVER => &mut rings.driver,
            _ => &mut rings.device,
        };
        *field = match at & 7 {
            0 => *field & !0xffff_ffff | u64::from(value),
            4 => *field & 0xffff_ffff | u64::from(value) << 32,
            _ => *field,
        };
        queue.set_rings(rings);
    }

    fn selected_queue(&mut self) -> Option<&mut Virtqueue> {
        self.queues.get_mut(usize::from(self.queue_select))
    }

    fn enable_queue<M: GuestMemory>(&mut self, outside: &mut Outside<'_, M>) {
        if self.status & STATUS_FEATURES_OK == 0 {
            return;
        }
        let event_idx = self.has(VIRTIO_RING_F_EVENT_IDX);
        let Some(queue) = self.selected_queue() else {
            return;
        };
        if queue.enabled() {
            return;
        }
        if let Err(error) = queue.enable(outside.ram, event_idx) {
            self.fail(outside, &error);
        }
    }
}
