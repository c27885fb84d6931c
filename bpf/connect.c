/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * cgroup/connect4, connect6, getpeername4, getpeername6: where a connection goes, and what its application is
 * told.
 *
 * The rule of this file: a connect() may be led elsewhere, but it is never answered with an error that plain
 * TCP would not have given. Refusing means leading to port 0 of the loopback, where nobody can listen:
 * ECONNREFUSED on every kernel, never EPERM. A socket that is bound to another device would never hear from
 * the loopback, and wait until it times out: it is led to everybody at once, which TCP refuses with ENETUNREACH.
 */
#include "maps.h"
#include "lib/address.h"
#include "lib/count.h"
#include "lib/decided.h"
#include "lib/limit.h"

#define STREAM 1
#define DATAGRAM 2
#define IPPROTO_TCP_ 6
#define IPPROTO_UDP_ 17
#define LISTENING 10
#define CREATE 1
#define LOOPBACK_DEVICE 1 /* its index in every namespace */

struct destination {
	u8 address[16];
	__be16 port;
	u8 carrier;
	u8 pad;
	u32 endpoint_id; /* 0: none */
};

#include "lib/client.h"
#include "lib/connected.h"

/* Which endpoints a socket can talk to. */
enum reach {
	REACH_ANY,
	REACH_IPV4,
	REACH_IPV6, /* and not the mapped ones: sendmsg6 cannot go to IPv4 */
};

static __always_inline bool reaches(enum reach reach, const struct endpoint_value *endpoint)
{
	return reach == REACH_ANY || is_ipv4(endpoint->address) == (reach == REACH_IPV4);
}

static __always_inline void led_straight(struct destination *to, const struct endpoint_value *endpoint,
					 u32 endpoint_id)
{
	copy_address(to->address, endpoint->address);
	to->port = endpoint->port;
	to->carrier = CARRIED_DIRECT;
	to->endpoint_id = endpoint_id;
}

/* A slot's endpoint. Tried a few times, because the loader may be changing the tables under us: between two
 * reads an endpoint can be gone, and then the next slot's is as good. `avoid` is an endpoint that is
 * taken only when there is no other. */
static __always_inline bool pick_endpoint(struct bpf_sock_addr *ctx, enum program program, u32 service_id,
					  const struct policy_value *policy, enum reach reach, u32 avoid,
					  struct destination *to)
{
	/* IPv4 endpoints come first. */
	u32 first = reach == REACH_IPV6 ? policy->slots4 : 0;
	u32 count_of_slots = reach == REACH_IPV4 ? policy->slots4 : policy->slots - first;
	u64 start = bpf_get_prandom_u32();
	bool found = false;
	u64 *round;

	if (policy->pick == PICK_ROUND_ROBIN) {
		round = rounds.lookup(&service_id);
		if (round) {
			/* Read and add apart: two CPUs may pick the same slot, which costs nothing; a
			 * fetching add would cost kernels before 5.12. */
			start = *round;
			__sync_fetch_and_add(round, 1);
		}
	} else if (policy->pick >= PICK_HASH) {
		struct client client;

		client_of(ctx, &client);
		start = hash_of(&client);
		if (policy->pick == PICK_HASH_OF_BOTH) {
			count_of_slots = policy->slots4;
			if (reach == REACH_ANY)
				first = 2 * count_of_slots;
		}
	}
#pragma unroll
	for (int try = 0; try < PICK_TRIES; try++) {
		struct slot_key key = {.service_id = service_id};
		struct endpoint_value *endpoint;
		struct slot_value *slot;

		if (!count_of_slots)
			return false;
		key.index = first + (start + try) % count_of_slots;
		slot = slots.lookup(&key);
		if (slot) {
			u32 endpoint_id = slot->endpoint_id;

			endpoint = endpoints.lookup(&endpoint_id);
			if (endpoint && !endpoint->draining && reaches(reach, endpoint)) {
				led_straight(to, endpoint, endpoint_id);
				if (endpoint_id != avoid)
					return true;
				found = true;
				continue;
			}
		}
		count(program, REASON_ENDPOINT_VANISHED);
	}
	return found;
}

#include "lib/affinity.h"

/* Is the proxy's listener in the caller's namespace? Told from a stranger on the same port by its entry in
 * `listeners`, which nobody can make who has not opened our pins. */
static __always_inline bool proxy_listens(struct bpf_sock_addr *ctx, const struct agent_state *state,
					  bool ipv4)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *listener;
	bool ours;

	if (ipv4) {
		tuple.ipv4.saddr = LOOPBACK4;
		tuple.ipv4.daddr = LOOPBACK4;
		tuple.ipv4.sport = __builtin_bswap16(1);
		tuple.ipv4.dport = state->proxy_port;
		listener = bpf_sk_lookup_tcp(ctx, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	} else {
		tuple.ipv6.saddr[3] = LOOPBACK6;
		tuple.ipv6.daddr[3] = LOOPBACK6;
		tuple.ipv6.sport = __builtin_bswap16(1);
		tuple.ipv6.dport = state->proxy_port;
		listener = bpf_sk_lookup_tcp(ctx, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
	}
	if (!listener)
		return false;
	ours = listener->state == LISTENING && listeners.sk_storage_get(listener, 0, 0);
	bpf_sk_release(listener);
	return ours;
}

static __always_inline u64 namespace_of(struct bpf_sock_addr *ctx)
{
#if NETNS_COOKIES
	return bpf_get_netns_cookie(ctx);
#else
	return 0; /* user space could not learn a cookie (before 5.14): only the first namespace is governed
		   */
#endif
}

/* Whether a governed connection can go to the proxy now; if not, the reason why. */
static __always_inline enum reason proxy_ready(struct bpf_sock_addr *ctx, const struct agent_state *state,
					       bool ipv4)
{
	int zero = 0;
	u64 *beat = heartbeat.lookup(&zero);
	/* Read before the clock, or a worker that beats in between would seem to live in the future, and
	 * hang. */
	u64 last = beat ? *beat : 0;
	/* Port 0: no agent has started, or it is draining and wants no more. */
	bool alive = state->proxy_port && beat && bpf_ktime_get_ns() - last < HEARTBEAT_MAX_NS;

#if !NETNS_COOKIES
	if (bpf_get_netns_cookie(ctx) != bpf_get_netns_cookie(0))
		return REASON_NETNS_UNSUPPORTED;
#endif
	if (state->proxy_port && proxy_listens(ctx, state, ipv4))
		return alive ? REASON_PROXY : REASON_PROXY_HUNG;
	if (!alive)
		return REASON_PROXY_ABSENT;
	struct event event = {
	    .netns = namespace_of(ctx),
	    .pid = bpf_get_current_pid_tgid() >> 32,
	    .reason = REASON_PROXY_NOT_IN_NETNS,
	};
	events.ringbuf_output(&event, sizeof(event), 0);
	return REASON_PROXY_NOT_IN_NETNS;
}

static __always_inline void to_everybody(struct destination *to, bool ipv4)
{
	if (ipv4)
		set_address4(to->address, BROADCAST4);
	else
		set_address6(to->address, ALL_NODES6, 0, 0, LOOPBACK6); /* ff02::1 */
}

static __always_inline void to_loopback(struct destination *to, bool ipv4)
{
	if (ipv4)
		set_address4(to->address, LOOPBACK4);
	else
		set_address6(to->address, 0, 0, 0, LOOPBACK6);
}

static __always_inline void refuse(struct destination *to, bool ipv4, bool bound)
{
	if (bound)
		to_everybody(to, ipv4);
	else
		to_loopback(to, ipv4);
	to->port = 0;
	to->carrier = CARRIED_DIRECT;
}

/* Decide where `key` leads. False: it is no service of ours, or we are asked to keep out; the call stays as
 * it is. */
static __always_inline bool lead(struct bpf_sock_addr *ctx, struct service_key *key, bool ipv4_socket,
				 struct destination *to)
{
	struct service_value *service = services.lookup(key);
	bool ipv4 = ipv4_socket || is_ipv4(key->address);
	struct policy_value *policy;
	struct decision *decision = 0;
	struct origin *origin = 0;
	struct agent_state *state;
	struct bpf_sock *sk;
	enum reason reason;
	u32 service_id;
	int zero = 0;
	u64 cookie;
	bool bound;

	if (!service)
		return false;
	service_id = service->service_id;
	policy = policies.lookup(&service_id);
	state = agent.lookup(&zero);
	sk = ctx->sk;
	if (!policy || !state || !sk)
		return false;
	if (state->exempt_cgroup && state->exempt_cgroup == bpf_get_current_cgroup_id()) {
		count(PROGRAM_CONNECT, REASON_AGENT_EXEMPT);
		return false;
	}

	cookie = socket_cookie(ctx);
	/* sockops would not hear of a UDP socket's end. */
	if (policy->carrier == CARRIED_DIRECT && key->protocol == IPPROTO_TCP_) {
		decision = recent_claim(cookie);
		if (!decision)
			count(PROGRAM_CONNECT, REASON_PLACE_TAKEN);
	} else {
		recent_forget(cookie);
	}
	if (!decision) {
		struct origin fresh = {};

		origin = origins.sk_storage_get(sk, &fresh, CREATE);
		if (origin)
			decision = &origin->decision;
		else
			count(PROGRAM_CONNECT, REASON_STORAGE_FULL);
	}
	/* From another device than the loopback nobody gets to the proxy. Not of UDP's concern: led to everybody, it
	 * would not be refused, but be heard by all neighbours. */
	bound = key->protocol == IPPROTO_TCP_ && sk->bound_dev_if && sk->bound_dev_if != LOOPBACK_DEVICE;
	reason = REASON_DIRECT;
	if (policy->carrier == CARRIED_PROXY && bound) {
		reason = REASON_BOUND_TO_DEVICE;
		count(PROGRAM_CONNECT, reason);
	} else if (policy->carrier == CARRIED_PROXY) {
		/* Without storage sockops could not tell the proxy where the call was going. */
		reason = origin ? proxy_ready(ctx, state, ipv4) : REASON_STORAGE_FULL;
		count(PROGRAM_CONNECT, reason);
	}
	if (reason == REASON_PROXY) {
		to_loopback(to, ipv4);
		to->port = state->proxy_port;
		to->carrier = CARRIED_PROXY;
	} else if (policy->carrier == CARRIED_PROXY && policy->on_proxy_down == DOWN_REFUSE) {
		count(PROGRAM_CONNECT, REASON_PROXY_DOWN_REFUSED);
		refuse(to, ipv4, bound);
	} else if (policy->limit && at_limit(service_id, policy->limit)) {
		count(PROGRAM_CONNECT, REASON_OVER_LIMIT);
		refuse(to, ipv4, bound);
	} else if (choose_endpoint(ctx, PROGRAM_CONNECT, service_id, policy,
				   ipv4_socket ? REACH_IPV4 : REACH_ANY, 0, to)) {
		count(PROGRAM_CONNECT, REASON_DIRECT);
	} else {
		count(PROGRAM_CONNECT, REASON_NO_ENDPOINT);
		refuse(to, ipv4, bound);
	}
	if (origin) {
		origin->netns = namespace_of(ctx);
		origin->cgroup = bpf_get_current_cgroup_id();
		origin->pid = bpf_get_current_pid_tgid() >> 32;
	}
	if (decision) {
		decision->service_id = service_id;
		decision->carrier = to->carrier;
		decision->counted = 0;
		decision->limited = policy->limit && to->endpoint_id ? LIMITED_LATER : LIMITED_NO;
		copy_address(decision->asked, key->address);
		decision->asked_port = key->port;
		copy_address(decision->given, to->address);
		decision->given_port = to->port;
	}
	if (key->protocol == IPPROTO_UDP_)
		now_connected(ctx, service_id, to);
	return true;
}

/* Sets the protocol that a connect() is looked up by; false when we lead no such socket. */
static __always_inline bool protocol_of(struct bpf_sock_addr *ctx, struct service_key *key)
{
	bool stream = ctx->type == STREAM && ctx->protocol == IPPROTO_TCP_;
	bool datagram = ctx->type == DATAGRAM && ctx->protocol == IPPROTO_UDP_;

	key->protocol = datagram ? IPPROTO_UDP_ : IPPROTO_TCP_;
	return stream || datagram;
}

int connect4(struct bpf_sock_addr *ctx)
{
	struct service_key key = {};
	struct destination to = {};

	if (!protocol_of(ctx, &key))
		return 1;
	set_address4(key.address, ctx->user_ip4);
	key.port = ctx->user_port;
	if (lead(ctx, &key, true, &to)) {
		ctx->user_ip4 = ((u32 *)to.address)[3];
		ctx->user_port = to.port;
	} else if (key.protocol == IPPROTO_UDP_) {
		connected_elsewhere(ctx, &key);
	}
	return 1;
}

int connect6(struct bpf_sock_addr *ctx)
{
	struct service_key key = {};
	struct destination to = {};

	if (!protocol_of(ctx, &key))
		return 1;
	set_address6(key.address, ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]);
	key.port = ctx->user_port;
	if (lead(ctx, &key, false, &to)) {
		ctx->user_ip6[0] = ((u32 *)to.address)[0];
		ctx->user_ip6[1] = ((u32 *)to.address)[1];
		ctx->user_ip6[2] = ((u32 *)to.address)[2];
		ctx->user_ip6[3] = ((u32 *)to.address)[3];
		ctx->user_port = to.port;
	} else if (key.protocol == IPPROTO_UDP_) {
		connected_elsewhere(ctx, &key);
	}
	return 1;
}

/* The decision about a socket whose peer is the one we led it to. A socket that was connected again, to somewhere
 * else, keeps its true peer. */
static __always_inline struct decision *led_to(struct bpf_sock_addr *ctx, const u8 *peer)
{
	struct bpf_sock *sk = ctx->sk;
	struct decision *decision;
	struct origin *origin;

	if (!sk)
		return 0;
	decision = recent_find(socket_cookie(ctx));
	if (!decision) {
		origin = origins.sk_storage_get(sk, 0, 0);
		if (!origin)
			return 0;
		decision = &origin->decision;
	}
	if (decision->given_port != ctx->user_port || !same_address(decision->given, peer))
		return 0;
	return decision;
}

int getpeername4(struct bpf_sock_addr *ctx)
{
	struct decision *decision;
	u8 peer[16];

	set_address4(peer, ctx->user_ip4);
	decision = led_to(ctx, peer);
	if (decision) {
		ctx->user_ip4 = ((u32 *)decision->asked)[3];
		ctx->user_port = decision->asked_port;
	}
	return 1;
}

int getpeername6(struct bpf_sock_addr *ctx)
{
	struct decision *decision;
	u8 peer[16];

	set_address6(peer, ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]);
	decision = led_to(ctx, peer);
	if (decision) {
		ctx->user_ip6[0] = ((u32 *)decision->asked)[0];
		ctx->user_ip6[1] = ((u32 *)decision->asked)[1];
		ctx->user_ip6[2] = ((u32 *)decision->asked)[2];
		ctx->user_ip6[3] = ((u32 *)decision->asked)[3];
		ctx->user_port = decision->asked_port;
	}
	return 1;
}
