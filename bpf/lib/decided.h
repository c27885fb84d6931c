/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * Where connect's decision about a socket is kept: in `recent` when the socket goes direct and its place there is
 * free, else in the socket's own storage, which costs more to make and free than all the rest we do.
 *
 * The rule: a decision is in one of the two, and found by whoever asks `recent` first. A watched place is its socket's
 * until sockops gives it back. Connections that stay keep theirs, and who meets one pays as if there were no table
 * (counted as place_taken); so does who meets a connection whose end sockops could not see, because its cgroup alone
 * was let go.
 */
#pragma once
#include "maps.h"
#include "lib/cookie.h"

static __always_inline struct recent *recent_place(u64 cookie)
{
	/* A CPU gives out cookies in batches of 4096; two CPUs are often at the same step of theirs. */
	int index = (cookie + (cookie >> 12) * 1279) % RECENT_PLACES;

	return recent.lookup(&index);
}

static __always_inline struct decision *recent_find(u64 cookie)
{
	struct recent *place = recent_place(cookie);
	struct decision *decision = 0;

	if (place && place->cookie == cookie)
		decision = &place->decision;
	/* Or the compiler asks about the cookies again where the caller asks about the pointer, and the verifier
	 * cannot follow. */
	asm volatile("" : "+r"(decision));
	return decision;
}

/* A place for a new decision, or none. sockops watches over it from the first packet on and gives it back when the
 * connection ends; but a connect() that fails before (no free port) ends unseen, and after minutes its place is
 * anybody's. A connection that TCP Fast Open puts off for longer than that may be robbed of its decision: it works, and
 * its application is told the endpoint's address. */
static __always_inline struct decision *recent_claim(u64 cookie)
{
	struct recent *place = recent_place(cookie);
	u32 now = bpf_jiffies64();
	bool ours;

	if (!place)
		return 0;
	bpf_spin_lock(&place->lock);
	ours = !place->cookie || place->cookie == cookie ||
	       (!place->decision.watched && (s32)(now - place->since) > RECENT_UNWATCHED_JIFFIES);
	if (ours) {
		place->cookie = cookie;
		place->since = now;
		place->decision.watched = 0;
	}
	bpf_spin_unlock(&place->lock);
	return ours ? &place->decision : 0;
}

static __always_inline void recent_forget(u64 cookie)
{
	struct recent *place = recent_place(cookie);

	if (!place)
		return;
	bpf_spin_lock(&place->lock);
	if (place->cookie == cookie)
		place->cookie = 0;
	bpf_spin_unlock(&place->lock);
}
