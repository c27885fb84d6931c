/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * cgroup/sendmsg4, sendmsg6, recvmsg4, recvmsg6 and sock_release: UDP, where it is not connect's.
 *
 * The rule of this file: a socket's datagrams to a service go to one endpoint for as long as that is of use, because
 * many protocols are a conversation (QUIC, DTLS); and its retries go to another one, because many are a question
 * (DNS). A retry is a datagram that follows a second of silence. An endpoint that never answered this socket is left
 * at the first, one that did is forgiven PATIENCE of them: the last datagram of a conversation need not be answered.
 */
#include "maps.h"
#include "lib/address.h"
#include "lib/count.h"

#define CONNECTION_REFUSED 111

#if SET_RETVAL
static int (*set_retval)(int) = (void *)187; /* bcc does not know it */
#endif

static __always_inline bool serves(u32 service_id, u32 endpoint_id)
{
	struct serving_key key = {.service_id = service_id, .endpoint_id = endpoint_id};

	return serving.lookup(&key) != 0;
}

/* Whether the talk goes on with its endpoint; if not, the reason why. */
static __always_inline enum reason goes_on(struct talk *talk, u32 service_id, u64 now)
{
	if (talk->service_id != service_id || !serves(service_id, talk->endpoint_id))
		return REASON_ENDPOINT_GONE;
	if (!talk->sent || now - talk->sent < RETRY_NS)
		return REASON_DIRECT;
	if (!talk->patience)
		return REASON_UNANSWERED;
	talk->patience -= 1;
	return REASON_DIRECT;
}

/* What the endpoint sends is shown as the service's. Looked up at every datagram: the entry may have been evicted,
 * or be of another service that has the same endpoint. False: it could not be noted. */
static __always_inline bool expect_answers(u64 cookie, const struct destination *to,
					   const struct service_key *key)
{
	struct talk_key from = {.cookie = cookie, .port = to->port};
	struct asked asked = {.port = key->port};
	struct asked *there;

	copy_address(from.address, to->address);
	there = answers.lookup(&from);
	if (there && there->port == key->port && same_address(there->address, key->address))
		return true;
	copy_address(asked.address, key->address);
	return answers.update(&from, &asked) == 0;
}

enum leading {
	NOT_OURS,
	LED,
	NOBODY, /* a service without an endpoint */
};

static __always_inline enum leading lead_datagram(struct bpf_sock_addr *ctx, struct service_key *key,
						  enum reach reach, struct destination *to)
{
	struct service_value *service = services.lookup(key);
	struct talk_key side = {.port = key->port};
	struct policy_value *policy;
	struct agent_state *state;
	struct talk *talk;
	u32 service_id, avoid = 0;
	int zero = 0;
	u64 now;

	if (!service)
		return NOT_OURS;
	service_id = service->service_id;
	policy = policies.lookup(&service_id);
	state = agent.lookup(&zero);
	if (!policy || !state)
		return NOT_OURS;
	if (state->exempt_cgroup && state->exempt_cgroup == bpf_get_current_cgroup_id()) {
		count(PROGRAM_SENDMSG, REASON_AGENT_EXEMPT);
		return NOT_OURS;
	}
	side.cookie = socket_cookie(ctx);
	copy_address(side.address, key->address);
	now = bpf_ktime_get_ns();
	talk = talks.lookup(&side);
	if (talk) {
		enum reason reason = goes_on(talk, service_id, now);

		if (reason == REASON_DIRECT) {
			talk->sent = now;
			copy_address(to->address, talk->given);
			to->port = talk->given_port;
			if (!expect_answers(side.cookie, to, key))
				count(PROGRAM_SENDMSG, REASON_DATAGRAMS_FULL);
			count(PROGRAM_SENDMSG, REASON_DIRECT);
			return LED;
		}
		count(PROGRAM_SENDMSG, reason);
		if (reason == REASON_UNANSWERED)
			avoid = talk->endpoint_id;
	}
	if (!pick_endpoint(PROGRAM_SENDMSG, service_id, policy, reach, avoid, to)) {
		count(PROGRAM_SENDMSG, REASON_NO_ENDPOINT);
		return NOBODY;
	}

	struct talk fresh = {.sent = now, .given_port = to->port, .service_id = service_id};

	fresh.endpoint_id = to->endpoint_id;
	copy_address(fresh.given, to->address);
	/* Without it the next datagram is led anew: no conversation, but every question is answered. */
	if (talks.update(&side, &fresh) || !expect_answers(side.cookie, to, key))
		count(PROGRAM_SENDMSG, REASON_DATAGRAMS_FULL);
	count(PROGRAM_SENDMSG, REASON_DIRECT);
	return LED;
}

/* sendto() fails as if nobody listened. Kernels before 5.18 cannot say that: port 0 makes it EINVAL there. */
static __always_inline int refuse_datagram(struct bpf_sock_addr *ctx)
{
#if SET_RETVAL
	set_retval(-CONNECTION_REFUSED);
	return 0;
#else
	ctx->user_port = 0;
	return 1;
#endif
}

int sendmsg4(struct bpf_sock_addr *ctx)
{
	struct service_key key = {.protocol = IPPROTO_UDP_, .port = ctx->user_port};
	struct destination to = {};
	enum leading leading;

	if (ctx->protocol != IPPROTO_UDP_)
		return 1;
	set_address4(key.address, ctx->user_ip4);
	leading = lead_datagram(ctx, &key, REACH_IPV4, &to);
	if (leading == NOBODY)
		return refuse_datagram(ctx);
	if (leading == LED) {
		ctx->user_ip4 = ((u32 *)to.address)[3];
		ctx->user_port = to.port;
	}
	return 1;
}

int sendmsg6(struct bpf_sock_addr *ctx)
{
	struct service_key key = {.protocol = IPPROTO_UDP_, .port = ctx->user_port};
	struct destination to = {};
	enum leading leading;

	if (ctx->protocol != IPPROTO_UDP_)
		return 1;
	set_address6(key.address, ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]);
	leading = lead_datagram(ctx, &key, REACH_IPV6, &to);
	if (leading == NOBODY)
		return refuse_datagram(ctx);
	if (leading == LED) {
		ctx->user_ip6[0] = ((u32 *)to.address)[0];
		ctx->user_ip6[1] = ((u32 *)to.address)[1];
		ctx->user_ip6[2] = ((u32 *)to.address)[2];
		ctx->user_ip6[3] = ((u32 *)to.address)[3];
		ctx->user_port = to.port;
	}
	return 1;
}

/* Whose answer a datagram from `source` is: the service address that was asked, or false when it is nobody's. */
static __always_inline bool answer_of(struct bpf_sock_addr *ctx, const u8 *source, struct asked *shown)
{
	struct decision *decision = led_to(ctx, source);
	struct talk_key from = {.port = ctx->user_port};
	struct asked *asked;
	struct talk *talk;

	if (decision) {
		copy_address(shown->address, decision->asked);
		shown->port = decision->asked_port;
		return true;
	}
	from.cookie = socket_cookie(ctx);
	copy_address(from.address, source);
	asked = answers.lookup(&from);
	if (!asked)
		return false;
	copy_address(shown->address, asked->address);
	shown->port = asked->port;
	copy_address(from.address, shown->address);
	from.port = shown->port;
	talk = talks.lookup(&from);
	if (talk && talk->given_port == ctx->user_port && same_address(talk->given, source)) {
		talk->sent = 0;
		talk->patience = PATIENCE;
	}
	return true;
}

int recvmsg4(struct bpf_sock_addr *ctx)
{
	struct asked shown = {};
	u8 source[16];

	set_address4(source, ctx->user_ip4);
	if (answer_of(ctx, source, &shown)) {
		ctx->user_ip4 = ((u32 *)shown.address)[3];
		ctx->user_port = shown.port;
		count(PROGRAM_RECVMSG, REASON_ANSWERED);
	}
	return 1;
}

int recvmsg6(struct bpf_sock_addr *ctx)
{
	struct asked shown = {};
	u8 source[16];

	set_address6(source, ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]);
	if (answer_of(ctx, source, &shown)) {
		ctx->user_ip6[0] = ((u32 *)shown.address)[0];
		ctx->user_ip6[1] = ((u32 *)shown.address)[1];
		ctx->user_ip6[2] = ((u32 *)shown.address)[2];
		ctx->user_ip6[3] = ((u32 *)shown.address)[3];
		ctx->user_port = shown.port;
		count(PROGRAM_RECVMSG, REASON_ANSWERED);
	}
	return 1;
}

int release(struct bpf_sock *ctx)
{
	if (ctx->protocol == IPPROTO_UDP_)
		not_connected(socket_cookie(ctx), PROGRAM_RELEASE);
	return 1;
}
