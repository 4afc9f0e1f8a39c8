//! The compiled eBPF objects, as build.rs made them.

use aya::include_bytes_aligned;

/// Heartbeats and the watch for exits (`ebpf/probes/heartbeat.bpf.c`).
pub(crate) const HEARTBEAT: &[u8] =
    include_bytes_aligned!(concat!(env!("OUT_DIR"), "/heartbeat.bpf.o"));
