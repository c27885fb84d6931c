/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * sockops: a connection that connect led somewhere is established, and later ends.
 *
 * Established comes before the handshake's last packet leaves, so `flows` holds the entry before the proxy
 * can accept.
 */
#include "maps.h"
#include "lib/address.h"
#include "lib/count.h"
#include "lib/decided.h"

#define TCP_CLOSED 7

/* A word of the context, read here and now: the compiler would else merge loads of several branches into one
 * from a computed context address, which the verifier refuses. */
#define READ(_name, _field)                                                                                  \
	u32 _name = ops->_field;                                                                             \
	asm volatile("" : "+r"(_name))

static __always_inline void local_address(struct bpf_sock_ops *ops, u8 *address)
{
	READ(ip4, local_ip4);
	READ(a, local_ip6[0]);
	READ(b, local_ip6[1]);
	READ(c, local_ip6[2]);
	READ(d, local_ip6[3]);

	if (ops->family == FAMILY_IPV4)
		set_address4(address, ip4);
	else
		set_address6(address, a, b, c, d);
}

static __always_inline void remote_address(struct bpf_sock_ops *ops, u8 *address)
{
	READ(ip4, remote_ip4);
	READ(a, remote_ip6[0]);
	READ(b, remote_ip6[1]);
	READ(c, remote_ip6[2]);
	READ(d, remote_ip6[3]);

	if (ops->family == FAMILY_IPV4)
		set_address4(address, ip4);
	else
		set_address6(address, a, b, c, d);
}

static __always_inline void flow_key_of(struct bpf_sock_ops *ops, const struct origin *origin,
					struct flow_key *key)
{
	key->netns = origin->netns;
	local_address(ops, key->address);
	key->port = __builtin_bswap16(ops->local_port);
}

/* Ask to hear of the connection's end. What a neighbour's program has asked for stays. */
static __always_inline void watch(struct bpf_sock_ops *ops, struct decision *decision)
{
	bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	decision->watched = 1;
}

/* `origin` is there when the decision is not in `recent`. */
static __always_inline void opened(struct bpf_sock_ops *ops, struct decision *decision, struct origin *origin)
{
	u32 service_id = decision->service_id;
	struct connection_count *per_service = connections.lookup(&service_id);

	if (origin && decision->carrier == CARRIED_PROXY) {
		struct flow_key key = {};
		struct flow_value flow = {
		    .cgroup = origin->cgroup,
		    .asked_port = decision->asked_port,
		    .service_id = service_id,
		    .pid = origin->pid,
		};

		copy_address(flow.asked, decision->asked);
		flow_key_of(ops, origin, &key);
		/* A failed update shows at accept as a connection without origin: closed, never misled. */
		if (flows.update(&key, &flow))
			count(PROGRAM_SOCKOPS, REASON_FLOW_FULL);
		if (per_service)
			per_service->opened[CARRIED_PROXY - 1] += 1;
	} else if (per_service) {
		per_service->opened[CARRIED_DIRECT - 1] += 1;
	}
	count(PROGRAM_SOCKOPS, REASON_OPENED);
	decision->counted = 1;
	watch(ops, decision); /* again, because a neighbour may have set its own flags in place of ours */
}

static __always_inline void closed(struct bpf_sock_ops *ops, struct decision *decision, struct origin *origin)
{
	u32 service_id = decision->service_id;
	struct connection_count *per_service = connections.lookup(&service_id);

	if (origin && decision->carrier == CARRIED_PROXY) {
		struct flow_key key = {};

		flow_key_of(ops, origin, &key);
		flows.delete(&key);
		if (per_service)
			per_service->closed[CARRIED_PROXY - 1] += 1;
	} else if (per_service) {
		per_service->closed[CARRIED_DIRECT - 1] += 1;
	}
	count(PROGRAM_SOCKOPS, REASON_CLOSED);
	decision->counted = 0;
}

/* Is the peer the one that connect gave? A socket may be connected again, to somewhere that is no service:
 * then the old decision is not about this connection. */
static __always_inline bool led(struct bpf_sock_ops *ops, const struct decision *decision)
{
	u8 peer[16];

	remote_address(ops, peer);
	return ops->remote_port == (u32)decision->given_port << 16 && same_address(peer, decision->given);
}

int sockops(struct bpf_sock_ops *ops)
{
	struct decision *decision;
	struct origin *origin = 0;
	struct bpf_sock *sk;
	u64 cookie;
	bool connecting = ops->op == BPF_SOCK_OPS_TCP_CONNECT_CB;
	bool establishing = ops->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB;

	if (!connecting && !establishing && !(ops->op == BPF_SOCK_OPS_STATE_CB && ops->args[1] == TCP_CLOSED))
		return 1;
	sk = ops->sk;
	if (!sk)
		return 1;
	cookie = socket_cookie(ops);
	decision = recent_find(cookie);
	if (connecting) {
		/* A place in `recent` has to be given back by connections that are refused, too. */
		if (decision)
			watch(ops, decision);
		return 1;
	}
	if (!decision) {
		origin = origins.sk_storage_get(sk, 0, 0);
		if (!origin)
			return 1;
		decision = &origin->decision;
	}
	if (establishing) {
		/* Attached to a cgroup and to one below it, we run twice. */
		if (!decision->counted && led(ops, decision))
			opened(ops, decision, origin);
		return 1;
	}
	if (decision->counted)
		closed(ops, decision, origin);
	if (origin) {
		/* When it is connected again, past us, to whom we led it before, that is no decision of ours. */
		decision->given_port = 0;
	} else {
		recent_forget(cookie);
	}
	return 1;
}
