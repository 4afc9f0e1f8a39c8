//! Any bytes are a script for a guest: drivers used well and badly, hostile rings, random accesses and inputs, on a
//! board and on one restored from its saved state. No device may panic, and the two must look the same.

#![no_main]

#[path = "../../../vmm/crates/devices/tests/board/guest.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod guest;
#[path = "../../../vmm/crates/devices/tests/board/ops.rs"]
mod ops;
#[path = "../../../vmm/crates/devices/tests/board/script.rs"]
mod script;

libfuzzer_sys::fuzz_target!(|data: &[u8]| script::fuzz_entry(data));
