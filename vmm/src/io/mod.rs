//! The VM's host I/O: TAP, disk image and console on one io_uring, on a thread of its own.
//!
//! The vCPU's thread never waits for the host and no host I/O touches guest memory: frames and disk
//! data pass through buffers of this thread, and what comes in waits in a queue until the vCPU's
//! thread takes it at an execution point. This thread owns the output gate: what acts on the world
//! leaves only when the log that leads to it is acknowledged, and in order.

mod backend;
mod buffer;
mod disk;
mod gate;
mod handle;
mod requests;
mod ring;
mod storage;
mod tap;

pub use disk::{Disk, DiskError, DiskIdentity, DiskMode, SECTOR_LEN};
pub use handle::{Delivery, IoConfig, IoError, IoHandle, IoThread, spawn};
pub use storage::Storage;
pub use tap::{Tap, VNET_HEADER_LEN};
