//! What the eBPF programs and their readers share: the heartbeat packet, the layout of the maps, and
//! histograms.
//!
//! The same bytes are read and written in two languages: by the C programs in `ebpf/probes`
//! (`heartbeat.h` there is the mirror of this crate) and by the userspace prober and responder. A
//! change of a layout changes both and the version of what it changes. No I/O, no clock, no unsafe.

#![forbid(unsafe_code)]

pub mod exits;
pub mod histogram;
pub mod key;
pub mod maps;
pub mod packet;
pub mod stations;
pub mod traffic;

pub use key::{Key, KeyGeneration, SessionKeys, Side};
pub use packet::{HEARTBEAT_BYTES, Kind, Opening, PacketError, Reply, ReplyFlags, Request};
