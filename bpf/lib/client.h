/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * Who calls. The source address is not known before the kernel has chosen a route, which is after connect's hook, unless
 * the socket is bound to one; of other sockets all is known that tells callers apart: the network namespace, as in
 * Cilium. Without an address of its own a container or pod is one client, and so is all that shares the host's namespace.
 */
#pragma once

/* A word of the socket, read here and now: the compiler would else merge loads of both families into one from a
 * computed address, which the verifier refuses. */
#define WORD(_name, _field)                                                                                  \
	u32 _name = sk->_field;                                                                              \
	asm volatile("" : "+r"(_name))

static __always_inline void client_of(struct bpf_sock_addr *ctx, struct client *client)
{
	struct bpf_sock *sk = ctx->sk;

	client->netns = 0;
	set_address6(client->address, 0, 0, 0, 0);
	if (sk) {
		WORD(ip4, src_ip4);
		WORD(a, src_ip6[0]);
		WORD(b, src_ip6[1]);
		WORD(c, src_ip6[2]);
		WORD(d, src_ip6[3]);

		if (sk->family == FAMILY_IPV4 && ip4) {
			set_address4(client->address, ip4);
			return;
		}
		if (sk->family != FAMILY_IPV4 && (a || b || d)) {
			set_address6(client->address, a, b, c, d);
			return;
		}
	}
	client->netns = bpf_get_netns_cookie(ctx);
}
#undef WORD

/* Steele, Lea and Flood's SplitMix64, its finalizer: every bit of the input reaches every bit of the output. */
static __always_inline u64 mixed(u64 bits)
{
	bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9ULL;
	bits = (bits ^ bits >> 27) * 0x94d049bb133111ebULL;
	return bits ^ bits >> 31;
}

/* The same on every machine for an address. Namespaces are numbered anew by every machine, from 1: without MACHINE all
 * machines' own namespaces would choose the same endpoint. */
static __always_inline u64 hash_of(const struct client *client)
{
	const u32 *word = (const u32 *)client->address;

	if (client->netns)
		return mixed(mixed(client->netns) ^ (u64)MACHINE << 32);
	return mixed(mixed((u64)word[0] << 32 | word[1]) ^ ((u64)word[2] << 32 | word[3]));
}
