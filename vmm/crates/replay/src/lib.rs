//! Record and replay: the guest as a deterministic machine, driven live or from a log.
//!
//! The guest is deterministic between synchronous exits, so **the number of the exit is the clock**.
//! [`Machine`] is the guest with its board; it moves only by running to the next exit and by applying
//! logged inputs at one. [`Recorder`] drives it from the outside world and writes a log; [`Replayer`]
//! drives it from that log and compares what it does. Both call the same `Machine`, so they cannot
//! drift apart.
//!
//! ```text
//!            run                    time / nothing              leave
//!   Left ───────────▶ Access(exit) ───────────────▶ Open ───────────────▶ Left
//!     │  kicked                       access done     ▲ │ inputs, in the log's order
//!     └──────────▶ delta ───────────▶ Between ────────┼─┘
//!                                        └── inputs ──┘
//! ```
//!
//! What always holds: a machine leaves an exit only with an interrupt to deliver if it is halted;
//! device state changes only at an exit or at a delta; the host's clock is seen only as a logged
//! `Time`. docs/determinism.md classifies every source of nondeterminism.

mod clearing;
mod clock;
mod delta;
mod digest;
mod divergence;
mod effects;
mod machine;
mod recent;
mod recorder;
mod recording;
mod replayer;
mod saved;
mod sources;

pub use clock::VirtualClock;
pub use digest::Digest;
pub use divergence::{Divergence, Mismatch, line};
pub use effects::OutputSum;
pub use machine::{Machine, MachineConfig, MachineError, Patches, Ran, TrapPorts};
pub use recent::RecentOutput;
pub use recorder::{LogError, LogSink, NoLog, Outside, RecordError, Recorder, RecorderStats, Step};
pub use recording::{
    RecordingError, RecordingId, RecordingReader, RecordingWriter, incomplete_path,
};
pub use replayer::{ReplayError, Replayed, Replayer};
pub use saved::{MACHINE_SCHEMA, MachineState, SavedError, load_machine, save_machine};
pub use sources::{Class, SOURCES, Source};
