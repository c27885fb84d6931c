/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * sessionAffinity: a client gets the endpoint that it had last, while that takes new connections of the service and the
 * client has not stayed away for too long. Two first connections at the same moment may get two endpoints, of which the
 * later one is noted. Services that do not ask for it pay one test.
 */
#pragma once

#define NS_PER_MS 1000000ULL

/* Whether `to` is now the endpoint that the client had last. */
static __always_inline bool lead_as_before(const struct affinity_key *key, u32 affinity_ms, enum reach reach,
					   u32 avoid, struct destination *to)
{
	struct affinity *last = affinities.lookup((struct affinity_key *)key);
	struct serving_key match = {.service_id = key->service_id};
	struct endpoint_value *endpoint;
	u32 endpoint_id, *standing;
	u64 used, now;

	if (!last)
		return false;
	/* Read before the clock: another processor may use it in between. */
	used = last->used;
	endpoint_id = last->endpoint_id;
	now = bpf_ktime_get_ns();
	if (now - used >= affinity_ms * NS_PER_MS || endpoint_id == avoid)
		return false;
	/* Of the service itself, because the entry may be of an endpoint that left, and because one that drains here may
	 * take connections of another service. */
	match.endpoint_id = endpoint_id;
	standing = serving.lookup(&match);
	endpoint = endpoints.lookup(&endpoint_id);
	if (!standing || *standing != SERVING_TAKES || !endpoint || !reaches(reach, endpoint))
		return false;
	led_straight(to, endpoint, endpoint_id);
	last->used = now;
	return true;
}

/* The endpoint for a new connection or conversation of whoever calls. */
static __always_inline bool choose_endpoint(struct bpf_sock_addr *ctx, enum program program, u32 service_id,
					    const struct policy_value *policy, enum reach reach, u32 avoid,
					    struct destination *to)
{
	struct affinity_key key = {.service_id = service_id};

	if (policy->affinity_ms) {
		client_of(ctx, &key.client);
		if (lead_as_before(&key, policy->affinity_ms, reach, avoid, to))
			return true;
	}
	if (!pick_endpoint(ctx, program, service_id, policy, reach, avoid, to))
		return false;
	if (policy->affinity_ms) {
		struct affinity now = {.used = bpf_ktime_get_ns(), .endpoint_id = to->endpoint_id};

		if (affinities.update(&key, &now))
			count(program, REASON_AFFINITY_FULL);
	}
	return true;
}
