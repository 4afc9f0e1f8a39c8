//! The session: drives the protocol's replica on this host and does what it says.
//!
//! ```text
//!  link ──┐                       ┌──▶ link            (messages to other VMMs)
//!  arbiter┤                       ├──▶ arbiter         (test-and-set of epochs)
//!  channel┼─▶ events ─▶ Replica ─▶┼──▶ channel         (sessions of the log)
//!  vCPU ──┤            (crate ft) ├──▶ primary/replica (the machine's threads)
//!  beats ─┘                       └──▶ gate, beats, status
//! ```
//! One owner: the session's thread owns the replica and every handle; other threads send it events.
//! What always holds: actions are done in their order, and none waits for an answer.

mod arrive;
mod beats;
mod busy;
mod clock;
mod config;
mod control;
mod driver;
mod event;
mod follow;
mod idle;
mod lead;
mod limits;
mod pair;
mod probes;
mod settings;
mod status;
mod transfer;
mod world;

pub use arrive::Cold;
pub use config::{FtSettings, epochs, find as find_program};
pub use control::SessionControl;
pub use driver::{Session, SessionEnd};
pub use settings::Devices;
