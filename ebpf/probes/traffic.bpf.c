// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * The logging channel as the wire sees it, on the TCX hooks of its interface: bytes and packets by
 * flow and direction, and the time from a frame to the acknowledgement record that covers it.
 *
 * A flow is known from the first segment that begins with a frame's header or ends with an
 * acknowledgement record; what passed before is not counted. Nothing is ever dropped or changed. What
 * is read is only counted: a stranger's look-alike can spoil a statistic, nothing else.
 *
 * log_ingress, log_egress   the two hooks
 * tcp_seen                  round trip, retransmits and window, from the tracepoint tcp_probe
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "traffic.h"

char LICENSE[] SEC("license") = "GPL";

/* Formats of vhost-ftlog/format: frame headers and acknowledgement records. */
#define FRAME_MAGIC 0x4c584c50U /* "PLXL" */
#define FRAME_VERSION 2
#define FRAME_HEADER_BYTES 64
#define FRAME_TRAILER_BYTES 4
#define ACK_MAGIC 0x41584c50U /* "PLXA" */
#define ACK_BYTES 32

struct frame_header {
	__u32 magic;
	__u16 version;
	__u16 flags;
	__u64 session[2];
	__u64 epoch;
	__u64 first;
	__u32 count;
	__u32 body_bytes;
};

struct ack_record {
	__u32 magic;
	__u32 session;
	__u64 received;
	__u64 replayed;
	__u32 zero;
	__u32 checksum;
};

enum side {
	IN,
	OUT,
};

struct segment {
	struct flow_key key;
	__u32 sequence;
	__u32 payload_at; /* offset from the network header */
	__u32 payload_bytes;
	__u32 packets;
};

/* From the network header on. Not by the relative helper: that one does not reach into fragments. */
static __always_inline int load(struct __sk_buff *skb, __u32 at, void *to, __u32 bytes)
{
	return bpf_skb_load_bytes(skb, ETH_HLEN + at, to, bytes);
}

static __always_inline void put_v4(__u32 to[4], __be32 address)
{
	to[0] = 0;
	to[1] = 0;
	to[2] = bpf_htonl(0xffff);
	to[3] = address;
}

static __always_inline void put_addresses(struct flow_key *key, enum side side, const void *source,
					  const void *destination, int v4)
{
	__u32 *from = side == OUT ? key->local : key->remote;
	__u32 *to = side == OUT ? key->remote : key->local;

	if (v4) {
		put_v4(from, *(const __be32 *)source);
		put_v4(to, *(const __be32 *)destination);
	} else {
		__builtin_memcpy(from, source, 16);
		__builtin_memcpy(to, destination, 16);
	}
}

/* The usual headers, which are read at once. */
struct headers4 {
	struct iphdr ip;
	struct tcphdr tcp;
};

struct headers6 {
	struct ipv6hdr ip;
	struct tcphdr tcp;
};

_Static_assert(sizeof(struct headers4) == 40 && sizeof(struct headers6) == 60, "no gaps");

/* True where there is payload; of pure acknowledgements of TCP's nothing more is looked at. */
static __always_inline int measure_segment(const struct __sk_buff *skb, const struct tcphdr *tcp,
					   __u32 tcp_at, __u32 ip_bytes, struct segment *s)
{
	/* Of a segment larger than IP can say, the buffer knows; it also knows the padding of small ones. */
	if (!ip_bytes)
		ip_bytes = skb->len - ETH_HLEN;
	s->payload_at = tcp_at + tcp->doff * 4;
	if (ip_bytes <= s->payload_at)
		return 0;
	s->payload_bytes = ip_bytes - s->payload_at;
	s->sequence = bpf_ntohl(tcp->seq);
	s->packets = skb->gso_segs ? skb->gso_segs : 1;
	return 1;
}

static __always_inline void put_ports(struct flow_key *key, enum side side, const struct tcphdr *tcp)
{
	key->local_port = bpf_ntohs(side == OUT ? tcp->source : tcp->dest);
	key->remote_port = bpf_ntohs(side == OUT ? tcp->dest : tcp->source);
	key->unused = 0;
}

/* Reads the headers down to TCP's; false if it is no TCP segment with payload. */
static __always_inline int read_segment(struct __sk_buff *skb, enum side side, struct segment *s)
{
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct headers4 h;
		__u32 tcp_at;

		if (load(skb, 0, &h, sizeof(h)) || h.ip.protocol != IPPROTO_TCP)
			return 0;
		tcp_at = h.ip.ihl * 4;
		if (tcp_at != sizeof(h.ip) && load(skb, tcp_at, &h.tcp, sizeof(h.tcp)))
			return 0;
		if (!measure_segment(skb, &h.tcp, tcp_at, bpf_ntohs(h.ip.tot_len), s))
			return 0;
		put_addresses(&s->key, side, &h.ip.saddr, &h.ip.daddr, 1);
		put_ports(&s->key, side, &h.tcp);
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct headers6 h;
		__u32 ip_bytes;

		if (load(skb, 0, &h, sizeof(h)) || h.ip.nexthdr != IPPROTO_TCP)
			return 0;
		ip_bytes = h.ip.payload_len ? bpf_ntohs(h.ip.payload_len) + sizeof(h.ip) : 0;
		if (!measure_segment(skb, &h.tcp, sizeof(h.ip), ip_bytes, s))
			return 0;
		put_addresses(&s->key, side, &h.ip.saddr, &h.ip.daddr, 0);
		put_ports(&s->key, side, &h.tcp);
	} else {
		return 0;
	}
	return 1;
}

static __always_inline int begins_with_frame(struct __sk_buff *skb, const struct segment *s,
					     struct frame_header *header)
{
	if (s->payload_bytes < FRAME_HEADER_BYTES)
		return 0;
	if (load(skb, s->payload_at, header, sizeof(*header)))
		return 0;
	return header->magic == FRAME_MAGIC && header->version == FRAME_VERSION;
}

static __always_inline int read_ack(struct __sk_buff *skb, const struct segment *s, __u32 at,
				    struct ack_record *ack)
{
	if (load(skb, s->payload_at + at, ack, sizeof(*ack)))
		return 0;
	return ack->magic == ACK_MAGIC && !ack->zero && ack->replayed <= ack->received;
}

/* The last whole record of the segment, by the sequence at which records begin. */
static __always_inline int last_ack(struct __sk_buff *skb, const struct segment *s,
				    const struct flow *flow, enum side side, struct ack_record *ack)
{
	__u32 beyond;

	if (!flow || !flow->phase_known[side]) {
		/* Not known yet: the sender sends whole records, so most segments end with one. */
		return s->payload_bytes >= ACK_BYTES &&
		       read_ack(skb, s, s->payload_bytes - ACK_BYTES, ack);
	}
	beyond = (s->sequence + s->payload_bytes - flow->phase[side]) % ACK_BYTES;
	if (s->payload_bytes < ACK_BYTES + beyond)
		return 0;
	return read_ack(skb, s, s->payload_bytes - beyond - ACK_BYTES, ack);
}

static __always_inline struct flow *new_flow(const struct segment *s)
{
	__u32 first = 0;
	struct flow *fresh = bpf_map_lookup_elem(&fresh_flow, &first);

	if (!fresh)
		return 0;
	bpf_map_update_elem(&flows, &s->key, fresh, BPF_NOEXIST);
	return bpf_map_lookup_elem(&flows, &s->key);
}

/* Notes a frame that has passed whole and for the first time. */
static __always_inline void frame_passed(struct flow *flow, struct direction *direction,
					 const struct segment *s, const struct frame_header *header,
					 __u64 now)
{
	__u64 end = header->first + header->count;
	struct pending_frame *slot;

	__sync_fetch_and_add(&direction->frames, 1);
	flow->session = header->session[0];
	if (end <= flow->highest_end || !header->count ||
	    s->payload_bytes < FRAME_HEADER_BYTES + header->body_bytes + FRAME_TRAILER_BYTES)
		return;
	flow->highest_end = end;
	slot = &flow->pending[end % PENDING_FRAMES];
	*(volatile __u64 *)&slot->end = 0;
	slot->passed_ns = now;
	*(volatile __u64 *)&slot->end = end;
}

static __always_inline void ack_passed(struct flow *flow, const struct ack_record *ack, __u64 now)
{
	__sync_fetch_and_add(&flow->ack_records, 1);
	flow->ack_last_ns = now;
	if (ack->received > flow->received)
		flow->received = ack->received;
	if (ack->replayed > flow->replayed)
		flow->replayed = ack->replayed;
	/* Unrolled: without CAP_PERFMON the verifier takes no offset that changes from turn to turn. */
#pragma unroll
	for (int i = 0; i < PENDING_FRAMES; i++) {
		struct pending_frame *slot = &flow->pending[i];
		__u64 end = slot->end;

		if (!end || end > ack->received)
			continue;
		if (__sync_val_compare_and_swap(&slot->end, end, 0) == end)
			observe(&flow->ack_latency, now - slot->passed_ns);
	}
}

static __always_inline void see(struct __sk_buff *skb, enum side side)
{
	struct frame_header header;
	struct direction *direction;
	struct ack_record ack;
	struct segment s;
	struct flow *flow;
	int frame, record;

	if (!read_segment(skb, side, &s))
		return;
	flow = bpf_map_lookup_elem(&flows, &s.key);
	frame = begins_with_frame(skb, &s, &header);
	record = !frame && last_ack(skb, &s, flow, side, &ack);
	if (!flow && (frame || record))
		flow = new_flow(&s);
	if (!flow)
		return;
	direction = side == OUT ? &flow->out : &flow->in;
	__sync_fetch_and_add(&direction->bytes, s.payload_bytes);
	__sync_fetch_and_add(&direction->packets, s.packets);
	/* To some milliseconds, which is all that silence is measured in. */
	direction->last_ns = bpf_ktime_get_coarse_ns();
	if (frame)
		frame_passed(flow, direction, &s, &header, bpf_ktime_get_ns());
	if (record) {
		if (!flow->phase_known[side]) {
			flow->phase[side] = (s.sequence + s.payload_bytes) % ACK_BYTES;
			flow->phase_known[side] = 1;
		}
		ack_passed(flow, &ack, bpf_ktime_get_ns());
	}
}

SEC("classifier")
int log_ingress(struct __sk_buff *skb)
{
	see(skb, IN);
	return TC_ACT_UNSPEC;
}

SEC("classifier")
int log_egress(struct __sk_buff *skb)
{
	see(skb, OUT);
	return TC_ACT_UNSPEC;
}


struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
} __attribute__((preserve_access_index));

struct sock {
	struct sock_common __sk_common;
} __attribute__((preserve_access_index));

struct tcp_sock {
	__u32 srtt_us; /* eight times the smoothed round trip */
	__u32 snd_cwnd;
	__u32 total_retrans;
} __attribute__((preserve_access_index));

#define AF_INET 2
#define AF_INET6 10

/* When this CPU last took TCP's figures of a flow, in jiffies. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} taken SEC(".maps");

/* Of the packets within one jiffy one in this many is looked at, so that no flow hides another. */
#define LOOK_AT_ONE_IN 16

SEC("tp_btf/tcp_probe")
int BPF_PROG(tcp_seen, struct sock *sk)
{
	struct flow_key key = {};
	struct tcp_sock *tcp;
	struct flow *flow;
	__u32 first = 0;
	__u64 *last = bpf_map_lookup_elem(&taken, &first);

	if (last && *last == bpf_jiffies64() && bpf_get_prandom_u32() % LOOK_AT_ONE_IN)
		return 0;
	key.local_port = sk->__sk_common.skc_num;
	key.remote_port = bpf_ntohs(sk->__sk_common.skc_dport);
	if (sk->__sk_common.skc_family == AF_INET) {
		put_v4(key.local, sk->__sk_common.skc_rcv_saddr);
		put_v4(key.remote, sk->__sk_common.skc_daddr);
	} else if (sk->__sk_common.skc_family == AF_INET6) {
		struct in6_addr local = sk->__sk_common.skc_v6_rcv_saddr;
		struct in6_addr remote = sk->__sk_common.skc_v6_daddr;

		__builtin_memcpy(key.local, &local, 16);
		__builtin_memcpy(key.remote, &remote, 16);
	} else {
		return 0;
	}
	flow = bpf_map_lookup_elem(&flows, &key);
	tcp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);
	if (!flow || !tcp)
		return 0;
	flow->rtt_us = tcp->srtt_us >> 3;
	flow->retransmits = tcp->total_retrans;
	flow->congestion_window = tcp->snd_cwnd;
	if (last)
		*last = bpf_jiffies64();
	return 0;
}
