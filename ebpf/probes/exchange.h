/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * What is done with one heartbeat, wherever it was caught: check it, and answer or record it.
 *
 * Works on a copy of the packet's words; the caller writes the words back where the verdict is
 * ANSWER. Nothing in the maps changes before the signature has been verified, and nothing but a
 * counter when the packet is refused.
 */
#ifndef POLLUX_EXCHANGE_H
#define POLLUX_EXCHANGE_H

#include "heartbeat.h"

enum verdict {
	LEAVE,	/* not ours: the network stack goes on with it */
	DROP,
	ANSWER, /* the words are now the reply */
};

/* How often a word is fought for with other CPUs before the packet is dropped. */
#define CONTENTION_TRIES 4

static __always_inline enum verdict refuse(enum counter why)
{
	count(why);
	return DROP;
}

/* Raises a highest-seen sequence; false if the sequence is not news. */
static __always_inline int raise_highest(__u64 *highest, __u64 sequence)
{
#pragma unroll
	for (int i = 0; i < CONTENTION_TRIES; i++) {
		__u64 old = *(volatile __u64 *)highest;

		if (sequence <= old)
			return 0;
		if (__sync_val_compare_and_swap(highest, old, sequence) == old)
			return 1;
	}
	return 0;
}

static __always_inline struct key_slot *key_of(struct session_entry *session, __u8 generation)
{
	struct key_slot *key = &session->keys[generation & 1];

	return key->used && key->generation == generation ? key : 0;
}

static __always_inline enum verdict answer_request(struct session_entry *session,
						   struct key_slot *key, __u64 *words, __u64 now)
{
	struct seen_page *seen;
	struct vmm_page *vmm;
	struct daemon_page *daemon;

	if (siphash24(&key->theirs, words, SIGNED_WORDS) != words[WORD_TAG])
		return refuse(COUNT_FORGED);
	seen = page_of(&seen_pages, session->slot);
	if (!seen)
		return refuse(COUNT_UNKNOWN_SESSION);
	if (!raise_highest(&seen->highest_request, words[WORD_SEQUENCE]))
		return refuse(COUNT_REPLAYED);
	*(volatile __u64 *)&seen->heard_ns = now;
	__sync_fetch_and_add(&seen->answered, 1);

	vmm = page_of(&vmm_pages, session->slot);
	daemon = page_of(&daemon_pages, session->slot);
	words[WORD_OPENING] = OPENING(KIND_REPLY, key->generation,
				      (__u8) * (volatile __u64 *)&seen->local);
	words[WORD_EPOCH] = session->epoch;
	words[WORD_ECHO_TIME] = words[WORD_TIME];
	words[WORD_TIME] = now;
	words[WORD_VMM_PROGRESS] = vmm ? *(volatile __u64 *)&vmm->progress : 0;
	words[WORD_DAEMON_PROGRESS] = daemon ? *(volatile __u64 *)&daemon->progress : 0;
	words[WORD_TAG] = siphash24(&key->theirs, words, SIGNED_WORDS);
	count(COUNT_ANSWERED);
	return ANSWER;
}

/* Writes the reply under the page's version word. One writer at a time: the others give up. */
static __always_inline int record_reply(struct seen_page *seen, const struct window_slot *sent,
					const __u64 *words, __u64 now)
{
	__u64 version = *(volatile __u64 *)&seen->version;

	if ((version & 1) ||
	    __sync_val_compare_and_swap(&seen->version, version, version + 1) != version)
		return 0;
	if (words[WORD_SEQUENCE] > seen->sequence) {
		seen->count += 1;
		seen->sequence = words[WORD_SEQUENCE];
		seen->nonce = words[WORD_NONCE];
		seen->arrived_ns = now;
		seen->departed_ns = sent->departed_ns;
		seen->sent_ns = sent->sent_ns;
		seen->peer_time_ns = words[WORD_TIME];
		seen->peer_epoch = words[WORD_EPOCH];
		seen->vmm_progress = words[WORD_VMM_PROGRESS];
		seen->daemon_progress = words[WORD_DAEMON_PROGRESS];
		seen->flags = OPENING_FLAGS(words[WORD_OPENING]);
	}
	/* An exchange is a full barrier: the words above are seen before the even version. */
	__sync_lock_test_and_set(&seen->version, version + 2);
	return 1;
}

static __always_inline enum verdict accept_reply(struct session_entry *session,
						 struct key_slot *key, const __u64 *words,
						 __u64 now)
{
	struct seen_page *seen;
	struct vmm_page *vmm;
	struct window_slot *sent;
	__u64 sequence = words[WORD_SEQUENCE];

	if (siphash24(&key->ours, words, SIGNED_WORDS) != words[WORD_TAG])
		return refuse(COUNT_FORGED);
	seen = page_of(&seen_pages, session->slot);
	vmm = page_of(&vmm_pages, session->slot);
	if (!seen || !vmm)
		return refuse(COUNT_UNKNOWN_SESSION);
	if (sequence <= *(volatile __u64 *)&seen->sequence)
		return refuse(COUNT_REPLAYED);
	sent = &vmm->window[sequence % WINDOW_SLOTS];
	if (sent->sequence != sequence || sent->nonce != words[WORD_NONCE])
		return refuse(COUNT_UNMATCHED);
	if (!record_reply(seen, sent, words, now))
		return refuse(COUNT_CONTENDED);
	if (sent->departed_ns) {
		struct histogram *times = bpf_map_lookup_elem(&round_trips, &session->slot);

		if (times)
			observe(times, now - sent->departed_ns);
	}
	count(COUNT_ACCEPTED);
	/* On to the prober's socket: that wakes it, and its time is already taken. */
	return LEAVE;
}

/*
 * The whole of it. to_port: the packet is addressed to the responder's port; from_port: it comes
 * from one. The caller has checked that at least one holds and that the length is right.
 */
static __always_inline enum verdict exchange(__u64 *words, int to_port, int from_port, __u64 now)
{
	__u64 opening = words[WORD_OPENING];
	__u8 kind = OPENING_KIND(opening);
	__u64 id = words[WORD_SESSION];
	struct session_entry *session;
	struct key_slot *key;

	if (OPENING_VERSION(opening) != HEARTBEAT_VERSION)
		return refuse(COUNT_MALFORMED);
	if (kind == KIND_REQUEST) {
		if (!to_port || OPENING_FLAGS(opening) || words[WORD_VMM_PROGRESS] ||
		    words[WORD_DAEMON_PROGRESS] || words[WORD_ECHO_TIME])
			return refuse(COUNT_MALFORMED);
	} else if (kind != KIND_REPLY || !from_port) {
		return refuse(COUNT_MALFORMED);
	}
	session = bpf_map_lookup_elem(&sessions, &id);
	if (!session) {
		count(COUNT_UNKNOWN_SESSION);
		return LEAVE;
	}
	key = key_of(session, OPENING_GENERATION(opening));
	if (!key) {
		/* A session whose keys are not here yet: a process of this host may have them. */
		count(COUNT_UNKNOWN_KEY);
		return LEAVE;
	}
	if (kind == KIND_REQUEST)
		return answer_request(session, key, words, now);
	return accept_reply(session, key, words, now);
}

#endif
