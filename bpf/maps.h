/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * Every table, once. loader/compile.py pins each by its name in a folder that carries the layout's digest, and lets an
 * upgrade with the same layout go on with the tables that are there.
 *
 * One declaration for all kinds, because bcc's own macros know no socket storage.
 */
#pragma once
#include "abi.h"

#define TABLE(_kind, _key, _leaf, _name, _max, _flags)                                                       \
	struct _name##_table_t {                                                                             \
		_key key;                                                                                    \
		_leaf leaf;                                                                                  \
		_leaf *(*lookup)(_key *);                                                                    \
		int (*update)(_key *, _leaf *);                                                              \
		int (*insert)(_key *, _leaf *);                                                              \
		int (*delete)(_key *);                                                                       \
		void (*call)(void *, int);                                                                   \
		void *(*sk_storage_get)(void *, void *, int);                                                \
		int (*sk_storage_delete)(void *);                                                            \
		int (*msg_redirect_hash)(void *, void *, u64);                                               \
		int (*ringbuf_output)(void *, u64, u64);                                                     \
		u32 max_entries;                                                                             \
		int flags;                                                                                   \
	};                                                                                                   \
	__attribute__((section("maps/" _kind))) struct _name##_table_t _name = {.flags = (_flags),           \
										.max_entries = (_max)};      \
	BPF_ANNOTATE_KV_PAIR(_name, _key, _leaf)

/* address, port, protocol -> service id. Writer: loader. */
TABLE("hash", struct service_key, struct service_value, services, SIZE_SERVICES, 0);
/* service id -> slot count, carrier, pick, onProxyDown. Writer: loader. */
TABLE("hash", u32, struct policy_value, policies, SIZE_POLICIES, 0);
/* service id, index -> endpoint id; an endpoint stands here as often as its weight says. Writer: loader. */
TABLE("hash", struct slot_key, struct slot_value, slots, SIZE_SLOTS, 0);
/* endpoint id -> address and port. Writer: loader. */
TABLE("hash", u32, struct endpoint_value, endpoints, SIZE_ENDPOINTS, 0);
/* service id -> round-robin position. Entries: loader; position: connect. */
TABLE("hash", u32, u64, rounds, SIZE_POLICIES, 0);
/* the one entry about the agent. Writer: loader. */
TABLE("array", int, struct agent_state, agent, 1, 0);
/* when a worker last lived, CLOCK_MONOTONIC in ns. Writers: workers. */
TABLE("array", int, u64, heartbeat, 1, 0);
/* per socket: there for the proxy's listeners, for nobody else. Writer: agent. Reader: connect. */
TABLE("sk_storage", int, struct listener, listeners, 0, BPF_F_NO_PREALLOC);
/* place by socket cookie -> what connect decided about a direct socket. Writers: connect, sockops. See lib/decided.h. */
TABLE("array", int, struct recent, recent, RECENT_PLACES, 0);
/* per socket: what connect decided about it, when it is not in `recent`. Writer: connect. */
TABLE("sk_storage", int, struct origin, origins, 0, BPF_F_NO_PREALLOC);
/* client within a namespace -> what it dialled. Writer: sockops, and nobody else. Reader: workers. */
TABLE("lru_hash", struct flow_key, struct flow_value, flows, SIZE_FLOWS, 0);
/* service id -> connections opened and closed, per CPU. Entries: loader; counts: sockops. */
TABLE("percpu_hash", u32, struct connection_count, connections, SIZE_POLICIES, BPF_F_NO_PREALLOC);
/* program * REASON_STRIDE + reason -> verdicts, per CPU. */
TABLE("percpu_array", int, u64, counters, COUNTERS, 0);
/* callers in a namespace without a listener. Reader: agent. */
TABLE("ringbuf", int, int, events, EVENTS_BYTES, 0);

/* service id, endpoint id: an endpoint of a UDP port, or of one with sessionAffinity. Writer: loader. */
TABLE("hash", struct serving_key, u32, serving, SIZE_ENDPOINTS, BPF_F_NO_PREALLOC);
/* cookie -> a connected UDP socket. Writers: connect, release. */
TABLE("hash", u64, struct connected, connected, SIZE_DATAGRAMS, BPF_F_NO_PREALLOC);
/* UDP socket and service address -> its endpoint. Writers: sendmsg, recvmsg, and nobody else. */
TABLE("lru_hash", struct talk_key, struct talk, talks, SIZE_DATAGRAMS, 0);
/* UDP socket and endpoint -> the service address it asked for. Writer: sendmsg, and nobody else. */
TABLE("lru_hash", struct talk_key, struct asked, answers, SIZE_DATAGRAMS, 0);
/* service id -> connections open now, of services with a limit. Writers: connect, sockops; loader removes. */
TABLE("hash", u32, u64, limits, SIZE_POLICIES, BPF_F_NO_PREALLOC);
/* client and service -> the endpoint it had last. Writer: connect, sendmsg. */
TABLE("lru_hash", struct affinity_key, struct affinity, affinities, SIZE_AFFINITIES, 0);

#if REDIRECT
/* pair and side -> socket. Writer: command. Reader: redirect. A leaf of 8 bytes lets user space read the cookie. */
TABLE("sockhash", struct member_key, u64, socks, SIZE_MEMBERS, 0);
/* per socket: the pair it is in. Writers: command, redirect. */
TABLE("sk_storage", int, struct member, members, 0, BPF_F_NO_PREALLOC);
/* pair -> its binding. Writers: command, redirect, sockops. LRU, because a connection that ends after a detach leaves its
 * own behind; it has room for more pairs than `socks` has for sockets, so that only leavings are ever evicted. */
TABLE("lru_hash", u64, struct pair, pairs, SIZE_MEMBERS, 0);
/* 0 -> the current redirect program. Writer: loader. Reader: the stub. */
TABLE("prog", int, u32, stages, 1, 0);
#endif
