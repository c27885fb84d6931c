/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/* Counters by reason: every verdict of every program passes through count(). */
#pragma once

static __always_inline void count(enum program program, enum reason reason)
{
	int index = program * REASON_STRIDE + reason;
	u64 *counter = counters.lookup(&index);

	if (counter)
		*counter += 1;
}
