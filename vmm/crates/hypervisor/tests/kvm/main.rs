//! The KVM implementation against a real `/dev/kvm`, with guests of a few instructions.
//!
//! Without `/dev/kvm` each test is skipped by name; with POLLUX_REQUIRE_KVM=1 it fails instead.
#![allow(unsafe_code)] // Guest code is assembled into the test and read as bytes.
#![allow(clippy::unwrap_used)] // A test fails by panicking; its helpers too.

mod access;
mod guest;
mod interrupt;
mod kick;
mod memory;
mod probe;
mod state;
