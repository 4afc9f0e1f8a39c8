//! A seeded simulator that tries to break the protocol.

fn main() {}
