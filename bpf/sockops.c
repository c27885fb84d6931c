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

#if MPTCP
static void *(*skc_to_mptcp_sock)(void *sk) = (void *)BPF_FUNC_skc_to_mptcp_sock;

/* MPTCP: connect() was asked about the TCP socket that carries the first path, getpeername() will be asked about the
 * connection above it, which the application holds. So that one gets a copy of what was decided. */
static __always_inline void tell_mptcp(struct bpf_sock *sk, struct origin *origin)
{
	void *above = skc_to_mptcp_sock(sk);
	struct origin *told;

	if (!above)
		return;
	count(PROGRAM_SOCKOPS, REASON_MPTCP);
	told = origins.sk_storage_get(above, origin, CREATE);
	if (told)
		*told = *origin; /* it may have been connected before */
}
#endif

static __always_inline void opened(struct bpf_sock_ops *ops, struct origin *origin)
{
	u32 service_id = origin->service_id;
	struct connection_count *per_service = connections.lookup(&service_id);

	if (origin->carrier == CARRIED_PROXY) {
		struct flow_key key = {};
		struct flow_value flow = {
		    .cgroup = origin->cgroup,
		    .asked_port = origin->asked_port,
		    .service_id = service_id,
		    .pid = origin->pid,
		};

		copy_address(flow.asked, origin->asked);
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
	origin->counted = 1;
	/* What a neighbour's program has asked for stays. */
	bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

static __always_inline void closed(struct bpf_sock_ops *ops, struct origin *origin)
{
	u32 service_id = origin->service_id;
	struct connection_count *per_service = connections.lookup(&service_id);

	if (origin->carrier == CARRIED_PROXY) {
		struct flow_key key = {};

		flow_key_of(ops, origin, &key);
		flows.delete(&key);
		if (per_service)
			per_service->closed[CARRIED_PROXY - 1] += 1;
	} else if (per_service) {
		per_service->closed[CARRIED_DIRECT - 1] += 1;
	}
	count(PROGRAM_SOCKOPS, REASON_CLOSED);
	origin->counted = 0;
}

/* Is the peer the one that connect gave? A socket may be connected again, to somewhere that is no service:
 * then the old decision is not about this connection. */
static __always_inline bool led(struct bpf_sock_ops *ops, const struct origin *origin)
{
	u8 peer[16];

	remote_address(ops, peer);
	return ops->remote_port == (u32)origin->given_port << 16 && same_address(peer, origin->given);
}

int sockops(struct bpf_sock_ops *ops)
{
	struct origin *origin;
	struct bpf_sock *sk;
	bool establishing = ops->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB;

	if (!establishing && !(ops->op == BPF_SOCK_OPS_STATE_CB && ops->args[1] == TCP_CLOSED))
		return 1;
	sk = ops->sk;
	if (!sk)
		return 1;
	origin = origins.sk_storage_get(sk, 0, 0);
	if (!origin)
		return 1;
	if (establishing) {
		/* Attached to a cgroup and to one below it, we run twice. */
		if (!origin->counted && led(ops, origin)) {
			opened(ops, origin);
#if MPTCP
			tell_mptcp(sk, origin);
#endif
		}
	} else if (origin->counted) {
		closed(ops, origin);
	}
	return 1;
}
