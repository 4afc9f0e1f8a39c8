/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * SipHash-2-4 of whole 64-bit words (Aumasson and Bernstein, 2012): signs the heartbeats.
 *
 * The length is a constant at each call, so that the compiler unrolls the loop; the input must be a
 * multiple of eight bytes. Agrees with the crate siphasher on the Rust side (the tests compare).
 */
#ifndef POLLUX_SIPHASH_H
#define POLLUX_SIPHASH_H

#include <linux/types.h>

struct sip_key {
	__u64 k0;
	__u64 k1;
};

struct sip_state {
	__u64 v0, v1, v2, v3;
};

static __always_inline __u64 rotate_left(__u64 x, int bits)
{
	return (x << bits) | (x >> (64 - bits));
}

static __always_inline void sip_round(struct sip_state *s)
{
	s->v0 += s->v1;
	s->v1 = rotate_left(s->v1, 13) ^ s->v0;
	s->v0 = rotate_left(s->v0, 32);
	s->v2 += s->v3;
	s->v3 = rotate_left(s->v3, 16) ^ s->v2;
	s->v0 += s->v3;
	s->v3 = rotate_left(s->v3, 21) ^ s->v0;
	s->v2 += s->v1;
	s->v1 = rotate_left(s->v1, 17) ^ s->v2;
	s->v2 = rotate_left(s->v2, 32);
}

static __always_inline void sip_word(struct sip_state *s, __u64 word)
{
	s->v3 ^= word;
	sip_round(s);
	sip_round(s);
	s->v0 ^= word;
}

static __always_inline __u64 siphash24(const struct sip_key *key, const __u64 *words, int count)
{
	struct sip_state s = {
		.v0 = key->k0 ^ 0x736f6d6570736575ULL,
		.v1 = key->k1 ^ 0x646f72616e646f6dULL,
		.v2 = key->k0 ^ 0x6c7967656e657261ULL,
		.v3 = key->k1 ^ 0x7465646279746573ULL,
	};

#pragma unroll
	for (int i = 0; i < count; i++)
		sip_word(&s, words[i]);
	/* The last word: the length in bytes, modulo 256, in its top byte. */
	sip_word(&s, (__u64)(__u8)(count * 8) << 56);
	s.v2 ^= 0xff;
	sip_round(&s);
	sip_round(&s);
	sip_round(&s);
	sip_round(&s);
	return s.v0 ^ s.v1 ^ s.v2 ^ s.v3;
}

#endif
