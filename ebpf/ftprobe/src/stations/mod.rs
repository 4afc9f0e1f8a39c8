//! Where the time of a log entry goes: the trace points of `pollux` and `vhost-ftlog`, hooked, recorded,
//! joined into chains of stations, and shown as a table or as a trace.
//!
//! ```text
//!   notes → uprobe → watch → recording ─┬─ join ─┬─ table
//!                                clock ─┘        └─ trace
//! ```
//!
//! Each host records its own stations on its own clock. Recordings of both hosts are joined on the clock
//! of the first, with the offsets that their heartbeats have measured and a bound on the error.

mod clock;
mod join;
mod notes;
mod recording;
mod table;
mod trace;
mod uprobe;
mod watch;

pub use clock::{Clocks, Offset};
pub use join::{Chain, Joined, join};
pub use notes::{Note, NoteError, notes_of};
pub use recording::{ClockSample, Header, Recording, RecordingError, Writer};
pub use table::Stages;
pub use trace::chrome;
pub use watch::{Target, Watch, WatchError, programs};
