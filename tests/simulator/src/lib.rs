//! A simulator that tries to break the fault-tolerance protocol.
//!
//! Two to four hosts on one simulated clock run the protocol's own code (`ft::Replica`, its output gate, its
//! lag control, its directory arbiter) and speak in the channel's own format; a toy guest, network, storage,
//! daemons and clients are simulated, and go wrong as its seed says. [`check`] judges what comes of it. The
//! same seed gives the same run to the byte.
//!
//! | part | what it is |
//! |---|---|
//! | [`plan`] | what a seed means: options of the world, faults |
//! | [`sim`] | the world |
//! | [`guest`] | the deterministic toy guest |
//! | [`check`] | what must hold |
//! | [`campaign`] | many seeds on all cores |
//! | [`shrink`] | a failing seed with as little trouble as still fails |
#![forbid(unsafe_code)]

pub mod campaign;
pub mod check;
pub mod guest;
pub mod plan;
pub mod rng;
pub mod shrink;
pub mod sim;
pub mod trace;
