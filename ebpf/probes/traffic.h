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

/* The hooks of the interface, which are also the directions as this host sees them. */
enum side {
	IN,
	OUT,
	SIDES,
};

/* Addresses of IPv4 are mapped into IPv6 (RFC 4291, section 2.5.5.2); ports in the host's order. */
struct flow_key {
	__u32 local[4];
	__u32 remote[4];
	__u16 local_port;
	__u16 remote_port;
	__u32 unused;
};

/*
 * The two directions of a flow pass on different CPUs, mostly: what the one writes lies at least this far
 * from what the other reads, which is more than a line of the cache.
 */
#define APART_BYTES 128

struct direction {
	__u64 bytes;
	__u64 packets;
	__u64 last_ns;
	__u32 next; /* TCP's sequence after the last byte */
	__u32 last_tick; /* of the kernel's clock, modulo 2^32 */
	__u8 apart[APART_BYTES - 32];
};

/* The frame that is being timed. */
struct timed_frame {
	__u64 end; /* position after its last append; 0: none is */
	__u64 passed_ns; /* when its last byte passed; 0: not yet */
	__u32 beyond; /* TCP's sequence after it */
	__u32 missed; /* none was found when one was looked for last */
	__u8 apart[APART_BYTES - 24];
};

struct flow {
	struct direction in;
	struct direction out;
	struct timed_frame timed;
	/* Written seldom. */
	__u64 session;
	__u64 rtt_us;
	__u64 retransmits;
	__u32 log_side; /* the direction that has frames */
	__u32 unused;
	__u8 apart[APART_BYTES - 32];
	/* Written with records. */
	__u64 ack_records;
	__u64 received;
	__u64 replayed;
	__u32 phase; /* where records begin: the sequence modulo their size */
	__u32 phase_known;
	struct histogram ack_latency;
};

_Static_assert(sizeof(struct flow_key) == 40, "ebpf-events: FlowKey");
_Static_assert(__builtin_offsetof(struct flow, session) == 3 * APART_BYTES, "ebpf-events: Flow");
_Static_assert(__builtin_offsetof(struct flow, ack_records) == 4 * APART_BYTES, "ebpf-events: Flow");
_Static_assert(sizeof(struct flow) == 4 * APART_BYTES + 32 + sizeof(struct histogram),
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

/* The programs that get what is not TCP, by hook; empty where there is none. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, SIDES);
	__type(key, __u32);
	__type(value, __u32);
} others SEC(".maps");

#endif
