//! The log as bytes: entries, the frames that carry them, and acknowledgement records.
//!
//! The same bytes go over the logging channel and into a recording. This crate does no I/O and
//! trusts nothing that it reads: every length is bounded before it is used, every checksum is
//! checked before its bytes are believed, and what does not decode is an [`Error`] that says where.
//!
//! An **entry** says where in the guest's execution something happened (an exit number), what it was
//! and with which data ([`Entry`]). One or more whole entries make an **append**, the unit that the
//! producer publishes and that a [`Seq`] counts. A **frame** ([`FrameHeader`]) carries appends back to
//! back between a checksummed header and a checksummed body. An entry too large for one append is
//! cut into parts ([`split`], [`Assembler`]) and takes effect with its last part.
//!
//! The layout is specified in docs/log-format.md and held by golden bytes.
#![forbid(unsafe_code)]

mod ack;
mod checksum;
mod entry;
mod frame;
mod ids;
mod parts;
mod reader;
mod varint;

pub use ack::{ACK_LEN, AckRecord};
pub use checksum::{crc32c, crc32c_append};
pub use entry::{ControlOp, DiskStatus, Entry, EntryKind, Event, PartHeader};
pub use frame::{Frame, FrameFlags, FrameHeader, HEADER_LEN, TRAILER_LEN, VERSION, encode_frame};
pub use ids::{Epoch, ExitNumber, Seq, SessionId};
pub use parts::{Assembler, split, split_encoded};
pub use reader::{EntryReader, FrameReader, Tail};

use thiserror::Error;

/// The largest append, in bytes. An entry that encodes to more is cut into parts.
pub const MAX_APPEND_LEN: usize = 64 * 1024;
/// The largest body of a frame, in bytes.
pub const MAX_BODY_LEN: usize = 1024 * 1024;
/// The most appends that one frame carries.
pub const MAX_COUNT: u32 = 64 * 1024;

/// Why bytes are not a log.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum Error {
    /// Fewer bytes than the header, or than the lengths in it, ask for.
    #[error("truncated: {needed} bytes needed, {got} there")]
    Truncated {
        /// Bytes that were needed.
        needed: usize,
        /// Bytes that were there.
        got: usize,
    },
    /// The bytes do not begin a frame or a record of ours.
    #[error("bad magic {0:#010x}: not a Pollux log")]
    Magic(u32),
    /// A version that this build does not read.
    #[error("log format version {0} is not version {VERSION} which this build reads")]
    Version(u16),
    /// Header or body differ from their checksum.
    #[error("checksum of the {what} is {found:#010x}, should be {expected:#010x}")]
    Checksum {
        /// Which part.
        what: &'static str,
        /// The stored checksum.
        expected: u32,
        /// The checksum of the bytes that came.
        found: u32,
    },
    /// A length or a count over its limit.
    #[error("{what} is {value}, the limit is {limit}")]
    Limit {
        /// Which quantity.
        what: &'static str,
        /// Its value.
        value: u64,
        /// Its limit.
        limit: u64,
    },
    /// An entry of a kind that this version does not know.
    #[error("unknown entry kind {0}")]
    Kind(u8),
    /// A field with a value that it cannot have.
    #[error("bad {0}")]
    Field(&'static str),
    /// A part of an entry that does not continue the parts before it.
    #[error("part out of order: {0}")]
    Part(&'static str),
}
