//! The logging channel daemon.

fn main() {}
