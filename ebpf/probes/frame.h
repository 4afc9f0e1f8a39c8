/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Finds the heartbeat in an Ethernet frame and turns a request's headers into those of its reply.
 *
 * Understands UDP over IPv4 without options and IPv6 without extension headers, not fragmented, not
 * tagged (attach to the VLAN interface itself). All else is left alone.
 */
#ifndef POLLUX_FRAME_H
#define POLLUX_FRAME_H

#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>

#include "heartbeat.h"

/* UDP port of the responders. Set by the loader. */
const volatile __u16 heartbeat_port = 7879;

#define UDP_BYTES (sizeof(struct udphdr) + HEARTBEAT_BYTES)
#define IP_FRAGMENT_MASK 0x3fff /* more fragments, or an offset */
#define REPLY_TTL 64

/*
 * A loader without CAP_PERFMON may not compare a packet pointer with null, nor add anything but a
 * constant to it. So no pointer here is ever null, and this keeps the compiler from turning two
 * constants on two paths into one addition of a variable.
 */
static __always_inline void *computed_here(void *pointer)
{
	asm volatile("" : "+r"(pointer));
	return pointer;
}

struct frame {
	struct ethhdr *eth;
	struct udphdr *udp;
	__u64 *payload;
	int ip_version;
	int to_port;
	int from_port;
};

enum found {
	NOT_OURS,
	BROKEN,	   /* to our port, but no heartbeat */
	HEARTBEAT,
};

static __always_inline struct iphdr *ip4_of(const struct frame *f)
{
	return (void *)(f->eth + 1);
}

static __always_inline struct ipv6hdr *ip6_of(const struct frame *f)
{
	return (void *)(f->eth + 1);
}

/* Sets eth, ip_version and udp; false where there is no UDP header to be found. */
static __always_inline int find_udp(struct frame *f, void *data, void *end)
{
	f->eth = data;
	if ((void *)(f->eth + 1) > end)
		return 0;
	if (f->eth->h_proto == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = ip4_of(f);

		if ((void *)(ip + 1) > end || ip->version != 4 || ip->ihl != 5 ||
		    ip->protocol != IPPROTO_UDP || (ip->frag_off & bpf_htons(IP_FRAGMENT_MASK)))
			return 0;
		f->ip_version = 4;
		f->udp = computed_here(ip + 1);
	} else if (f->eth->h_proto == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = ip6_of(f);

		if ((void *)(ip + 1) > end || ip->version != 6 || ip->nexthdr != IPPROTO_UDP)
			return 0;
		f->ip_version = 6;
		f->udp = computed_here(ip + 1);
	} else {
		return 0;
	}
	return (void *)(f->udp + 1) <= end;
}

static __always_inline int ip_length_fits(const struct frame *f)
{
	if (f->ip_version == 4)
		return ip4_of(f)->tot_len == bpf_htons(sizeof(struct iphdr) + UDP_BYTES);
	return ip6_of(f)->payload_len == bpf_htons(UDP_BYTES);
}

static __always_inline enum found find_heartbeat(struct frame *f, void *data, void *end)
{
	if (!find_udp(f, data, end))
		return NOT_OURS;
	f->payload = (void *)(f->udp + 1);
	f->to_port = f->udp->dest == bpf_htons(heartbeat_port);
	f->from_port = f->udp->source == bpf_htons(heartbeat_port);
	if (!f->to_port && !f->from_port)
		return NOT_OURS;
	if (f->udp->len != bpf_htons(UDP_BYTES) || !ip_length_fits(f) ||
	    (void *)(f->payload + HEARTBEAT_WORDS) > end ||
	    OPENING_MAGIC(f->payload[WORD_OPENING]) != HEARTBEAT_MAGIC)
		/* A port of ours as the source alone may be anybody's client socket. */
		return f->to_port ? BROKEN : NOT_OURS;
	/* A group address cannot be answered from. */
	return f->eth->h_dest[0] & 1 ? BROKEN : HEARTBEAT;
}

static __always_inline __u16 fold(__u64 sum)
{
#pragma unroll
	for (int i = 0; i < 4; i++)
		sum = (sum & 0xffff) + (sum >> 16);
	return ~(__u16)sum;
}

static __always_inline void turn_addresses(struct frame *f)
{
	__u8 mac[ETH_ALEN];
	__be16 port = f->udp->source;

	__builtin_memcpy(mac, f->eth->h_dest, ETH_ALEN);
	__builtin_memcpy(f->eth->h_dest, f->eth->h_source, ETH_ALEN);
	__builtin_memcpy(f->eth->h_source, mac, ETH_ALEN);
	f->udp->source = f->udp->dest;
	f->udp->dest = port;
	if (f->ip_version == 4) {
		struct iphdr *ip = ip4_of(f);
		__be32 address = ip->saddr;

		ip->saddr = ip->daddr;
		ip->daddr = address;
		ip->ttl = REPLY_TTL;
		ip->check = 0;
		ip->check = fold(bpf_csum_diff(0, 0, (void *)ip, sizeof(*ip), 0));
	} else {
		struct ipv6hdr *ip = ip6_of(f);
		struct in6_addr address = ip->saddr;

		ip->saddr = ip->daddr;
		ip->daddr = address;
		ip->hop_limit = REPLY_TTL;
	}
}

/*
 * The UDP checksum from nothing, for frames that carry no offload state. IPv4 may leave it out
 * (RFC 768); IPv6 may not (RFC 8200, section 8.1).
 */
static __always_inline void checksum_anew(struct frame *f)
{
	__u64 sum;

	f->udp->check = 0;
	if (f->ip_version != 6)
		return;
	sum = bpf_csum_diff(0, 0, (void *)&ip6_of(f)->saddr, 2 * sizeof(struct in6_addr), 0);
	sum = bpf_csum_diff(0, 0, (void *)f->udp, UDP_BYTES, sum);
	sum += bpf_htonl(UDP_BYTES);
	sum += bpf_htonl(IPPROTO_UDP);
	f->udp->check = fold(sum);
	if (!f->udp->check)
		f->udp->check = 0xffff;
}

#endif
