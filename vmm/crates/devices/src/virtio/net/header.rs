//! `virtio_net_hdr_v1` (virtio 1.2, 5.1.6): what a frame still needs done to it.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
};

use crate::effect::NetOffloads;

/// flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers.
pub(super) const HEADER_BYTES: usize = 12;

const NEEDS_CSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const DATA_VALID: u8 = VIRTIO_NET_HDR_F_DATA_VALID as u8;
const GSO_NONE: u8 = VIRTIO_NET_HDR_GSO_NONE as u8;
const GSO_TCPV4: u8 = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
const GSO_TCPV6: u8 = VIRTIO_NET_HDR_GSO_TCPV6 as u8;
const GSO_ECN: u8 = VIRTIO_NET_HDR_GSO_ECN as u8;

/// A frame's header, as its 12 bytes.
#[derive(Clone, Copy)]
pub(super) struct Header([u8; HEADER_BYTES]);

impl Header {
    /// Header and Ethernet frame.
    pub(super) fn split(frame: &[u8]) -> Option<(Header, &[u8])> {
        let (header, payload) = frame.split_first_chunk()?;
        Some((Header(*header), payload))
    }

    /// Whether a receiver with `offloads` can take the frame.
    pub(super) fn needs_only(self, offloads: NetOffloads) -> bool {
        let [flags, gso_type, ..] = self.0;
        let known_flags = flags & !(NEEDS_CSUM | DATA_VALID) == 0;
        let checksum = flags & NEEDS_CSUM == 0 || offloads.checksum;
        let segments = match gso_type & !GSO_ECN {
            GSO_NONE => gso_type == GSO_NONE,
            GSO_TCPV4 => offloads.tso4,
            GSO_TCPV6 => offloads.tso6,
            _ => false,
        };
        let ecn = gso_type & GSO_ECN == 0 || offloads.ecn;
        known_flags && checksum && segments && ecn
    }

    /// The header as a receiver with `offloads` sees it, of a frame in `buffers` buffers.
    pub(super) fn received(self, buffers: u16, offloads: NetOffloads) -> [u8; HEADER_BYTES] {
        let mut bytes = self.0;
        if !offloads.checksum {
            // Without the feature the flags are zero.
            bytes[0] = 0;
        }
        bytes[10..].copy_from_slice(&buffers.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: NetOffloads = NetOffloads {
        checksum: true,
        tso4: true,
        tso6: true,
        ecn: true,
    };

    fn header(flags: u8, gso_type: u8) -> Header {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..2].copy_from_slice(&[flags, gso_type]);
        Header(bytes)
    }

    #[test]
    fn each_need_calls_for_its_offload() {
        let none = NetOffloads::default();
        let cases = [
            (header(0, 0), none),
            (header(DATA_VALID, 0), none),
            (
                header(NEEDS_CSUM, 0),
                NetOffloads {
                    checksum: true,
                    ..none
                },
            ),
            (header(0, GSO_TCPV4), NetOffloads { tso4: true, ..none }),
            (header(0, GSO_TCPV6), NetOffloads { tso6: true, ..none }),
            (
                header(0, GSO_TCPV4 | GSO_ECN),
                NetOffloads {
                    tso4: true,
                    ecn: true,
                    ..none
                },
            ),
        ];
        for (header, needed) in cases {
            assert!(header.needs_only(needed));
            assert!(header.needs_only(ALL));
            assert_eq!(header.needs_only(none), needed == none);
        }
        for unknown in [header(0, 3), header(0, 5), header(0, GSO_ECN), header(4, 0)] {
            assert!(!unknown.needs_only(ALL));
        }
    }

    #[test]
    fn the_receiver_is_told_the_buffers_and_no_flags_it_does_not_know() {
        assert_eq!(header(DATA_VALID, 0).received(3, ALL)[0], DATA_VALID);
        let plain = header(DATA_VALID, 0).received(0x0102, NetOffloads::default());
        assert_eq!((plain[0], &plain[10..]), (0, &[2, 1][..]));
    }
}
