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


class Down(IntEnum):
    """What happens to governed connections while the proxy is not there (`onProxyDown`)."""

    DIRECT = 1
    REFUSE = 2


class Program(IntEnum):
    """First coordinate of the counters: where the verdict fell."""

    CONNECT = 0
    SOCKOPS = 1
    SK_MSG = 2
    COMMAND = 3


REASON_STRIDE = KERNEL_REASONS
COUNTERS = len(Program) * REASON_STRIDE  # index: Program * REASON_STRIDE + Reason
HEARTBEAT_MAX_NS = 1_000_000_000
LISTENER_PRIORITY = 0x6D62  # SO_PRIORITY above 6 needs CAP_NET_ADMIN: nobody else can pose as the proxy's listener
CREDIT_BYTES = 1 << 20  # promise 4
EVENTS_BYTES = 1 << 18
PICK_TRIES = 4


# --- layouts -----------------------------------------------------------------------------------------------------


class ServiceKey(ct.Structure):
    _fields_ = [("address", Address), ("port", be16), ("protocol", u8), ("pad", u8)]


class ServiceValue(ct.Structure):
    _fields_ = [("service_id", u32)]


class PolicyValue(ct.Structure):
    """How the connect hook treats a service; `slots` is how many slots may be picked from."""

    _fields_ = [("slots", u32), ("carrier", u8), ("pick", u8), ("on_proxy_down", u8), ("pad", u8)]


class SlotKey(ct.Structure):
    _fields_ = [("service_id", u32), ("index", u32)]


class SlotValue(ct.Structure):
    _fields_ = [("endpoint_id", u32)]


class EndpointValue(ct.Structure):
    _fields_ = [("address", Address), ("port", be16), ("draining", u8), ("pad", u8)]


class AgentState(ct.Structure):
    """The one entry of `agent`: which cgroup is the agent's own, and where its proxy listens."""

    _fields_ = [("exempt_cgroup", u64), ("proxy_port", be16), ("pad", u16 * 3)]


class Origin(ct.Structure):
    """Per-socket storage: what connect decided, for getpeername, sockops and the command program.

    `asked` is what the application dialled, `given` what it was led to.
    """

    _fields_ = [
        ("netns", u64),
        ("cgroup", u64),
        ("asked", Address),
        ("given", Address),
        ("asked_port", be16),
        ("given_port", be16),
        ("service_id", u32),
        ("pid", u32),
        ("carrier", u8),
        ("counted", u8),
        ("pad", u16),
    ]


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


class MemberKey(ct.Structure):
    """A socket in the redirect table: its own tuple within its namespace."""

    _fields_ = [("netns", u64), ("local", Address), ("remote", Address), ("local_port", u16), ("remote_port", u16), ("pad", u32)]


class Member(ct.Structure):
    """Per-socket storage of a redirect-table member; `bound` is flipped off before anything is deleted.

    `proven_seq` is the peer's copied_seq when the pair was bound: the owner may redirect only while its own write_seq
    still equals it, that is, while every TCP byte it ever sent has been read and none has moved since (promise 3).
    `sent` counts redirected bytes, `credit_base` the value of `sent` when the peer was last known to have read all.
    """

    _fields_ = [
        ("peer", MemberKey),
        ("sent", u64),
        ("credit_base", u64),
        ("proven_seq", u32),
        ("bound", u8),
        ("application", u8),
        ("pad", u16),
    ]


class Op(IntEnum):
    """What the command program is asked to do (see bpf/command.c)."""

    LOOK = 0
    JOIN = 1
    BIND = 2
    UNBIND = 3
    LEAVE = 4


class Command(ct.Structure):
    """Input and output of the command program: `downstream` is the application's own tuple."""

    _fields_ = [
        ("downstream", MemberKey),
        ("op", u32),
        ("reason", u32),
        ("tcp_unread", u32),
        ("redirect_unread", u32),
        ("unacked", u32),
        ("pad", u32),
    ]


STRUCTS: tuple[type[ct.Structure], ...] = (
    ServiceKey, ServiceValue, PolicyValue, SlotKey, SlotValue, EndpointValue, AgentState, Origin, FlowKey, FlowValue,
    ConnectionCount, Event, MemberKey, Member, Command,
)  # fmt: skip
ENUMS: tuple[type[IntEnum], ...] = (Carried, Pick, Down, Program, Reason, Op)
CONSTANTS = {
    "COUNTERS": COUNTERS,
    "REASON_STRIDE": REASON_STRIDE,
    "HEARTBEAT_MAX_NS": HEARTBEAT_MAX_NS,
    "LISTENER_PRIORITY": LISTENER_PRIORITY,
    "CREDIT_BYTES": CREDIT_BYTES,
    "EVENTS_BYTES": EVENTS_BYTES,
    "PICK_TRIES": PICK_TRIES,
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
