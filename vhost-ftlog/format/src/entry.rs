//! Log entries and their encoding; writer and reader stand side by side.
//!
//! An entry is `len: varint, kind: u8, exit: varint, payload`, where `len` counts what follows it.
//! Entries are self-delimiting and need no neighbour to be understood. Payload numbers are varints
//! but for checksums and digests, which are fixed little-endian.

use crate::{Error, ExitNumber, MAX_APPEND_LEN, varint};

/// What happened, with its data. Borrowed from the bytes that it was read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// Virtual time is now `ns` nanoseconds since the VM's birth: the only thing that moves it.
    Time {
        /// Nanoseconds since the VM's birth.
        ns: u64,
    },
    /// Random bytes for the guest's entropy request.
    Entropy {
        /// The request that is answered.
        request: u64,
        /// The bytes.
        data: &'a [u8],
    },
    /// A frame from the network, with its virtio-net header.
    NetRx(&'a [u8]),
    /// Bytes typed on the console.
    ConsoleRx(&'a [u8]),
    /// A disk request is complete.
    DiskDone {
        /// The request.
        request: u64,
        /// How it ended.
        status: DiskStatus,
        /// What a read returned; empty otherwise.
        data: &'a [u8],
    },
    /// The exit made output: how many bytes, their CRC32C, and the digest of all registers at all
    /// exits so far.
    Output {
        /// Bytes of output at this exit.
        bytes: u32,
        /// CRC32C of them.
        crc: u32,
        /// Running register digest.
        digest: u64,
    },
    /// The exit was reached, and made no output: digest and horizon.
    Reached {
        /// Running register digest.
        digest: u64,
    },
    /// A point without a number after this exit: registers, device state, pages.
    Delta(&'a [u8]),
    /// The operator or the protocol acts on the VM at this point.
    Control(ControlOp, &'a [u8]),
    /// A piece of an entry that is larger than an append.
    Part(PartHeader, &'a [u8]),
}

/// How a disk request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum DiskStatus {
    /// Done; what was written is on the storage.
    Ok = 0,
    /// The medium failed.
    MediumError = 1,
}

/// What a [`Event::Control`] entry asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ControlOp {
    /// The VM powers off here.
    PowerOff = 1,
    /// The VM is reset here.
    Reset = 2,
    /// The primary hands its role over here.
    SwitchOver = 3,
    /// The limits that operators set are these from here on; the guest sees nothing of it.
    Limits = 4,
    /// A mark for people; changes nothing.
    Mark = 5,
}

/// Which piece a [`Event::Part`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartHeader {
    /// Bytes of the whole encoded entry; on the first part only, 0 on the others.
    pub total: u64,
    /// Bytes of the entry that came in the parts before this one.
    pub offset: u64,
}

/// An event and the exit at which it took place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'a> {
    /// The execution point: after this exit, before the next.
    pub exit: ExitNumber,
    /// What happened there.
    pub event: Event<'a>,
}

/// The kind of an entry, as it stands on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum EntryKind {
    /// [`Event::Time`]
    Time = 1,
    /// [`Event::Entropy`]
    Entropy = 2,
    /// [`Event::NetRx`]
    NetRx = 3,
    /// [`Event::ConsoleRx`]
    ConsoleRx = 4,
    /// [`Event::DiskDone`]
    DiskDone = 5,
    /// [`Event::Output`]
    Output = 6,
    /// [`Event::Reached`]
    Reached = 7,
    /// [`Event::Delta`]
    Delta = 8,
    /// [`Event::Control`]
    Control = 9,
    /// [`Event::Part`]
    Part = 10,
}

impl EntryKind {
    /// Every kind, in the order of their numbers.
    pub const ALL: [Self; 10] = [
        Self::Time,
        Self::Entropy,
        Self::NetRx,
        Self::ConsoleRx,
        Self::DiskDone,
        Self::Output,
        Self::Reached,
        Self::Delta,
        Self::Control,
        Self::Part,
    ];

    fn from_byte(byte: u8) -> Result<Self, Error> {
        Self::ALL
            .into_iter()
            .find(|kind| *kind as u8 == byte)
            .ok_or(Error::Kind(byte))
    }

    /// Its name in dumps and documents.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Time => "Time",
            Self::Entropy => "Entropy",
            Self::NetRx => "NetRx",
            Self::ConsoleRx => "ConsoleRx",
            Self::DiskDone => "DiskDone",
            Self::Output => "Output",
            Self::Reached => "Reached",
            Self::Delta => "Delta",
            Self::Control => "Control",
            Self::Part => "Part",
        }
    }
}

impl Event<'_> {
    /// The kind of this event.
    #[must_use]
    pub const fn kind(&self) -> EntryKind {
        match self {
            Self::Time { .. } => EntryKind::Time,
            Self::Entropy { .. } => EntryKind::Entropy,
            Self::NetRx(_) => EntryKind::NetRx,
            Self::ConsoleRx(_) => EntryKind::ConsoleRx,
            Self::DiskDone { .. } => EntryKind::DiskDone,
            Self::Output { .. } => EntryKind::Output,
            Self::Reached { .. } => EntryKind::Reached,
            Self::Delta(_) => EntryKind::Delta,
            Self::Control(..) => EntryKind::Control,
            Self::Part(..) => EntryKind::Part,
        }
    }

    fn payload_len(&self) -> usize {
        match self {
            Self::Time { ns } => varint::len(*ns),
            Self::Entropy { request, data } => varint::len(*request) + data.len(),
            Self::NetRx(data) | Self::ConsoleRx(data) | Self::Delta(data) => data.len(),
            Self::DiskDone { request, data, .. } => varint::len(*request) + 1 + data.len(),
            Self::Output { bytes, .. } => varint::len(u64::from(*bytes)) + 12,
            Self::Reached { .. } => 8,
            Self::Control(_, data) => 1 + data.len(),
            Self::Part(part, data) => {
                varint::len(part.total) + varint::len(part.offset) + data.len()
            }
        }
    }

    fn put_payload(&self, out: &mut Vec<u8>) {
        match self {
            Self::Time { ns } => varint::put(out, *ns),
            Self::Entropy { request, data } => {
                varint::put(out, *request);
                out.extend_from_slice(data);
            }
            Self::NetRx(data) | Self::ConsoleRx(data) | Self::Delta(data) => {
                out.extend_from_slice(data);
            }
            Self::DiskDone {
                request,
                status,
                data,
            } => {
                varint::put(out, *request);
                out.push(*status as u8);
                out.extend_from_slice(data);
            }
            Self::Output { bytes, crc, digest } => {
                varint::put(out, u64::from(*bytes));
                out.extend_from_slice(&crc.to_le_bytes());
                out.extend_from_slice(&digest.to_le_bytes());
            }
            Self::Reached { digest } => out.extend_from_slice(&digest.to_le_bytes()),
            Self::Control(op, data) => {
                out.push(*op as u8);
                out.extend_from_slice(data);
            }
            Self::Part(part, data) => {
                varint::put(out, part.total);
                varint::put(out, part.offset);
                out.extend_from_slice(data);
            }
        }
    }
}

impl<'a> Event<'a> {
    fn take(kind: EntryKind, mut bytes: &'a [u8]) -> Result<Self, Error> {
        let rest = &mut bytes;
        let event = match kind {
            EntryKind::Time => Self::Time {
                ns: varint::take(rest)?,
            },
            EntryKind::Entropy => Self::Entropy {
                request: varint::take(rest)?,
                data: take_all(rest),
            },
            EntryKind::NetRx => Self::NetRx(take_all(rest)),
            EntryKind::ConsoleRx => Self::ConsoleRx(take_all(rest)),
            EntryKind::DiskDone => Self::DiskDone {
                request: varint::take(rest)?,
                status: match take_array::<1>(rest)? {
                    [0] => DiskStatus::Ok,
                    [1] => DiskStatus::MediumError,
                    _ => return Err(Error::Field("disk status")),
                },
                data: take_all(rest),
            },
            EntryKind::Output => Self::Output {
                bytes: u32::try_from(varint::take(rest)?)
                    .map_err(|_| Error::Field("output length"))?,
                crc: u32::from_le_bytes(take_array(rest)?),
                digest: u64::from_le_bytes(take_array(rest)?),
            },
            EntryKind::Reached => Self::Reached {
                digest: u64::from_le_bytes(take_array(rest)?),
            },
            EntryKind::Delta => Self::Delta(take_all(rest)),
            EntryKind::Control => Self::Control(
                match take_array::<1>(rest)? {
                    [1] => ControlOp::PowerOff,
                    [2] => ControlOp::Reset,
                    [3] => ControlOp::SwitchOver,
                    [4] => ControlOp::Limits,
                    [5] => ControlOp::Mark,
                    _ => return Err(Error::Field("control operation")),
                },
                take_all(rest),
            ),
            EntryKind::Part => Self::Part(
                PartHeader {
                    total: varint::take(rest)?,
                    offset: varint::take(rest)?,
                },
                take_all(rest),
            ),
        };
        if bytes.is_empty() {
            Ok(event)
        } else {
            Err(Error::Field("entry: bytes left over"))
        }
    }
}

fn take_all<'a>(bytes: &mut &'a [u8]) -> &'a [u8] {
    std::mem::take(bytes)
}

fn take_array<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], Error> {
    let (front, rest) = bytes.split_first_chunk::<N>().ok_or(Error::Truncated {
        needed: N,
        got: bytes.len(),
    })?;
    *bytes = rest;
    Ok(*front)
}

impl<'a> Entry<'a> {
    fn inner_len(&self) -> usize {
        1 + varint::len(self.exit.0) + self.event.payload_len()
    }

    /// Bytes that [`Entry::encode`] appends.
    #[must_use]
    pub fn encoded_len(&self) -> usize {
        let inner = self.inner_len();
        varint::len(inner as u64) + inner
    }

    /// Appends the entry to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        varint::put(out, self.inner_len() as u64);
        out.push(self.event.kind() as u8);
        varint::put(out, self.exit.0);
        self.event.put_payload(out);
    }

    /// Takes one entry off the front of `bytes`, of [`MAX_APPEND_LEN`] or less.
    ///
    /// # Errors
    /// What is wrong with the bytes; `bytes` then stands where it stood.
    pub fn decode(bytes: &mut &'a [u8]) -> Result<Self, Error> {
        Self::decode_bounded(bytes, MAX_APPEND_LEN as u64)
    }

    /// [`Entry::decode`] for an entry put together from parts: up to `limit` bytes.
    ///
    /// # Errors
    /// What is wrong with the bytes; `bytes` then stands where it stood.
    pub fn decode_bounded(bytes: &mut &'a [u8], limit: u64) -> Result<Self, Error> {
        let mut rest = *bytes;
        let len = varint::take(&mut rest)?;
        if len > limit {
            return Err(Error::Limit {
                what: "length of an entry",
                value: len,
                limit,
            });
        }
        let len = usize::try_from(len).map_err(|_| Error::Field("length of an entry"))?;
        if rest.len() < len {
            return Err(Error::Truncated {
                needed: len,
                got: rest.len(),
            });
        }
        let (mut inner, after) = rest.split_at(len);
        let kind = EntryKind::from_byte(take_array::<1>(&mut inner)?[0])?;
        let exit = ExitNumber(varint::take(&mut inner)?);
        let entry = Self {
            exit,
            event: Event::take(kind, inner)?,
        };
        *bytes = after;
        Ok(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Vec<Entry<'static>> {
        let at = |exit, event| Entry {
            exit: ExitNumber(exit),
            event,
        };
        vec![
            at(0, Event::Time { ns: 0 }),
            at(300, Event::Time { ns: 1_000_000_007 }),
            at(
                301,
                Event::Entropy {
                    request: 9,
                    data: &[1, 2, 3],
                },
            ),
            at(302, Event::NetRx(&[0xaa; 5])),
            at(303, Event::ConsoleRx(b"ls\n")),
            at(
                304,
                Event::DiskDone {
                    request: 200,
                    status: DiskStatus::MediumError,
                    data: &[],
                },
            ),
            at(
                305,
                Event::Output {
                    bytes: 1514,
                    crc: 0x0102_0304,
                    digest: 0x1112_1314_1516_1718,
                },
            ),
            at(306, Event::Reached { digest: u64::MAX }),
            at(307, Event::Delta(&[7; 3])),
            at(308, Event::Control(ControlOp::SwitchOver, b"x")),
            at(
                309,
                Event::Part(
                    PartHeader {
                        total: 70_000,
                        offset: 0,
                    },
                    &[1],
                ),
            ),
        ]
    }

    #[test]
    fn every_kind_round_trips() {
        let mut bytes = Vec::new();
        for entry in samples() {
            let before = bytes.len();
            entry.encode(&mut bytes);
            assert_eq!(bytes.len() - before, entry.encoded_len());
        }
        let mut rest = bytes.as_slice();
        for entry in samples() {
            assert_eq!(Entry::decode(&mut rest), Ok(entry));
        }
        assert!(rest.is_empty());
        let kinds: std::collections::BTreeSet<_> =
            samples().iter().map(|entry| entry.event.kind()).collect();
        assert_eq!(kinds.into_iter().collect::<Vec<_>>(), EntryKind::ALL);
    }

    /// Golden bytes of version 1. A change here is a new version of the format.
    #[test]
    fn golden_bytes_of_version_2() {
        let golden: [&[u8]; 11] = [
            &[3, 1, 0, 0],
            &[8, 1, 0xac, 2, 0x87, 0x94, 0xeb, 0xdc, 3],
            &[7, 2, 0xad, 2, 9, 1, 2, 3],
            &[8, 3, 0xae, 2, 0xaa, 0xaa, 0xaa, 0xaa, 0xaa],
            &[6, 4, 0xaf, 2, b'l', b's', b'\n'],
            &[6, 5, 0xb0, 2, 0xc8, 1, 1],
            &[
                17, 6, 0xb1, 2, 0xea, 0x0b, 4, 3, 2, 1, 0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12,
                0x11,
            ],
            &[11, 7, 0xb2, 2, 255, 255, 255, 255, 255, 255, 255, 255],
            &[6, 8, 0xb3, 2, 7, 7, 7],
            &[5, 9, 0xb4, 2, 3, b'x'],
            &[8, 10, 0xb5, 2, 0xf0, 0xa2, 4, 0, 1],
        ];
        for (entry, golden) in samples().iter().zip(golden) {
            let mut bytes = Vec::new();
            entry.encode(&mut bytes);
            assert_eq!(bytes, golden, "{entry:?}");
        }
    }

    #[test]
    fn a_cut_entry_is_truncated_at_every_length() {
        for entry in samples() {
            let mut bytes = Vec::new();
            entry.encode(&mut bytes);
            for len in 0..bytes.len() {
                let mut cut = &bytes[..len];
                assert!(Entry::decode(&mut cut).is_err());
                assert_eq!(cut.len(), len, "a refused entry is not consumed");
            }
        }
    }

    #[test]
    fn unknown_kind_and_left_over_bytes_are_refused() {
        assert_eq!(Entry::decode(&mut &[2, 99, 0][..]), Err(Error::Kind(99)));
        assert!(Entry::decode(&mut &[4, 1, 0, 0, 0][..]).is_err());
    }
}
