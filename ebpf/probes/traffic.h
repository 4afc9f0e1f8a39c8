/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * What is kept of a flow of the logging channel: the mirror of ebpf_events::traffic, which documents
 * every field. Names as there: in and out are seen from this host.
 */
#ifndef POLLUX_TRAFFIC_H
#define POLLUX_TRAFFIC_H

#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

#include "histogram.h"

#define MAX_FLOWS 64
#define PENDING_FRAMES 32

/* Addresses of IPv4 are mapped into IPv6 (RFC 4291, section 2.5.5.2); ports in the host's order. */
struct flow_key {
	__u32 local[4];
	__u32 remote[4];
	__u16 local_port;
	__u16 remote_port;
	__u32 unused;
};

struct direction {
	__u64 bytes;
	__u64 packets;
	__u64 last_ns;
	__u64 frames; /* headers of frames seen at the beginning of a segment */
};

/* A frame that has passed whole and waits for the record that covers it. */
struct pending_frame {
	__u64 end; /* 0: free */
	__u64 passed_ns;
};

struct flow {
	__u64 session;
	struct direction in;
	struct direction out;
	__u64 ack_records;
	__u64 ack_last_ns;
	__u64 received;
	__u64 replayed;
	__u64 highest_end;
	__u64 rtt_us;
	__u64 retransmits;
	__u64 congestion_window;
	struct histogram ack_latency;
	struct pending_frame pending[PENDING_FRAMES];
	/* Where records begin in each direction: the sequence modulo their size, and whether it is known. */
	__u32 phase[2];
	__u32 phase_known[2];
};

_Static_assert(sizeof(struct flow_key) == 40, "ebpf-events: FlowKey");
_Static_assert(__builtin_offsetof(struct flow, ack_latency) == 136, "ebpf-events: Flow");
_Static_assert(sizeof(struct flow) == 136 + 16 + 8 * HISTOGRAM_BUCKETS + 16 * PENDING_FRAMES + 16,
	       "ebpf-events: Flow");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_FLOWS);
	__type(key, struct flow_key);
	__type(value, struct flow);
} flows SEC(".maps");

/* A flow in which nothing has happened: the value that new ones begin as. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct flow);
} fresh_flow SEC(".maps");

#endif
