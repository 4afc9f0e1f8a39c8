/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * The heartbeat packet and the maps of the heartbeat programs: the mirror of the crate ebpf-events,
 * which documents every field. A change there is a change here.
 */
#ifndef POLLUX_HEARTBEAT_H
#define POLLUX_HEARTBEAT_H

#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

#include "histogram.h"
#include "siphash.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the heartbeat programs read little-endian packets without swapping"
#endif

#define HEARTBEAT_MAGIC 0x42484c50U /* "PLHB" */
#define HEARTBEAT_VERSION 1
#define HEARTBEAT_BYTES 80
#define SIGNED_WORDS 9
#define HEARTBEAT_WORDS 10

#define MAX_SESSIONS 16
#define WINDOW_SLOTS 64

enum kind {
	KIND_REQUEST = 1,
	KIND_REPLY = 2,
};

enum reply_flag {
	FLAG_VMM_DEAD = 1,
	FLAG_DAEMON_DEAD = 2,
};

/* The packet as words. The first: magic, version, kind, key generation, flags. */
enum packet_word {
	WORD_OPENING,
	WORD_SESSION,
	WORD_EPOCH,
	WORD_SEQUENCE,
	WORD_NONCE,
	WORD_TIME,
	WORD_VMM_PROGRESS,
	WORD_DAEMON_PROGRESS,
	WORD_ECHO_TIME,
	WORD_TAG,
};

#define OPENING(kind, generation, flags)                                                           \
	((__u64)HEARTBEAT_MAGIC | (__u64)HEARTBEAT_VERSION << 32 | (__u64)(kind) << 40 |           \
	 (__u64)(generation) << 48 | (__u64)(flags) << 56)
#define OPENING_MAGIC(word) ((__u32)(word))
#define OPENING_VERSION(word) ((__u8)((word) >> 32))
#define OPENING_KIND(word) ((__u8)((word) >> 40))
#define OPENING_GENERATION(word) ((__u8)((word) >> 48))
#define OPENING_FLAGS(word) ((__u8)((word) >> 56))

struct window_slot {
	__u64 sequence;
	__u64 nonce;
	__u64 sent_ns;
	__u64 departed_ns;
};

struct vmm_page {
	__u64 progress;
	__u64 unused[7];
	struct window_slot window[WINDOW_SLOTS];
};

struct daemon_page {
	__u64 progress;
};

struct seen_page {
	__u64 version; /* odd while the words up to flags are being written */
	__u64 count;
	__u64 sequence;
	__u64 nonce;
	__u64 arrived_ns;
	__u64 departed_ns;
	__u64 sent_ns;
	__u64 peer_time_ns;
	__u64 peer_epoch;
	__u64 vmm_progress;
	__u64 daemon_progress;
	__u64 flags;
	__u64 local;
	__u64 highest_request;
	__u64 heard_ns;
	__u64 answered;
};

struct key_slot {
	__u8 used;
	__u8 generation;
	__u8 unused[6];
	struct sip_key theirs;
	struct sip_key ours;
};

struct session_entry {
	__u32 slot;
	__u32 unused;
	__u64 epoch;
	struct key_slot keys[2];
};

struct watched {
	__u32 vmm_of;
	__u32 daemon_of;
};

_Static_assert(sizeof(struct vmm_page) == 64 + 32 * WINDOW_SLOTS, "ebpf-events: VmmPage");
_Static_assert(sizeof(struct seen_page) == 128, "ebpf-events: SeenPage");
_Static_assert(sizeof(struct session_entry) == 96, "ebpf-events: SessionEntry");
_Static_assert(sizeof(struct watched) == 8, "ebpf-events: Watched");

enum counter {
	COUNT_ANSWERED,
	COUNT_ACCEPTED,
	COUNT_MALFORMED,
	COUNT_FORGED,
	COUNT_REPLAYED,
	COUNT_UNKNOWN_SESSION,
	COUNT_UNKNOWN_KEY,
	COUNT_UNMATCHED,
	COUNT_DEPARTED,
	COUNT_CONTENDED,
	COUNTERS,
};

/*
 * Pages: one map for each page, so that each process can be handed its own and no other. The inner
 * map is without names, and sized instead of typed: clang before 20 leaves out of the BTF what is
 * only reached by a pointer.
 */
#define PAGES_OF(page)                                                                             \
	struct {                                                                                   \
		__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);                                          \
		__uint(max_entries, MAX_SESSIONS);                                                 \
		__type(key, __u32);                                                                \
		__array(                                                                           \
			values, struct {                                                           \
				__uint(type, BPF_MAP_TYPE_ARRAY);                                  \
				__uint(map_flags, BPF_F_MMAPABLE);                                 \
				__uint(max_entries, 1);                                            \
				__uint(key_size, sizeof(__u32));                                   \
				__uint(value_size, sizeof(page));                                  \
			});                                                                        \
	}

PAGES_OF(struct vmm_page) vmm_pages SEC(".maps");
PAGES_OF(struct daemon_page) daemon_pages SEC(".maps");
PAGES_OF(struct seen_page) seen_pages SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_SESSIONS);
	__type(key, __u64);
	__type(value, struct session_entry);
} sessions SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4 * MAX_SESSIONS);
	__type(key, __u32);
	__type(value, struct watched);
} watched SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

/* Round trips by slot, from the egress probe to the arrival. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_SESSIONS);
	__type(key, __u32);
	__type(value, struct histogram);
} round_trips SEC(".maps");

static __always_inline void count(enum counter which)
{
	__u32 key = which;
	__u64 *value = bpf_map_lookup_elem(&counters, &key);

	if (value)
		*value += 1;
}

static __always_inline void *page_of(void *pages, __u32 slot)
{
	__u32 first = 0;
	void *map = bpf_map_lookup_elem(pages, &slot);

	return map ? bpf_map_lookup_elem(map, &first) : 0;
}

#endif
