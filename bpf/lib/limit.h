/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * connectionPool.tcp.maxConnections of direct ports. A connection counts from its first packet to its end, of whatever
 * kind, because from the one to the other sockops is sure to hear of it: what connect led and TCP never began would
 * be counted for ever. Between connect's look and the first packet others may pass: at most one for each of those
 * that are in connect() at this moment. Services without a limit pay one test.
 */
#pragma once

static __always_inline bool at_limit(u32 service_id, u32 limit)
{
	u64 *open = limits.lookup(&service_id), none = 0;

	if (open)
		return *open >= limit;
	if (limits.insert(&service_id, &none) && !limits.lookup(&service_id))
		count(PROGRAM_CONNECT, REASON_LIMIT_FULL);
	return false;
}

/* The connection begins. */
static __always_inline void count_limited(struct decision *decision)
{
	u32 service_id = decision->service_id;
	u64 *open;

	if (decision->limited != LIMITED_LATER)
		return;
	open = limits.lookup(&service_id);
	if (!open)
		return;
	__sync_fetch_and_add(open, 1);
	decision->limited = LIMITED_NOW;
}

/* It ended. */
static __always_inline void discount_limited(struct decision *decision)
{
	u32 service_id = decision->service_id;
	u64 *open;

	if (decision->limited != LIMITED_NOW)
		return;
	decision->limited = LIMITED_NO;
	open = limits.lookup(&service_id);
	if (open)
		__sync_fetch_and_add(open, -1);
}
