/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * A histogram of nanoseconds in the kernel: four buckets to a power of two, so that a bucket is never
 * wider than a quarter of its lower bound. The mirror is ebpf_events::histogram.
 */
#ifndef POLLUX_HISTOGRAM_H
#define POLLUX_HISTOGRAM_H

#include <linux/types.h>

#define HISTOGRAM_BUCKETS 144 /* the last holds everything from 60 s on */

struct histogram {
	__u64 count;
	__u64 sum_ns;
	__u64 buckets[HISTOGRAM_BUCKETS];
};

/* By halving: BPF has no instruction for it, and clang 14 does not end in expanding the builtin. */
static __always_inline __u32 highest_bit(__u64 value)
{
	__u32 bit = 0;

#pragma unroll
	for (int half = 32; half > 0; half /= 2) {
		if (value >> half) {
			value >>= half;
			bit += half;
		}
	}
	return bit;
}

/*
 * A function of its own, which the verifier looks at once and alone: what comes back is any number then,
 * whichever way it was computed. Without CAP_PERFMON an offset must not depend on the way.
 */
__attribute__((noinline)) __u32 bucket_of(__u64 ns)
{
	__u32 power, bucket;

	if (ns < 4)
		return ns;
	power = highest_bit(ns);
	bucket = (power - 1) * 4 + ((ns >> (power - 2)) & 3);
	return bucket < HISTOGRAM_BUCKETS ? bucket : HISTOGRAM_BUCKETS - 1;
}

static __always_inline void observe(struct histogram *histogram, __u64 ns)
{
	__u32 bucket = bucket_of(ns);

	/* Said again for the verifier, which does not know what the function returns. */
	if (bucket >= HISTOGRAM_BUCKETS)
		return;
	__sync_fetch_and_add(&histogram->count, 1);
	__sync_fetch_and_add(&histogram->sum_ns, ns);
	__sync_fetch_and_add(&histogram->buckets[bucket], 1);
}

#endif
