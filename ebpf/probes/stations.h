/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* What a trace point of a log entry's station tells: the mirror of ebpf_events::stations. */
#ifndef POLLUX_STATIONS_H
#define POLLUX_STATIONS_H

#include <linux/types.h>

#define EVENTS_BYTES (8 << 20)

struct station_event {
	__u64 time_ns;
	__u64 session;
	__u64 from;
	__u64 upto;
	__u32 station;
	__u32 process;
};

_Static_assert(sizeof(struct station_event) == 40, "ebpf-events: StationEvent");

#endif
