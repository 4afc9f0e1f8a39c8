// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * The logging channel as the wire sees it, on the TCX hooks of its interface: bytes and packets by
 * flow and direction, the time from a frame to the acknowledgement record that covers it, and TCP's own
 * figures of the connection.
 *
 * A flow is known from the first segment that begins with a frame's header or consists of acknowledgement
 * records; what passed before is not counted. From then on one of its directions has frames and the other
 * has records. Of frames one at a time is timed: of the others the segments are counted, not looked into,
 * so that bulk data passes for little. Nothing is ever dropped or changed. What is read is only counted: a
 * stranger's look-alike can spoil a statistic, nothing else.
 *
 * Where heartbeats pass the same interface, one program stands on each hook: what is not TCP goes on to the
 * heartbeats' program by a tail call. Two programs would be two to enter for every segment of the log.
 *
 * log_ingress, log_egress   the two hooks
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

enum read {
	NOT_TCP,
	NO_PAYLOAD,
	PAYLOAD,
};

/* Of pure acknowledgements of TCP's nothing more is looked at. */
static __always_inline enum read read_tcp(const struct __sk_buff *skb, enum side side,
					  const struct tcphdr *tcp, __u32 tcp_at, __u32 ip_bytes,
					  struct segment *s)
{
	/* Of a segment larger than IP can say, the buffer knows; it also knows the padding of small ones. */
	if (!ip_bytes)
		ip_bytes = skb->len - ETH_HLEN;
	s->payload_at = tcp_at + tcp->doff * 4;
	if (ip_bytes <= s->payload_at)
		return NO_PAYLOAD;
	s->payload_bytes = ip_bytes - s->payload_at;
	s->sequence = bpf_ntohl(tcp->seq);
	s->packets = skb->gso_segs ? skb->gso_segs : 1;
	s->key.local_port = bpf_ntohs(side == OUT ? tcp->source : tcp->dest);
	s->key.remote_port = bpf_ntohs(side == OUT ? tcp->dest : tcp->source);
	s->key.unused = 0;
	return PAYLOAD;
}

/* The usual headers, which mostly lie in one piece and are read there. */
struct headers4 {
	struct iphdr ip;
	struct tcphdr tcp;
};

struct headers6 {
	struct ipv6hdr ip;
	struct tcphdr tcp;
};

_Static_assert(sizeof(struct headers4) == 40 && sizeof(struct headers6) == 60, "no gaps");

static __always_inline enum read read_v4(struct __sk_buff *skb, enum side side, struct segment *s)
{
	void *end = (void *)(long)skb->data_end;
	const struct headers4 *h = (void *)(long)skb->data + ETH_HLEN;
	const struct tcphdr *tcp;
	struct headers4 copy;
	__u32 tcp_at;

	if ((void *)(h + 1) > end) {
		if (load(skb, 0, &copy, sizeof(copy)))
			return NOT_TCP; /* too short for it */
		h = &copy;
	}
	if (h->ip.protocol != IPPROTO_TCP)
		return NOT_TCP;
	put_addresses(&s->key, side, &h->ip.saddr, &h->ip.daddr, 1);
	tcp = &h->tcp;
	tcp_at = h->ip.ihl * 4;
	if (tcp_at != sizeof(h->ip)) {
		if (load(skb, tcp_at, &copy.tcp, sizeof(copy.tcp)))
			return NO_PAYLOAD;
		tcp = &copy.tcp;
	}
	return read_tcp(skb, side, tcp, tcp_at, bpf_ntohs(h->ip.tot_len), s);
}

static __always_inline enum read read_v6(struct __sk_buff *skb, enum side side, struct segment *s)
{
	void *end = (void *)(long)skb->data_end;
	const struct headers6 *h = (void *)(long)skb->data + ETH_HLEN;
	struct headers6 copy;
	__u32 ip_bytes;

	if ((void *)(h + 1) > end) {
		if (load(skb, 0, &copy, sizeof(copy)))
			return NOT_TCP; /* too short for it */
		h = &copy;
	}
	if (h->ip.nexthdr != IPPROTO_TCP)
		return NOT_TCP;
	put_addresses(&s->key, side, &h->ip.saddr, &h->ip.daddr, 0);
	ip_bytes = h->ip.payload_len ? bpf_ntohs(h->ip.payload_len) + sizeof(h->ip) : 0;
	return read_tcp(skb, side, &h->tcp, sizeof(h->ip), ip_bytes, s);
}

static __always_inline enum read read_segment(struct __sk_buff *skb, enum side side,
					      struct segment *s)
{
	if (skb->protocol == bpf_htons(ETH_P_IP))
		return read_v4(skb, side, s);
	if (skb->protocol == bpf_htons(ETH_P_IPV6))
		return read_v6(skb, side, s);
	return NOT_TCP;
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

/* The sender sends whole records, and most segments are as it sent them. */
static __always_inline int begins_with_record(struct __sk_buff *skb, const struct segment *s,
					      struct ack_record *ack)
{
	return s->payload_bytes && s->payload_bytes % ACK_BYTES == 0 && read_ack(skb, s, 0, ack);
}

/* The last whole record of the segment, by the sequence at which records begin. */
static __always_inline int last_ack(struct __sk_buff *skb, const struct segment *s,
				    struct flow *flow, struct ack_record *ack)
{
	__u32 beyond;

	if (!flow->phase_known) {
		if (!begins_with_record(skb, s, ack))
			return 0;
		flow->phase = s->sequence % ACK_BYTES;
		flow->phase_known = 1;
	}
	beyond = (s->sequence + s->payload_bytes - flow->phase) % ACK_BYTES;
	if (s->payload_bytes < ACK_BYTES + beyond)
		return 0;
	return read_ack(skb, s, s->payload_bytes - beyond - ACK_BYTES, ack);
}

/* Makes a flow of a connection whose segment shows what it carries. */
static __always_inline struct flow *recognise(struct __sk_buff *skb, enum side side,
					      const struct segment *s)
{
	struct frame_header header;
	struct ack_record ack;
	struct flow *flow;
	__u32 first = 0;
	enum side log_side;

	if (begins_with_frame(skb, s, &header))
		log_side = side;
	else if (begins_with_record(skb, s, &ack))
		log_side = side == OUT ? IN : OUT;
	else
		return 0;
	flow = bpf_map_lookup_elem(&fresh_flow, &first);
	if (!flow)
		return 0;
	bpf_map_update_elem(&flows, &s->key, flow, BPF_NOEXIST);
	flow = bpf_map_lookup_elem(&flows, &s->key);
	if (flow)
		flow->log_side = log_side;
	return flow;
}

/*
 * Times a frame from the segment with its last byte on, unless another one is being timed. In bulk data
 * most segments begin inside of a frame: after one that does, none is looked into before the next tick,
 * once the flow's session is known.
 */
static __always_inline void frames_pass(struct __sk_buff *skb, struct flow *flow,
					const struct segment *s, int again, int tick)
{
	struct timed_frame *timed = &flow->timed;
	struct frame_header header;
	__u64 end = timed->end;

	if (tick)
		timed->missed = 0;
	if (end || again || timed->missed) {
		/* not looked for */
	} else if (!begins_with_frame(skb, s, &header)) {
		timed->missed = flow->session != 0;
	} else {
		end = header.first + header.count;
		flow->session = header.session[0];
		timed->passed_ns = 0;
		timed->beyond = s->sequence + FRAME_HEADER_BYTES + header.body_bytes + FRAME_TRAILER_BYTES;
		__sync_lock_test_and_set(&timed->end, header.count ? end : 0);
	}
	if (end && !timed->passed_ns && (__s32)(s->sequence + s->payload_bytes - timed->beyond) >= 0)
		timed->passed_ns = bpf_ktime_get_ns();
}

static __always_inline void records_pass(struct __sk_buff *skb, struct flow *flow,
					 const struct segment *s)
{
	struct timed_frame *timed = &flow->timed;
	struct ack_record ack;
	__u64 end, passed_ns;

	if (!last_ack(skb, s, flow, &ack))
		return;
	flow->ack_records += 1;
	if (ack.received > flow->received)
		flow->received = ack.received;
	if (ack.replayed > flow->replayed)
		flow->replayed = ack.replayed;
	end = *(volatile __u64 *)&timed->end;
	if (!end || end > ack.received)
		return;
	passed_ns = timed->passed_ns;
	if (__sync_val_compare_and_swap(&timed->end, end, 0) == end && passed_ns)
		observe(&flow->ack_latency, bpf_ktime_get_ns() - passed_ns);
}

/* What TCP itself knows of the connection, as its segments leave. */
static __always_inline void ask_tcp(struct __sk_buff *skb, struct flow *flow)
{
	struct bpf_sock *sk = skb->sk;
	struct bpf_tcp_sock *tcp;

	if (!sk)
		return;
	tcp = bpf_tcp_sock(sk);
	if (!tcp)
		return;
	flow->rtt_us = tcp->srtt_us >> 3; /* it holds eight times the smoothed round trip */
	flow->retransmits = tcp->total_retrans;
}

/* What passes on one of the hooks. */
static __always_inline int pass(struct __sk_buff *skb, enum side side)
{
	struct direction *direction;
	__u32 next, again, tick;
	struct segment s;
	struct flow *flow;
	__u64 jiffies;

	switch (read_segment(skb, side, &s)) {
	case NOT_TCP:
		bpf_tail_call(skb, &others, side);
		return TC_ACT_UNSPEC; /* there is no other */
	case NO_PAYLOAD:
		return TC_ACT_UNSPEC;
	default:
		break;
	}
	flow = bpf_map_lookup_elem(&flows, &s.key);
	if (!flow)
		flow = recognise(skb, side, &s);
	if (!flow)
		return TC_ACT_UNSPEC;
	direction = side == OUT ? &flow->out : &flow->in;
	next = s.sequence + s.payload_bytes;
	again = direction->last_ns && (__s32)(s.sequence - direction->next) < 0;
	if (!direction->last_ns || (__s32)(next - direction->next) > 0)
		direction->next = next;
	/* To some milliseconds, which is all that silence is measured in. */
	jiffies = bpf_jiffies64();
	tick = direction->last_tick != (__u32)jiffies || !direction->last_ns;
	if (tick) {
		direction->last_tick = jiffies;
		direction->last_ns = bpf_ktime_get_coarse_ns();
	}
	__sync_fetch_and_add(&direction->bytes, s.payload_bytes);
	__sync_fetch_and_add(&direction->packets, s.packets);
	if (flow->log_side == side)
		frames_pass(skb, flow, &s, again, tick);
	else
		records_pass(skb, flow, &s);
	if (side == OUT && tick)
		ask_tcp(skb, flow);
	return TC_ACT_UNSPEC;
}

SEC("classifier")
int log_ingress(struct __sk_buff *skb)
{
	return pass(skb, IN);
}

SEC("classifier")
int log_egress(struct __sk_buff *skb)
{
	return pass(skb, OUT);
}
