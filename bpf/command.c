/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * The command program: how user space asks about sockets that it does not hold. A SCHED_CLS program, never
 * attached to anything; loader/redirect.py runs it by BPF_PROG_TEST_RUN, which gives it a packet (a struct
 * command) and the calling thread's network namespace.
 *
 *   LOOK    could this connection join?
 *   JOIN    let it: both sockets into `socks`, then the binding
 *   ROOM    how many bytes may still be redirected towards the application
 *   LEAVE   binding off, the application's socket out; for the owner of the proxy's socket only
 *   DRAIN   binding off, one socket out; for anybody, at any time
 *   REFUSE  count a refusal that user space decided
 *
 * The rule of this file: nothing enters that is not proven fit (promise 2), and nothing leaves while bytes
 * are in it or on their way to it. The proxy's socket stays in until it is closed: only the application sends
 * to it, at times we cannot know, and a send that had already decided to redirect into a deleted member gets
 * EPIPE and SIGPIPE. The application's socket may go as soon as its queue is empty, because the only one who
 * sends to it is the caller.
 */
#include "maps.h"
#include "lib/address.h"
#include "lib/count.h"
#include "lib/member.h"

#define CREATE 1
#define ENOSPACE -7 /* E2BIG */

/* The socket with this tuple in the caller's namespace, as it would be found for a packet that arrives for
 * it. */
static __always_inline struct bpf_sock *find(struct __sk_buff *skb, const u8 *local, u16 local_port,
					     const u8 *remote, u16 remote_port)
{
	const u32 *to = (const u32 *)local, *from = (const u32 *)remote;
	struct bpf_sock_tuple tuple = {};

	if (is_ipv4(local)) {
		tuple.ipv4.saddr = from[3];
		tuple.ipv4.daddr = to[3];
		tuple.ipv4.sport = __builtin_bswap16(remote_port);
		tuple.ipv4.dport = __builtin_bswap16(local_port);
		return bpf_sk_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	}
	copy_address((u8 *)tuple.ipv6.saddr, remote);
	copy_address((u8 *)tuple.ipv6.daddr, local);
	tuple.ipv6.sport = __builtin_bswap16(remote_port);
	tuple.ipv6.dport = __builtin_bswap16(local_port);
	return bpf_sk_lookup_tcp(skb, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
}

/* Everything both ways has been read. copied_seq says more than an acknowledgement, which only means
 * "received", and may lag behind by a delayed-ACK timer without meaning anything. Bytes that move after this
 * look are no danger: they move write_seq away from the proof (see redirect.c). */
static __always_inline bool quiet(void *application, void *proxy)
{
	return FIELD(u32, proxy, AT_TCP_COPIED_SEQ) == FIELD(u32, application, AT_TCP_WRITE_SEQ) &&
	       FIELD(u32, application, AT_TCP_COPIED_SEQ) == FIELD(u32, proxy, AT_TCP_WRITE_SEQ) &&
	       redirected_all_read(application) && redirected_all_read(proxy);
}

/* Whether the socket is free, or already stands in our table as what it would become. */
static __always_inline bool ours_or_free(struct bpf_sock *sk, void *tcp, struct member *member, u32 side)
{
	struct member_key key = {.side = side};
	struct bpf_sock *found;

	if (!psock_of(tcp))
		return true;
	if (!member || member->side != side)
		return false;
	key.pair = member->pair;
	found = (struct bpf_sock *)socks.lookup(&key);
	if (!found)
		return false;
	bpf_sk_release(found);
	return true;
}

/* REASON_JOINED when the connection may join; fills in what user space needs to judge the rest. */
static __always_inline enum reason may_join(struct command *command, struct bpf_sock *application,
					    struct bpf_sock *proxy, void *application_tcp, void *proxy_tcp)
{
	struct origin *origin = origins.sk_storage_get(application, 0, 0);
	enum reason reason;

	/* No bystander: only a connection that connect led to the proxy, in this namespace. */
	if (!origin || origin->decision.carrier != CARRIED_PROXY || origin->netns != command->netns ||
	    origin->decision.given_port != __builtin_bswap16(command->remote_port))
		return REASON_SOCKET_UNKNOWN;
	command->pid = origin->pid;
	/* A listener is found where the proxy has closed its end. */
	if (application->state != ESTABLISHED || proxy->state != ESTABLISHED)
		return REASON_NOT_ESTABLISHED;
	if (application->protocol != IPPROTO_TCP_ || proxy->protocol != IPPROTO_TCP_ ||
	    not_plain_tcp(proxy_tcp))
		return REASON_NOT_TCP;
	reason = unfit(application_tcp);
	if (reason != REASON_JOINED)
		return reason;
	if (!ours_or_free(application, application_tcp, members.sk_storage_get(application, 0, 0),
			  SIDE_APPLICATION) ||
	    !ours_or_free(proxy, proxy_tcp, members.sk_storage_get(proxy, 0, 0), SIDE_PROXY))
		return REASON_SOCKET_TAKEN;
	return quiet(application_tcp, proxy_tcp) ? REASON_JOINED : REASON_UNREAD;
}

/* Into the table, or it is there already. */
static __always_inline enum reason enter(struct bpf_sock *sk, void *tcp, struct member *member, u64 pair,
					 u32 side)
{
	struct member_key key = {.pair = pair, .side = side};
	int error;

	member->pair = pair;
	member->side = side;
	member->sent = 0;
	if (psock_of(tcp))
		return REASON_JOINED;
	error = socks.insert(&key, (void *)sk);
	if (!error)
		return REASON_JOINED;
	return error == ENOSPACE ? REASON_MEMBERS_FULL : REASON_SOCKET_TAKEN;
}

/* The binding comes last: until it is there both members send by TCP. */
static __always_inline enum reason join(struct command *command, struct bpf_sock *application,
					struct bpf_sock *proxy, void *application_tcp, void *proxy_tcp)
{
	struct member fresh = {};
	struct member *a = members.sk_storage_get(application, &fresh, CREATE);
	struct member *p = members.sk_storage_get(proxy, &fresh, CREATE);
	struct pair pair = {
	    .netns = command->netns, .application_port = command->local_port, .pid = command->pid};
	struct member_key key = {.side = SIDE_PROXY};
	enum reason reason;
	u64 id = 0;

	if (!a || !p)
		return REASON_STORAGE_FULL;
	/* The entry of no pair: these tables are being emptied, for a detach or for others of another layout.
	 */
	if (pairs.lookup(&id))
		return REASON_NOT_BOUND;
	/* The number goes with the connection: who left and comes back has the same. */
	id = p->pair;
	if (!id)
		id = (u64)bpf_get_prandom_u32() << 32 | bpf_get_prandom_u32() | 1;
	reason = enter(proxy, proxy_tcp, p, id, SIDE_PROXY);
	if (reason != REASON_JOINED)
		return reason;
	reason = enter(application, application_tcp, a, id, SIDE_APPLICATION);
	if (reason != REASON_JOINED) {
		if (reason == REASON_MEMBERS_FULL) {
			/* Half a pair is no use and takes the room of another. It was never bound. */
			key.pair = id;
			socks.delete(&key);
		}
		return reason;
	}
	copy_address(pair.application, command->local);
	pair.proof[SIDE_APPLICATION] = PROVEN | FIELD(u32, proxy_tcp, AT_TCP_COPIED_SEQ);
	pair.proof[SIDE_PROXY] = PROVEN | FIELD(u32, application_tcp, AT_TCP_COPIED_SEQ);
	if (pairs.update(&id, &pair))
		return REASON_STORAGE_FULL;
	command->pair = id;
	command->room = CREDIT_BYTES;
	return REASON_JOINED;
}

/* Both sockets of a connection that is not known to us yet, by its tuple; LOOK and JOIN. */
static __always_inline enum reason look_or_join(struct __sk_buff *skb, struct command *command)
{
	struct bpf_sock *application, *proxy;
	enum reason reason = REASON_SOCKET_UNKNOWN;
	void *application_tcp, *proxy_tcp;
	u32 checked = command->pid;

	command->pid = 0;
	application = find(skb, command->local, command->local_port, command->remote, command->remote_port);
	if (!application)
		return reason;
	proxy = find(skb, command->remote, command->remote_port, command->local, command->local_port);
	if (proxy) {
		application_tcp = bpf_skc_to_tcp_sock(application);
		proxy_tcp = bpf_skc_to_tcp_sock(proxy);
		if (application_tcp && proxy_tcp) {
			reason = may_join(command, application, proxy, application_tcp, proxy_tcp);
			if (reason == REASON_JOINED && command->op == OP_JOIN)
				reason = checked == command->pid
					     ? join(command, application, proxy, application_tcp, proxy_tcp)
					     : REASON_READER_UNCHECKED;
		}
		bpf_sk_release(proxy);
	}
	bpf_sk_release(application);
	return reason;
}

/* How much may still be redirected towards the application. The caller owns the proxy's socket, so that
 * nothing is on its way while we look: an empty queue means that all of it is read. */
static __always_inline enum reason room(struct command *command)
{
	struct member_key key = {.pair = command->pair, .side = SIDE_APPLICATION};
	struct bpf_sock *application, *proxy;
	struct pair *pair = pairs.lookup(&command->pair);
	enum reason reason = REASON_NOT_BOUND;
	struct member *member;
	void *tcp, *proxy_tcp;

	command->room = 0;
	if (!pair)
		return reason;
	application = (struct bpf_sock *)socks.lookup(&key);
	if (!application)
		return reason;
	key.side = SIDE_PROXY;
	proxy = (struct bpf_sock *)socks.lookup(&key);
	if (proxy) {
		member = members.sk_storage_get(proxy, 0, 0);
		tcp = bpf_skc_to_tcp_sock(application);
		proxy_tcp = bpf_skc_to_tcp_sock(proxy);
		if (member && tcp && proxy_tcp) {
			reason = unfit(tcp);
			if (redirected_all_read(tcp))
				pair->read[SIDE_PROXY] = member->sent;
			if (reason != REASON_JOINED)
				pairs.delete(&command->pair);
			else if (!ANSWERS)
				command->room = CREDIT_BYTES; /* answers go by TCP anyway, see redirect.c */
			else if (pair->proof[SIDE_PROXY] !=
				 (PROVEN | FIELD(u32, proxy_tcp, AT_TCP_WRITE_SEQ)))
				reason = REASON_ORDER_UNPROVEN;
			else
				command->room = CREDIT_BYTES - (member->sent - pair->read[SIDE_PROXY]);
		}
		bpf_sk_release(proxy);
	}
	bpf_sk_release(application);
	return reason;
}

/* Out of the table; `owner` says that the caller is the one who sends to this socket, and is not sending now.
 */
static __always_inline enum reason leave(struct command *command, u32 side, bool owner)
{
	struct member_key key = {.pair = command->pair, .side = side};
	struct member_key peer_key = {.pair = command->pair, .side = side ^ 1};
	enum reason reason = REASON_LEFT;
	struct bpf_sock *sk, *peer;
	void *tcp;

	pairs.delete(&command->pair);
	sk = (struct bpf_sock *)socks.lookup(&key);
	if (!sk)
		return reason;
	if (!owner) {
		peer = (struct bpf_sock *)socks.lookup(&peer_key);
		if (peer) {
			tcp = bpf_skc_to_tcp_sock(peer);
			if (!tcp || in_call(tcp))
				reason = REASON_PEER_SENDING;
			bpf_sk_release(peer);
		}
	}
	if (reason == REASON_LEFT) {
		/* Deleting a member throws away what it has not read. */
		tcp = bpf_skc_to_tcp_sock(sk);
		if (tcp && redirected_all_read(tcp))
			socks.delete(&key);
		else
			reason = REASON_UNREAD;
	}
	bpf_sk_release(sk);
	return reason;
}

int command(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct command *packet = data + COMMAND_OFFSET, command;
	enum reason reason;

	if ((void *)(packet + 1) > end)
		return 1;
	command = *packet;
	if (command.op == OP_LOOK || command.op == OP_JOIN)
		reason = look_or_join(skb, &command);
	else if (command.op == OP_ROOM)
		reason = room(&command);
	else if (command.op == OP_LEAVE)
		reason = leave(&command, SIDE_APPLICATION, true);
	else if (command.op == OP_DRAIN)
		reason = leave(&command, command.side & 1, false);
	else
		reason = command.reason;
	/* A look decides nothing, and an unchecked reader is asked about again at once. */
	if (command.op != OP_LOOK && command.op != OP_ROOM && reason != REASON_READER_UNCHECKED)
		count(PROGRAM_COMMAND, reason);
	command.reason = reason;
	*packet = command;
	return 0;
}
