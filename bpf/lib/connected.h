/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * The table of connected UDP sockets. Nothing else tells which sockets are bound to an endpoint, and only a socket
 * that is in here may be ended when its endpoint is gone. It loses an entry when the socket connects elsewhere or
 * is released, so it never fills with leavings.
 */
#pragma once
#include "lib/cookie.h"

static __always_inline u64 namespace_of(struct bpf_sock_addr *ctx);

/* The socket no longer talks to the endpoint that it was connected to, if it ever was. */
static __always_inline void not_connected(u64 cookie, enum program program)
{
	struct connected *was = connected.lookup(&cookie);
	struct connection_count *per_service;
	u32 service_id;

	if (!was)
		return;
	if (was->carried) {
		struct talk_key from = {.cookie = cookie, .port = was->given_port};

		copy_address(from.address, was->given);
		answers.delete(&from); /* of this socket they came with it */
	} else {
		service_id = was->service_id;
		per_service = connections.lookup(&service_id);
		if (per_service)
			per_service->closed[CARRIED_DIRECT - 1] += 1;
		count(program, REASON_CLOSED);
	}
	connected.delete(&cookie);
}

/* connect() led the socket to `to`. */
static __always_inline void now_connected(struct bpf_sock_addr *ctx, u32 service_id,
					  const struct destination *to)
{
	struct connected now = {.service_id = service_id, .endpoint_id = to->endpoint_id};
	struct connection_count *per_service;
	u64 cookie = socket_cookie(ctx);

	not_connected(cookie, PROGRAM_CONNECT);
	if (!to->endpoint_id)
		return;
	now.netns = namespace_of(ctx);
	now.pid = bpf_get_current_pid_tgid() >> 32;
	copy_address(now.given, to->address);
	now.given_port = to->port;
	if (connected.update(&cookie, &now)) {
		count(PROGRAM_CONNECT, REASON_DATAGRAMS_FULL);
		return;
	}
	per_service = connections.lookup(&service_id);
	if (per_service)
		per_service->opened[CARRIED_DIRECT - 1] += 1;
	count(PROGRAM_CONNECT, REASON_OPENED);
}

/* connect() to what is no service. Attached to a cgroup and to one below it we run twice, and the second time it
 * is the endpoint that the first one gave. */
static __always_inline void connected_elsewhere(struct bpf_sock_addr *ctx, const struct service_key *key)
{
	u64 cookie = socket_cookie(ctx);
	struct connected *was = connected.lookup(&cookie);

	if (was && (was->given_port != key->port || !same_address(was->given, key->address)))
		not_connected(cookie, PROGRAM_CONNECT);
}
