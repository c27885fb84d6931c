/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * sk_msg: a member sends, and we hand the bytes to its peer's socket, or leave them to TCP.
 *
 * The rule of this file: SK_PASS, always. A refused redirect is plain TCP, never an error.
 *
 * Why the order holds. A member has two receive queues and reads the redirected one first, so a redirected
 * byte must never find an older TCP byte unread. `proof` is the peer's copied_seq: how far the peer has read
 * our TCP bytes, written only by the peer itself (in its own sends) or by the command program that saw it. We
 * redirect only while our write_seq is that very number, that is, while every TCP byte we ever sent has been
 * read. The comparison runs under our socket's lock, and what the peer has read it cannot unread, so no race
 * makes a stale proof true; at worst a true one is missed. The one way to be fooled would be to send exactly
 * 4 GiB by TCP past a proof: so each TCP send takes the proof away. (One TCP send we are not asked about: the
 * kernel keeps a verdict whose push ended in EAGAIN, and the next send follows it. It moves write_seq, which
 * is all that the comparison needs.) Nothing is sticky beyond that: when the peer, having read everything,
 * sends again, it proves us anew.
 *
 * Why the memory is bounded. A redirect has no back-pressure. We hold CREDIT_BYTES beyond what the peer is
 * known to have read, and it is known when the peer sends while its redirected queue is empty. A send that is
 * between this program and the queue at that very moment counts as read though it is not: one message per
 * sending thread, once.
 *
 * Both facts are seen from the pair's entry, which is written only when something changed: a ping-pong of
 * small messages reads one shared cache line and writes none.
 */
#include "maps.h"
#include "lib/count.h"
#include "lib/member.h"

/* What our peer may conclude from our sending now. */
static __always_inline void publish(struct pair *pair, u32 peer, void *tcp)
{
	u64 proof = PROVEN | FIELD(u32, tcp, AT_TCP_COPIED_SEQ);
	u64 sent = pair->sent[peer]; /* before the look at the queue: what is sent later is not in it yet */

	if (pair->proof[peer] != proof)
		pair->proof[peer] = proof;
	if (pair->read[peer] != sent && redirected_all_read(tcp))
		pair->read[peer] = sent;
}

/* REASON_REDIRECTED, or why this send goes by TCP. */
static __always_inline enum reason decide(struct sk_msg_md *msg, struct member *member, struct pair *pair,
					  u32 side, void *tcp)
{
	struct member_key peer = {.pair = member->pair, .side = side ^ 1};
	u64 sent = member->sent + msg->size;

	/* Kernels whose FIONREAD does not count redirected bytes (5.10, 6.1) count TCP's rightly for a member: there
	 * only requests are redirected, because nginx, Java and .NET would see no answer in front of them. */
	if (!ANSWERS && side == SIDE_PROXY)
		return REASON_READER_COUNTS;
	if (pair->proof[side] != (PROVEN | FIELD(u32, tcp, AT_TCP_WRITE_SEQ)))
		return REASON_ORDER_UNPROVEN;
	if (sent - pair->read[side] > CREDIT_BYTES) {
		pair->sent[side] = member->sent;
		return REASON_NO_CREDIT;
	}
	/* The helper's own answer for a missing peer is SK_DROP, EACCES for the application. */
	if (socks.msg_redirect_hash(msg, &peer, BPF_F_INGRESS) != SK_PASS)
		return REASON_TARGET_MISSING;
	member->sent = sent;
	if (sent - pair->sent[side] >= PUBLISH_BYTES)
		pair->sent[side] = sent;
	return REASON_REDIRECTED;
}

int redirect(struct sk_msg_md *msg)
{
	struct bpf_sock *sk = msg->sk;
	struct member *member;
	struct pair *pair;
	enum reason reason;
	void *tcp;
	u32 side;
	u64 id;

	if (!sk)
		return SK_PASS;
	member = members.sk_storage_get(sk, 0, 0);
	tcp = bpf_skc_to_tcp_sock(sk);
	if (!member || !tcp) {
		count(PROGRAM_SK_MSG, REASON_NOT_BOUND);
		return SK_PASS;
	}
	id = member->pair;
	side = member->side & 1;
	pair = pairs.lookup(&id);
	if (!pair) {
		count(PROGRAM_SK_MSG, REASON_NOT_BOUND);
		return SK_PASS;
	}
	if (side == SIDE_APPLICATION) {
		reason = unfit(tcp);
		if (reason != REASON_JOINED) {
			/* It may be reading by now in a way that members get wrong: neither side redirects
			 * any more, and the proxy finds the binding gone when it next asks for room. */
			pairs.delete(&id);
			count(PROGRAM_SK_MSG, reason);
			return SK_PASS;
		}
	}
	publish(pair, side ^ 1, tcp);
	reason = decide(msg, member, pair, side, tcp);
	if (reason != REASON_REDIRECTED && pair->proof[side])
		pair->proof[side] = 0;
	count(PROGRAM_SK_MSG, reason);
	return SK_PASS;
}

/* What `socks` holds: members keep the program of the moment they joined, so that an upgrade would never
 * reach them. This one only jumps to whatever `stages` names now. */
int redirect_stub(struct sk_msg_md *msg)
{
	stages.call(msg, 0);
	count(PROGRAM_SK_MSG, REASON_NO_STAGE);
	return SK_PASS;
}

#if SELFTEST
/* How not to do it: the control of loader/selftest.py and of the kernel tests, never loaded by an attach. */
int redirect_naive(struct sk_msg_md *msg)
{
	struct bpf_sock *sk = msg->sk;
	struct member *member;

	if (!sk)
		return SK_PASS;
	member = members.sk_storage_get(sk, 0, 0);
	if (!member)
		return SK_PASS;
	struct member_key peer = {.pair = member->pair, .side = (member->side & 1) ^ 1};

	return socks.msg_redirect_hash(msg, &peer, BPF_F_INGRESS);
}
#endif
