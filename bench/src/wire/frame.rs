//! What a frame is, as far as the judge asks. Nothing in it is trusted: what is cut short or strange is
//! [`Content::Other`].

use std::net::Ipv4Addr;

/// Bytes of an Ethernet header without VLAN tag.
const ETHERNET: usize = 14;
const TYPE_IPV4: u16 = 0x0800;
const PROTOCOL_TCP: u8 = 6;

/// A TCP stream of the guest: to where, and between which ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Flow {
    to: Ipv4Addr,
    from_port: u16,
    to_port: u16,
}

/// A segment of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment<'a> {
    pub(super) flow: Flow,
    /// Place of the first byte in the stream; SYN and FIN count as one byte.
    pub(super) sequence: u32,
    /// What is acknowledged of the other direction, if something is.
    pub(super) acknowledged: Option<u32>,
    pub(super) is_start: bool,
    pub(super) payload: &'a [u8],
}

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content<'a> {
    Tcp(Segment<'a>),
    Other,
}

/// The sender's address.
pub(super) fn source(frame: &[u8]) -> Option<[u8; 6]> {
    frame.get(6..12)?.try_into().ok()
}

/// What a frame carries.
pub(super) fn content(frame: &[u8]) -> Content<'_> {
    tcp(frame).map_or(Content::Other, Content::Tcp)
}

fn tcp(frame: &[u8]) -> Option<Segment<'_>> {
    if be16(frame, 12)? != TYPE_IPV4 {
        return None;
    }
    let ip = frame.get(ETHERNET..)?;
    let header = usize::from(ip.first()? & 0xf) * 4;
    let fragment = be16(ip, 6)? & 0x3fff;
    if ip[0] >> 4 != 4 || header < 20 || *ip.get(9)? != PROTOCOL_TCP || fragment != 0 {
        return None;
    }
    // A frame of segmentation offload may be longer than its field can say; then all of it counts.
    let total = match usize::from(be16(ip, 2)?) {
        0 => ip.len(),
        total => total,
    };
    let segment = ip.get(header..total)?;
    let offset = usize::from(*segment.get(12)? >> 4) * 4;
    let flags = *segment.get(13)?;
    let (syn, ack) = (flags & 0x02 != 0, flags & 0x10 != 0);
    let to: [u8; 4] = ip.get(16..20)?.try_into().ok()?;
    Some(Segment {
        flow: Flow {
            to: to.into(),
            from_port: be16(segment, 0)?,
            to_port: be16(segment, 2)?,
        },
        sequence: be32(segment, 4)?.wrapping_add(u32::from(syn)),
        acknowledged: be32(segment, 8).filter(|_| ack),
        is_start: syn,
        payload: segment.get(offset.max(20)..)?,
    })
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Frames for tests.
#[cfg(test)]
pub(super) mod made {
    pub(crate) const GUEST: [u8; 6] = [0x02, 0x50, 0x4c, 0x58, 0, 1];

    /// A segment of the guest to port `to`.
    pub(crate) fn tcp(to: u16, sequence: u32, acknowledged: u32, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0xff; 6];
        frame.extend(GUEST);
        frame.extend([8, 0]);
        let total = u16::try_from(40 + payload.len()).unwrap();
        frame.extend([0x45, 0]);
        frame.extend(total.to_be_bytes());
        frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 77, 0, 2, 10, 77, 0, 1]);
        frame.extend(6379_u16.to_be_bytes());
        frame.extend(to.to_be_bytes());
        frame.extend(sequence.to_be_bytes());
        frame.extend(acknowledged.to_be_bytes());
        frame.extend([0x50, 0x18, 0xff, 0xff, 0, 0, 0, 0]);
        frame.extend(payload);
        frame
    }

    /// Something else of the guest.
    pub(crate) fn other(text: &[u8]) -> Vec<u8> {
        let mut frame = vec![0xff; 6];
        frame.extend(GUEST);
        frame.extend([0x08, 0x06]);
        frame.extend(text);
        frame
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_read() {
        let mut frame = made::tcp(40_000, 1000, 77, b"+OK\r\n");
        frame.extend([0; 6]); // padding of the Ethernet frame
        let Content::Tcp(segment) = content(&frame) else {
            panic!("no segment");
        };
        assert_eq!((segment.sequence, segment.acknowledged), (1000, Some(77)));
        assert_eq!(
            (segment.payload, segment.is_start),
            (&b"+OK\r\n"[..], false)
        );
        assert_eq!(
            (segment.flow.from_port, segment.flow.to_port),
            (6379, 40_000)
        );
        assert_eq!(source(&frame), Some(made::GUEST));
    }

    #[test]
    fn a_frame_cut_anywhere_or_with_any_byte_changed_is_read_without_harm() {
        let frame = made::tcp(40_000, 1000, 77, b"+OK\r\n");
        for length in 0..frame.len() {
            assert_eq!(content(&frame[..length]), Content::Other, "{length}");
        }
        for at in 0..frame.len() {
            for value in 0..=255 {
                let mut changed = frame.clone();
                changed[at] = value;
                let _ = content(&changed);
            }
        }
        assert_eq!(content(&made::other(b"who has")), Content::Other);
    }
}
