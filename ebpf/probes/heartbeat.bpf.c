// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * Heartbeats answered and time-stamped in the kernel, so that a starved host is not taken for a dead
 * one, and a mark for processes that exit.
 *
 * heartbeat_xdp      catches requests and replies on the heartbeat interface (native or generic XDP)
 * heartbeat_ingress  the same on TCX, where XDP is not possible or would cost too much
 * heartbeat_egress   notes when a request leaves this host
 * process_exit       marks a VMM or channel daemon dead the moment its last thread exits
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "exchange.h"
#include "frame.h"
#include "heartbeat.h"

char LICENSE[] SEC("license") = "GPL";

/* The PID namespace that registered process ids belong to. Set by the loader. */
const volatile __u64 pid_namespace_device = 0;
const volatile __u64 pid_namespace_inode = 0;

SEC("xdp")
int heartbeat_xdp(struct xdp_md *ctx)
{
	__u64 words[HEARTBEAT_WORDS];
	struct frame f;

	switch (find_heartbeat(&f, (void *)(long)ctx->data, (void *)(long)ctx->data_end)) {
	case NOT_OURS:
		return XDP_PASS;
	case BROKEN:
		count(COUNT_MALFORMED);
		return XDP_DROP;
	default:
		break;
	}
	__builtin_memcpy(words, f.payload, sizeof(words));
	switch (exchange(words, f.to_port, f.from_port, bpf_ktime_get_ns())) {
	case LEAVE:
		return XDP_PASS;
	case DROP:
		return XDP_DROP;
	default:
		break;
	}
	__builtin_memcpy(f.payload, words, sizeof(words));
	turn_addresses(&f);
	checksum_anew(&f);
	return XDP_TX;
}

/* Where in the frame the UDP checksum is. */
static __always_inline __u32 checksum_offset(const struct frame *f)
{
	__u32 ip = f->ip_version == 4 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);

	return sizeof(struct ethhdr) + ip + __builtin_offsetof(struct udphdr, check);
}

SEC("classifier")
int heartbeat_ingress(struct __sk_buff *skb)
{
	__u64 before[HEARTBEAT_WORDS];
	__u64 words[HEARTBEAT_WORDS];
	struct frame f;
	__u32 offset;
	__s64 change;

	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6))
		return TC_ACT_UNSPEC;
	switch (find_heartbeat(&f, (void *)(long)skb->data, (void *)(long)skb->data_end)) {
	case NOT_OURS:
		return TC_ACT_UNSPEC;
	case BROKEN:
		count(COUNT_MALFORMED);
		return TC_ACT_SHOT;
	default:
		break;
	}
	__builtin_memcpy(words, f.payload, sizeof(words));
	__builtin_memcpy(before, words, sizeof(words));
	switch (exchange(words, f.to_port, f.from_port, bpf_ktime_get_ns())) {
	case LEAVE:
		return TC_ACT_UNSPEC;
	case DROP:
		return TC_ACT_SHOT;
	default:
		break;
	}
	__builtin_memcpy(f.payload, words, sizeof(words));
	turn_addresses(&f);
	/*
	 * The packet may still wait for its checksum from the sender's offload, or have a full one: the
	 * helper knows which and treats both right. Turned addresses and ports change no sum.
	 */
	offset = checksum_offset(&f);
	change = bpf_csum_diff((void *)before, sizeof(before), (void *)words, sizeof(words), 0);
	if (bpf_l4_csum_replace(skb, offset, 0, change, BPF_F_MARK_MANGLED_0))
		return TC_ACT_SHOT;
	return bpf_redirect(skb->ifindex, 0);
}

SEC("classifier")
int heartbeat_egress(struct __sk_buff *skb)
{
	struct session_entry *session;
	struct window_slot *sent;
	struct vmm_page *vmm;
	struct frame f;
	__u64 id;

	if (find_heartbeat(&f, (void *)(long)skb->data, (void *)(long)skb->data_end) != HEARTBEAT ||
	    !f.to_port || OPENING_KIND(f.payload[WORD_OPENING]) != KIND_REQUEST)
		return TC_ACT_UNSPEC;
	id = f.payload[WORD_SESSION];
	session = bpf_map_lookup_elem(&sessions, &id);
	vmm = session ? page_of(&vmm_pages, session->slot) : 0;
	if (!vmm)
		return TC_ACT_UNSPEC;
	sent = &vmm->window[f.payload[WORD_SEQUENCE] % WINDOW_SLOTS];
	if (sent->sequence != f.payload[WORD_SEQUENCE] || sent->nonce != f.payload[WORD_NONCE] ||
	    sent->departed_ns)
		return TC_ACT_UNSPEC;
	sent->departed_ns = bpf_ktime_get_ns();
	count(COUNT_DEPARTED);
	return TC_ACT_UNSPEC;
}

typedef struct {
	int counter;
} atomic_t;

struct signal_struct {
	atomic_t live;
} __attribute__((preserve_access_index));

struct task_struct {
	struct signal_struct *signal;
} __attribute__((preserve_access_index));

static __always_inline void mark(__u32 slots, __u64 flag)
{
	for (__u32 slot = 0; slot < MAX_SESSIONS; slot++) {
		struct seen_page *seen;

		if (!(slots & (1U << slot)))
			continue;
		seen = page_of(&seen_pages, slot);
		if (seen)
			__sync_fetch_and_or(&seen->local, flag);
	}
}

SEC("tp_btf/sched_process_exit")
int BPF_PROG(process_exit, struct task_struct *task)
{
	struct bpf_pidns_info who;
	struct watched *known;

	if (task->signal->live.counter)
		return 0; /* other threads of the process live on */
	if (bpf_get_ns_current_pid_tgid(pid_namespace_device, pid_namespace_inode, &who,
					sizeof(who)))
		return 0;
	known = bpf_map_lookup_elem(&watched, &who.tgid);
	if (!known)
		return 0;
	mark(known->vmm_of, FLAG_VMM_DEAD);
	mark(known->daemon_of, FLAG_DAEMON_DEAD);
	bpf_map_delete_elem(&watched, &who.tgid);
	return 0;
}
