// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * The stations of a log entry, as the trace points of pollux and vhost-ftlog tell them (crate usdt): one
 * program for each, hooked to a no-op of the program by a uprobe, with the arguments session, from and
 * upto in the first three argument registers and the time in the fifth.
 *
 * Events go to a ring buffer whose reader looks by itself now and then: a wake-up here would cost the
 * program that is watched more than the event does.
 */
#include <linux/ptrace.h>
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "stations.h"

char LICENSE[] SEC("license") = "GPL";

/* The PID namespace that process ids are told in. Set by the loader. */
const volatile __u64 pid_namespace_device = 0;
const volatile __u64 pid_namespace_inode = 0;

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, EVENTS_BYTES);
} events SEC(".maps");

/* Events for which there was no room. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} lost SEC(".maps");

static __always_inline int pass(struct pt_regs *ctx, __u32 station)
{
	struct bpf_pidns_info who = {};
	struct station_event *event;

	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event) {
		__u32 first = 0;
		__u64 *count = bpf_map_lookup_elem(&lost, &first);

		if (count)
			*count += 1;
		return 0;
	}
	bpf_get_ns_current_pid_tgid(pid_namespace_device, pid_namespace_inode, &who, sizeof(who));
	event->time_ns = PT_REGS_PARM5(ctx);
	event->session = PT_REGS_PARM1(ctx);
	event->from = PT_REGS_PARM2(ctx);
	event->upto = PT_REGS_PARM3(ctx);
	event->station = station;
	event->process = who.tgid;
	bpf_ringbuf_submit(event, BPF_RB_NO_WAKEUP);
	return 0;
}

#define STATION(name, number)                                                                      \
	SEC("uprobe") int name(struct pt_regs *ctx)                                                \
	{                                                                                          \
		return pass(ctx, number);                                                          \
	}

/* Names and order of usdt::Station. */
STATION(appended, 0)
STATION(kicked, 1)
STATION(sent, 2)
STATION(received, 3)
STATION(committed, 4)
STATION(acknowledged, 5)
STATION(seen, 6)
STATION(released, 7)
