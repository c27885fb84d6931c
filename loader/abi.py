"""What Python and the kernel programs share: the single source of `bpf/abi.h` (`python -m loader.header`).

Rules: no implicit padding (header.py refuses it); byte order is part of the field's type; addresses are 16 bytes in
network order, IPv4 as ::ffff:a.b.c.d, so that one set of tables serves both families. A change of any layout changes
`LAYOUT`, and an attach with another LAYOUT makes new maps instead of misreading old ones.
"""

from __future__ import annotations

import ctypes as ct
import hashlib
import ipaddress
from enum import IntEnum
from typing import Any

from meshbpf.model import MapSizes
from meshbpf.reason import KERNEL_REASONS, Reason

u8, u16, u32, u64 = ct.c_uint8, ct.c_uint16, ct.c_uint32, ct.c_uint64
be16 = ct.c_uint16.__ctype_be__
Address = u8 * 16

# --- enums -------------------------------------------------------------------------------------------------------


class Carried(IntEnum):
    """Which carrier the connect hook sends a service's connections to."""

    DIRECT = 1
    PROXY = 2


class Pick(IntEnum):
    """How the connect hook picks a slot."""

    ROUND_ROBIN = 1
    RANDOM = 2
    HASH = 3  # the slots are one Maglev table
    HASH_OF_BOTH = 4  # three, for IPv4 endpoints, for IPv6 ones and for all, each of `slots4` slots


class Limited(IntEnum):
    """Whether a connection counts towards its service's limit: not at all, once it begins, or now."""

    NO = 0
    LATER = 1
    NOW = 2


class Down(IntEnum):
    """What happens to governed connections while the proxy is not there (`onProxyDown`)."""

    DIRECT = 1
    REFUSE = 2


class Serving(IntEnum):
    """What an endpoint is to a service's port: sockets that talk to it may go on, or it takes new ones as well."""

    KEEPS = 1
    TAKES = 2


class Program(IntEnum):
    """First coordinate of the counters: where the verdict fell."""

    CONNECT = 0
    SOCKOPS = 1
    SK_MSG = 2
    COMMAND = 3
    SENDMSG = 4
    RECVMSG = 5
    RELEASE = 6


REASON_STRIDE = KERNEL_REASONS
COUNTERS = len(Program) * REASON_STRIDE  # index: Program * REASON_STRIDE + Reason
HEARTBEAT_MAX_NS = 1_000_000_000
CREDIT_BYTES = 1 << 20  # promise 4
PUBLISH_BYTES = 1 << 14  # how far a member's own count of redirected bytes may run ahead of the one its peer sees
PROVEN = 1 << 32  # marks a proof: sequence numbers are 32 bits, and 0 is one of them
COMMAND_OFFSET = 16  # behind the Ethernet header that a test run wants, aligned
EVENTS_BYTES = 1 << 18
PICK_TRIES = 4
# A socket that sends again after so long without an answer is retrying: a second is the shortest timeout of resolvers.
RETRY_NS = 1_000_000_000
PATIENCE = 3  # retries that an endpoint which has answered is forgiven; one that never has, none
RECENT_PLACES = 1 << 12  # 256 KiB, so that a place is still in a processor's cache when its turn comes again
RECENT_UNWATCHED_JIFFIES = 60_000  # 1 to 10 minutes, as the kernel counts; to the first packet it is microseconds


# --- layouts -----------------------------------------------------------------------------------------------------


class ServiceKey(ct.Structure):
    _fields_ = [("address", Address), ("port", be16), ("protocol", u8), ("pad", u8)]


class ServiceValue(ct.Structure):
    _fields_ = [("service_id", u32)]


class PolicyValue(ct.Structure):
    """How the connect hook treats a service. `slots` is how many slots may be picked from; the first `slots4` of them
    are IPv4 endpoints, all that an IPv4 socket can reach (see `Pick` for hashed ones). `affinity_ms`: how long after
    its last connection a client still gets the same endpoint; 0: nobody notes whom it got. `limit`: how many
    connections may be open at once; 0: any number.
    """

    _fields_ = [
        ("slots", u32),
        ("slots4", u32),
        ("carrier", u8),
        ("pick", u8),
        ("on_proxy_down", u8),
        ("pad", u8),
        ("affinity_ms", u32),
        ("limit", u32),
    ]


class SlotKey(ct.Structure):
    _fields_ = [("service_id", u32), ("index", u32)]


class SlotValue(ct.Structure):
    _fields_ = [("endpoint_id", u32)]


class EndpointValue(ct.Structure):
    _fields_ = [("address", Address), ("port", be16), ("draining", u8), ("pad", u8)]


class AgentState(ct.Structure):
    """The one entry of `agent`: which cgroup is the agent's own, where its proxy listens, and, for the loader alone,
    the first ids never used.
    """

    _fields_ = [
        ("exempt_cgroup", u64),
        ("next_service", u32),
        ("next_endpoint", u32),
        ("proxy_port", be16),
        ("pad", u16 * 3),
    ]


class Listener(ct.Structure):
    """Per-socket storage: that it is there says that the socket is a listener of the proxy."""

    _fields_ = [("ours", u32)]


class Decision(ct.Structure):
    """What connect decided about a socket, for getpeername and sockops.

    `asked` is what the application dialled, `given` what it was led to. `watched`: sockops will hear of the
    connection's end. `counted`: it is open, and counted as such.
    """

    _fields_ = [
        ("asked", Address),
        ("given", Address),
        ("asked_port", be16),
        ("given_port", be16),
        ("service_id", u32),
        ("carrier", u8),
        ("counted", u8),
        ("watched", u8),
        ("limited", u8),
    ]


class BpfSpinLock(ct.Structure):
    """The kernel's own; a map's value may hold one, by this name."""

    _fields_ = [("val", u32)]


class Recent(ct.Structure):
    """A place of `recent`: whose (0: nobody's) and since when (jiffies)."""

    _fields_ = [("cookie", u64), ("lock", BpfSpinLock), ("since", u32), ("decision", Decision), ("pad", u32)]


class Origin(ct.Structure):
    """Per-socket storage: the decision, and who connected from where, which the proxy and the command program ask."""

    _fields_ = [("netns", u64), ("cgroup", u64), ("decision", Decision), ("pid", u32)]


class FlowKey(ct.Structure):
    """A governed connection as the proxy sees it on accept: the client's address and port within a namespace."""

    _fields_ = [("netns", u64), ("address", Address), ("port", be16), ("pad", u16 * 3)]


class FlowValue(ct.Structure):
    _fields_ = [
        ("cgroup", u64),
        ("asked", Address),
        ("asked_port", be16),
        ("pad", u16),
        ("service_id", u32),
        ("pid", u32),
        ("pad2", u32),
    ]


class ConnectionCount(ct.Structure):
    """Per CPU and service: connections established and ended, by carrier (index: Carried - 1)."""

    _fields_ = [("opened", u64 * 2), ("closed", u64 * 2)]


class Event(ct.Structure):
    """To the agent through the ring buffer: a caller in a namespace where no listener is."""

    _fields_ = [("netns", u64), ("pid", u32), ("reason", u32)]


class ServingKey(ct.Structure):
    """An endpoint that belongs to the service's port, draining or not; the value is one of `Serving`."""

    _fields_ = [("service_id", u32), ("endpoint_id", u32)]


class Connected(ct.Structure):
    """A connected UDP socket, by its cookie: whom connect gave it, to find it again when that endpoint is gone.

    `carried`: from earlier tables, where it was counted.
    """

    _fields_ = [
        ("netns", u64),
        ("given", Address),
        ("given_port", be16),
        ("carried", u8),
        ("pad", u8),
        ("service_id", u32),
        ("endpoint_id", u32),
        ("pid", u32),
    ]


class TalkKey(ct.Structure):
    """An unconnected UDP socket and the other side: as it was asked for (`talks`), or as it is (`answers`)."""

    _fields_ = [("cookie", u64), ("address", Address), ("port", be16), ("pad", u16 * 3)]


class Talk(ct.Structure):
    """Whom a socket's datagrams to a service go to. `sent` is when the last one went that has no answer yet, or 0."""

    _fields_ = [
        ("sent", u64),
        ("given", Address),
        ("given_port", be16),
        ("patience", u8),
        ("pad", u8),
        ("service_id", u32),
        ("endpoint_id", u32),
        ("pad2", u32),
    ]


class Asked(ct.Structure):
    """The service address that the datagrams of an endpoint are shown with."""

    _fields_ = [("address", Address), ("port", be16), ("pad", u16)]


class Client(ct.Structure):
    """Who calls: the address that its socket is bound to, or, with an address of zeros, its network namespace."""

    _fields_ = [("address", Address), ("netns", u64)]


class AffinityKey(ct.Structure):
    _fields_ = [("client", Client), ("service_id", u32), ("pad", u32)]


class Affinity(ct.Structure):
    """The endpoint that a client was led to, and when it was last (CLOCK_MONOTONIC)."""

    _fields_ = [("used", u64), ("endpoint_id", u32), ("pad", u32)]


class Side(IntEnum):
    """Which end of a pair a member is."""

    APPLICATION = 0
    PROXY = 1


class MemberKey(ct.Structure):
    """A socket in the redirect table: the pair it belongs to, and which end it is.

    Not its tuple: a pair's number is drawn once per connection and never comes back, so neither a reused port nor the
    same loopback tuple in another namespace can ever be given another connection's bytes.
    """

    _fields_ = [("pair", u64), ("side", u32), ("pad", u32)]


class Member(ct.Structure):
    """Per-socket storage of a member. `sent` counts what it redirected; only its own sends write it."""

    _fields_ = [("pair", u64), ("sent", u64), ("side", u32), ("pad", u32)]


class Pair(ct.Structure):
    """A binding: both ends may redirect while it is there. Arrays are indexed by the Side that sends.

    `proof` is PROVEN | the peer's copied_seq, as the peer itself has seen it, or 0: the side redirects only while its
    own write_seq is that number (promise 3, see bpf/redirect.c). `sent` is published from Member.sent now and then;
    `read` is what `sent` was when the peer was last seen with nothing unread (promise 4). The rest is for people.
    """

    _fields_ = [
        ("proof", u64 * 2),
        ("sent", u64 * 2),
        ("read", u64 * 2),
        ("netns", u64),
        ("application", Address),
        ("application_port", u16),
        ("pad", u16),
        ("pid", u32),
    ]


class Op(IntEnum):
    """What the command program is asked to do (see bpf/command.c)."""

    LOOK = 0
    JOIN = 1
    ROOM = 2
    LEAVE = 3
    DRAIN = 4
    REFUSE = 5


class Command(ct.Structure):
    """Input and output of the command program, which starts it at COMMAND_OFFSET of its packet.

    `local` and `remote` are the application's own view (LOOK, JOIN); the other operations name the `pair`. `pid` is in:
    the process whose pipes were looked at; out: the process that connected. `room` is what may still be redirected
    towards the application. `reason` is the answer.
    """

    _fields_ = [
        ("pair", u64),
        ("netns", u64),
        ("room", u64),
        ("local", Address),
        ("remote", Address),
        ("local_port", u16),
        ("remote_port", u16),
        ("op", u32),
        ("side", u32),
        ("reason", u32),
        ("pid", u32),
        ("pad", u32),
    ]


STRUCTS: tuple[type[ct.Structure], ...] = (
    ServiceKey, ServiceValue, PolicyValue, SlotKey, SlotValue, EndpointValue, AgentState, Listener, Decision, Recent,
    Origin, FlowKey, FlowValue, ConnectionCount, Event, ServingKey, Connected, TalkKey, Talk, Asked, Client,
    AffinityKey, Affinity, MemberKey, Member, Pair, Command,
)  # fmt: skip
ENUMS: tuple[type[IntEnum], ...] = (Carried, Pick, Limited, Down, Serving, Program, Reason, Side, Op)
CONSTANTS = {
    "COUNTERS": COUNTERS,
    "REASON_STRIDE": REASON_STRIDE,
    "HEARTBEAT_MAX_NS": HEARTBEAT_MAX_NS,
    "CREDIT_BYTES": CREDIT_BYTES,
    "PUBLISH_BYTES": PUBLISH_BYTES,
    "PROVEN": PROVEN,
    "COMMAND_OFFSET": COMMAND_OFFSET,
    "EVENTS_BYTES": EVENTS_BYTES,
    "PICK_TRIES": PICK_TRIES,
    "RETRY_NS": RETRY_NS,
    "PATIENCE": PATIENCE,
    "RECENT_PLACES": RECENT_PLACES,
    "RECENT_UNWATCHED_JIFFIES": RECENT_UNWATCHED_JIFFIES,
}


def layout(sizes: MapSizes) -> str:
    """A short digest of every layout and table size: maps of another layout are never reused."""
    digest = hashlib.sha256()
    for struct in STRUCTS:
        digest.update(f"{struct.__name__}:{[(f[0], str(f[1])) for f in struct._fields_]}\n".encode())
    for enum in ENUMS:
        digest.update(f"{enum.__name__}:{[(m.name, m.value) for m in enum]}\n".encode())
    digest.update(repr((CONSTANTS, sizes)).encode())
    return digest.hexdigest()[:12]


# --- values ------------------------------------------------------------------------------------------------------


def pack_address(address: str) -> Any:
    """`address` (IPv4 or IPv6 text) as the 16 bytes the tables use. Raises ValueError when it is neither."""
    parsed = ipaddress.ip_address(address)
    packed = parsed.packed if parsed.version == 6 else b"\0" * 10 + b"\xff\xff" + parsed.packed
    return Address(*packed)


def unpack_address(raw: Any) -> str:
    """The text form of 16 table bytes; IPv4-mapped addresses come back as IPv4."""
    parsed = ipaddress.IPv6Address(bytes(raw))
    return str(parsed.ipv4_mapped or parsed)
