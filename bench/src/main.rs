//! Benchmarks of Pollux.

fn main() {}
