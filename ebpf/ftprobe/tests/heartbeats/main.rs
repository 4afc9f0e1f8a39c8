//! `ftprobe` between two hosts: who answers heartbeats, what is refused, which deaths are seen, and
//! what is left behind.

#![allow(clippy::unwrap_used)] // a test fails by panicking

mod answers;
mod life;
mod metrics;
mod processes;
mod refused;
mod world;
