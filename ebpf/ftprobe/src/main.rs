//! Loads the eBPF probes, hands their maps out, exports what they saw.

fn main() {}
