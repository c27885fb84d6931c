/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/* GENERATED from loader/abi.py by `make abi`: do not edit. */

#define COUNTERS 448
#define REASON_STRIDE 64
#define HEARTBEAT_MAX_NS 1000000000
#define CREDIT_BYTES 1048576
#define PUBLISH_BYTES 16384
#define PROVEN 4294967296
#define COMMAND_OFFSET 16
#define EVENTS_BYTES 262144
#define PICK_TRIES 4
#define RETRY_NS 1000000000
#define PATIENCE 3
#define RECENT_PLACES 4096
#define RECENT_UNWATCHED_JIFFIES 60000

enum carried {
	CARRIED_DIRECT = 1,
	CARRIED_PROXY = 2,
};

enum pick {
	PICK_ROUND_ROBIN = 1,
	PICK_RANDOM = 2,
	PICK_HASH = 3,
	PICK_HASH_OF_BOTH = 4,
};

enum limited {
	LIMITED_NO = 0,
	LIMITED_LATER = 1,
	LIMITED_NOW = 2,
};

enum down {
	DOWN_DIRECT = 1,
	DOWN_REFUSE = 2,
};

enum serving {
	SERVING_KEEPS = 1,
	SERVING_TAKES = 2,
};

enum program {
	PROGRAM_CONNECT = 0,
	PROGRAM_SOCKOPS = 1,
	PROGRAM_SK_MSG = 2,
	PROGRAM_COMMAND = 3,
	PROGRAM_SENDMSG = 4,
	PROGRAM_RECVMSG = 5,
	PROGRAM_RELEASE = 6,
};

enum reason {
	REASON_DIRECT = 0,
	REASON_PROXY = 1,
	REASON_NO_ENDPOINT = 2,
	REASON_ENDPOINT_VANISHED = 3,
	REASON_PROXY_NOT_IN_NETNS = 4,
	REASON_PROXY_HUNG = 5,
	REASON_PROXY_DOWN_REFUSED = 6,
	REASON_AGENT_EXEMPT = 7,
	REASON_NETNS_UNSUPPORTED = 8,
	REASON_STORAGE_FULL = 9,
	REASON_FLOW_FULL = 10,
	REASON_OPENED = 11,
	REASON_CLOSED = 12,
	REASON_JOINED = 13,
	REASON_LEFT = 14,
	REASON_REDIRECTED = 15,
	REASON_NOT_BOUND = 16,
	REASON_NO_CREDIT = 17,
	REASON_ORDER_UNPROVEN = 18,
	REASON_TARGET_MISSING = 19,
	REASON_READER_BLOCKS = 20,
	REASON_READER_LOWAT = 21,
	REASON_NOT_TCP = 22,
	REASON_SOCKET_UNKNOWN = 23,
	REASON_MEMBERS_FULL = 24,
	REASON_UNREAD = 25,
	REASON_NOT_ESTABLISHED = 26,
	REASON_READER_MAY_SPLICE = 27,
	REASON_PROXY_ABSENT = 28,
	REASON_SOCKET_TAKEN = 29,
	REASON_SENDER_ZEROCOPY = 30,
	REASON_PEER_SENDING = 31,
	REASON_READER_UNCHECKED = 32,
	REASON_NO_STAGE = 33,
	REASON_READER_COUNTS = 34,
	REASON_BOUND_TO_DEVICE = 35,
	REASON_UNANSWERED = 36,
	REASON_ENDPOINT_GONE = 37,
	REASON_ANSWERED = 38,
	REASON_DATAGRAMS_FULL = 39,
	REASON_PLACE_TAKEN = 40,
	REASON_MPTCP = 41,
	REASON_AFFINITY_FULL = 42,
	REASON_OVER_LIMIT = 43,
	REASON_LIMIT_FULL = 44,
};

enum side {
	SIDE_APPLICATION = 0,
	SIDE_PROXY = 1,
};

enum op {
	OP_LOOK = 0,
	OP_JOIN = 1,
	OP_ROOM = 2,
	OP_LEAVE = 3,
	OP_DRAIN = 4,
	OP_REFUSE = 5,
};

struct service_key {
	u8 address[16];
	__be16 port;
	u8 protocol;
	u8 pad;
};
_Static_assert(sizeof(struct service_key) == 20, "service_key");

struct service_value {
	u32 service_id;
};
_Static_assert(sizeof(struct service_value) == 4, "service_value");

struct policy_value {
	u32 slots;
	u32 slots4;
	u8 carrier;
	u8 pick;
	u8 on_proxy_down;
	u8 pad;
	u32 affinity_ms;
	u32 limit;
};
_Static_assert(sizeof(struct policy_value) == 20, "policy_value");

struct slot_key {
	u32 service_id;
	u32 index;
};
_Static_assert(sizeof(struct slot_key) == 8, "slot_key");

struct slot_value {
	u32 endpoint_id;
};
_Static_assert(sizeof(struct slot_value) == 4, "slot_value");

struct endpoint_value {
	u8 address[16];
	__be16 port;
	u8 draining;
	u8 pad;
};
_Static_assert(sizeof(struct endpoint_value) == 20, "endpoint_value");

struct agent_state {
	u64 exempt_cgroup;
	u32 next_service;
	u32 next_endpoint;
	__be16 proxy_port;
	u16 pad[3];
};
_Static_assert(sizeof(struct agent_state) == 24, "agent_state");

struct listener {
	u32 ours;
};
_Static_assert(sizeof(struct listener) == 4, "listener");

struct decision {
	u8 asked[16];
	u8 given[16];
	__be16 asked_port;
	__be16 given_port;
	u32 service_id;
	u8 carrier;
	u8 counted;
	u8 watched;
	u8 limited;
};
_Static_assert(sizeof(struct decision) == 44, "decision");

struct recent {
	u64 cookie;
	struct bpf_spin_lock lock;
	u32 since;
	struct decision decision;
	u32 pad;
};
_Static_assert(sizeof(struct recent) == 64, "recent");

struct origin {
	u64 netns;
	u64 cgroup;
	struct decision decision;
	u32 pid;
};
_Static_assert(sizeof(struct origin) == 64, "origin");

struct flow_key {
	u64 netns;
	u8 address[16];
	__be16 port;
	u16 pad[3];
};
_Static_assert(sizeof(struct flow_key) == 32, "flow_key");

struct flow_value {
	u64 cgroup;
	u8 asked[16];
	__be16 asked_port;
	u16 pad;
	u32 service_id;
	u32 pid;
	u32 pad2;
};
_Static_assert(sizeof(struct flow_value) == 40, "flow_value");

struct connection_count {
	u64 opened[2];
	u64 closed[2];
};
_Static_assert(sizeof(struct connection_count) == 32, "connection_count");

struct event {
	u64 netns;
	u32 pid;
	u32 reason;
};
_Static_assert(sizeof(struct event) == 16, "event");

struct serving_key {
	u32 service_id;
	u32 endpoint_id;
};
_Static_assert(sizeof(struct serving_key) == 8, "serving_key");

struct connected {
	u64 netns;
	u8 given[16];
	__be16 given_port;
	u8 carried;
	u8 pad;
	u32 service_id;
	u32 endpoint_id;
	u32 pid;
};
_Static_assert(sizeof(struct connected) == 40, "connected");

struct talk_key {
	u64 cookie;
	u8 address[16];
	__be16 port;
	u16 pad[3];
};
_Static_assert(sizeof(struct talk_key) == 32, "talk_key");

struct talk {
	u64 sent;
	u8 given[16];
	__be16 given_port;
	u8 patience;
	u8 pad;
	u32 service_id;
	u32 endpoint_id;
	u32 pad2;
};
_Static_assert(sizeof(struct talk) == 40, "talk");

struct asked {
	u8 address[16];
	__be16 port;
	u16 pad;
};
_Static_assert(sizeof(struct asked) == 20, "asked");

struct client {
	u8 address[16];
	u64 netns;
};
_Static_assert(sizeof(struct client) == 24, "client");

struct affinity_key {
	struct client client;
	u32 service_id;
	u32 pad;
};
_Static_assert(sizeof(struct affinity_key) == 32, "affinity_key");

struct affinity {
	u64 used;
	u32 endpoint_id;
	u32 pad;
};
_Static_assert(sizeof(struct affinity) == 16, "affinity");

struct member_key {
	u64 pair;
	u32 side;
	u32 pad;
};
_Static_assert(sizeof(struct member_key) == 16, "member_key");

struct member {
	u64 pair;
	u64 sent;
	u32 side;
	u32 pad;
};
_Static_assert(sizeof(struct member) == 24, "member");

struct pair {
	u64 proof[2];
	u64 sent[2];
	u64 read[2];
	u64 netns;
	u8 application[16];
	u16 application_port;
	u16 pad;
	u32 pid;
};
_Static_assert(sizeof(struct pair) == 80, "pair");

struct command {
	u64 pair;
	u64 netns;
	u64 room;
	u8 local[16];
	u8 remote[16];
	u16 local_port;
	u16 remote_port;
	u32 op;
	u32 side;
	u32 reason;
	u32 pid;
	u32 pad;
};
_Static_assert(sizeof(struct command) == 80, "command");
