/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * Where connect's decision about a socket is kept: in `recent` when the socket goes direct and its place there is
 * free, else in the socket's own storage, which always has room but costs more to make and free than all the rest we do.
 *
 * The rule: a decision is in one of the two, and found by whoever asks `recent` first. Cookies are given out in
 * sequence, so short-lived connections go round the table and seldom meet one that stayed.
 */
#pragma once
#include "maps.h"

/* bcc's own declaration of this helper cuts the cookie to 32 bits. */
static u64 (*socket_cookie)(void *) = (void *)BPF_FUNC_get_socket_cookie;

static __always_inline struct recent *recent_place(u64 cookie)
{
	int index = cookie % RECENT_PLACES;

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

/* A place for a new decision, or none. sockops gives it back when the connection ends; but a connect() that fails
 * before TCP hears of it (no free port) ends unseen, and after a while its place is anybody's. */
static __always_inline struct decision *recent_claim(u64 cookie)
{
	struct recent *place = recent_place(cookie);
	u32 now = bpf_jiffies64();
	bool ours;

	if (!place)
		return 0;
	bpf_spin_lock(&place->lock);
	ours = !place->cookie || place->cookie == cookie ||
	       (!place->decision.watched && now - place->since > RECENT_UNWATCHED_JIFFIES);
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

	if (place && place->cookie == cookie)
		place->cookie = 0;
}
