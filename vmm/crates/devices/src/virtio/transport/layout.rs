//! Where the structures lie in the BAR, and the capabilities that tell the driver (virtio 1.2, 4.1.4).

use virtio_bindings::virtio_config::VIRTIO_TRANSPORT_F_START;

use super::super::{DEVICE_CONFIG_BYTES, Kind};
use crate::pci::function::{CAPABILITIES_AT, Identity};

/// Bytes of the BAR: one page, so that a guest pays for one mapping.
pub(super) const BAR_BYTES: u32 = 0x1000;
/// Bytes between the notification addresses of two queues.
pub(super) const NOTIFY_MULTIPLIER: u32 = 4;

/// A part of the BAR.
pub(super) struct Region {
    offset: u32,
    bytes: u32,
}

impl Region {
    /// Offset within the region.
    pub(super) fn find(&self, offset: u64) -> Option<usize> {
        let at = offset.checked_sub(u64::from(self.offset))?;
        (at < u64::from(self.bytes)).then_some(at as usize)
    }
}

/// The common configuration structure up to `queue_device`.
pub(super) const COMMON: Region = Region {
    offset: 0x000,
    bytes: 0x38,
};
pub(super) const ISR: Region = Region {
    offset: 0x100,
    bytes: 1,
};
pub(super) const DEVICE: Region = Region {
    offset: 0x200,
    bytes: DEVICE_CONFIG_BYTES as u32,
};
/// Has room for more queues than any device has.
pub(super) const NOTIFY: Region = Region {
    offset: 0x300,
    bytes: 8 * NOTIFY_MULTIPLIER,
};

const VENDOR_CAPABILITY: u8 = 0x09;
const CAPABILITY_BYTES: u8 = 16;
const TYPE_COMMON: u8 = 1;
const TYPE_NOTIFY: u8 = 2;
const TYPE_ISR: u8 = 3;
const TYPE_DEVICE: u8 = 4;
const TYPE_WINDOW: u8 = 5;

/// Offset of the configuration access capability; it is the last.
pub(super) const WINDOW_AT: usize = CAPABILITIES_AT + 3 * 16 + 20;
/// Offset of its data in it.
pub(super) const WINDOW_DATA: usize = 16;

/// Virtio's vendor, and the first device ID of the modern interface.
const VIRTIO_VENDOR: u16 = 0x1af4;
const MODERN_DEVICE_BASE: u16 = 0x1040;

pub(super) fn identity(kind: &Kind) -> Identity {
    Identity {
        vendor: VIRTIO_VENDOR,
        device: MODERN_DEVICE_BASE + kind.virtio_id,
        subsystem_vendor: VIRTIO_VENDOR,
        subsystem: MODERN_DEVICE_BASE + kind.virtio_id,
        // Not transitional.
        revision: 1,
        class: kind.pci_class,
        bar_bytes: BAR_BYTES,
        capabilities: capabilities(),
    }
}

fn capabilities() -> Vec<u8> {
    let mut list = Vec::new();
    let nowhere = Region {
        offset: 0,
        bytes: 0,
    };
    for (kind, region, extra) in [
        (TYPE_COMMON, &COMMON, None),
        (TYPE_ISR, &ISR, None),
        (TYPE_DEVICE, &DEVICE, None),
        (TYPE_NOTIFY, &NOTIFY, Some(NOTIFY_MULTIPLIER)),
        // The window; its data follow.
        (TYPE_WINDOW, &nowhere, Some(0)),
    ] {
        let bytes = CAPABILITY_BYTES + if extra.is_some() { 4 } else { 0 };
        let here = (CAPABILITIES_AT + list.len()) as u8;
        let next = if kind == TYPE_WINDOW { 0 } else { here + bytes };
        list.extend([VENDOR_CAPABILITY, next, bytes, kind, 0, 0, 0, 0]);
        list.extend(region.offset.to_le_bytes());
        list.extend(region.bytes.to_le_bytes());
        if let Some(value) = extra {
            list.extend(value.to_le_bytes());
        }
    }
    list
}

const _: () = assert!(
    VIRTIO_TRANSPORT_F_START == 28,
    "device features lie below the transport's"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_linked_and_ends_with_the_window() {
        let list = capabilities();
        let mut at = CAPABILITIES_AT;
        let mut kinds = Vec::new();
        loop {
            let capability = &list[at - CAPABILITIES_AT..];
            assert_eq!(capability[0], VENDOR_CAPABILITY);
            kinds.push(capability[3]);
            if capability[1] == 0 {
                break;
            }
            at = capability[1] as usize;
        }
        assert_eq!(
            kinds,
            [TYPE_COMMON, TYPE_ISR, TYPE_DEVICE, TYPE_NOTIFY, TYPE_WINDOW]
        );
        assert_eq!(at, WINDOW_AT);
        assert_eq!(list.len(), WINDOW_AT - CAPABILITIES_AT + WINDOW_DATA + 4);
    }

    #[test]
    fn the_regions_do_not_overlap_and_fit() {
        let mut end = 0;
        for region in [COMMON, ISR, DEVICE, NOTIFY] {
            assert!(region.offset >= end && region.offset.is_multiple_of(4));
            end = region.offset + region.bytes;
        }
        assert!(end <= BAR_BYTES);
    }
}
