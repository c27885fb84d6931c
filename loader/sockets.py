"""Open TCP connections that connect led, with what it decided of each: from `recent`, or the storage of the socket.

The kernel hands a socket's storage out with the socket when inet_diag is asked for it (what `ss` uses; since Linux
5.7), so nothing is kept, counted or followed for it while connections come and go: whoever asks pays, for every TCP
socket of the namespace. Works in the calling thread's network namespace.
"""

from __future__ import annotations

import ctypes as ct
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from loader import abi, libbpf
from loader.sockdiag import SockDiag
from meshbpf.errors import DataplaneError

ATTRIBUTE = struct.Struct("=HH")  # nlattr; its type's upper bits are flags
ANSWER = struct.Struct("=BBBB2s2s16s16s4xQ4xIIII")  # inet_diag_msg: …, ports, addresses, cookie, … inode
WANT_STORAGES, WANT_MAP = 2, 1  # INET_DIAG_REQ_SK_BPF_STORAGES, SK_DIAG_BPF_STORAGE_REQ_MAP_FD
CGROUP = 21  # INET_DIAG_CGROUP_ID
STORAGES, STORAGE, VALUE = 20, 1, 3  # INET_DIAG_SK_BPF_STORAGES, SK_DIAG_BPF_STORAGE, …_MAP_VALUE
ALL_BUT_LISTEN = 0xFFF & ~(1 << 10)


@dataclass(frozen=True, slots=True)
class Led:
    """`client` is the caller's own end, `asked` what it dialled, `given` where it was led. A direct socket's place in
    `recent` says neither process nor namespace: 0."""

    service_id: int
    carrier: abi.Carried
    cgroup: int
    pid: int
    netns: int
    client: tuple[str, int]
    asked: tuple[str, int]
    given: tuple[str, int]


def led(maps_folder: Path) -> list[Led]:
    """Of this namespace. Raises DataplaneError where the kernel does not tell."""
    table = libbpf.get(maps_folder / "origins")
    want = _attribute(WANT_STORAGES, _attribute(WANT_MAP, struct.pack("=I", table)))
    recent = _recent(maps_folder)
    families = (socket.AF_INET, socket.AF_INET6)
    try:
        with SockDiag() as diag:
            answers = (a for family in families for a in diag.every(family, socket.IPPROTO_TCP, ALL_BUT_LISTEN, want))
            return [found for answer in answers if (found := read(answer, recent)) is not None]
    except OSError as error:
        raise DataplaneError(f"cannot list sockets: {error}") from error
    finally:
        os.close(table)


def _recent(maps_folder: Path) -> dict[int, abi.Decision]:
    """Socket cookie → decision, of those that are open."""
    with libbpf.Map(maps_folder / "recent", 4, ct.sizeof(abi.Recent)) as table:
        places = [abi.Recent.from_buffer_copy(raw) for _key, raw in table.items()]
    return {place.cookie: place.decision for place in places if place.cookie and place.decision.counted}


def _attribute(kind: int, body: bytes) -> bytes:
    return ATTRIBUTE.pack(ATTRIBUTE.size + len(body), kind) + body


def read(answer: bytes, recent: Mapping[int, abi.Decision]) -> Led | None:
    """One socket of the answer; None for one that is not ours, or not established by what connect decided. Pure."""
    family, _state, _timer, _retrans, port, _dport, address, _to, cookie, *_rest = ANSWER.unpack_from(answer)
    attributes = answer[ANSWER.size :]
    decision, origin = recent.get(cookie), _origin(attributes)
    if decision is None and origin is not None and origin.decision.counted:
        decision = origin.decision
    else:
        origin = None
    if decision is None:
        return None
    cgroup = next((int.from_bytes(raw, "little") for raw in _attributes(attributes, CGROUP)), 0)
    text = socket.inet_ntop(family, address[:4] if family == socket.AF_INET else address)
    return Led(
        decision.service_id, abi.Carried(decision.carrier), origin.cgroup if origin else cgroup,
        origin.pid if origin else 0, origin.netns if origin else 0,
        (abi.unpack_address(abi.pack_address(text)), int.from_bytes(port, "big")),
        (abi.unpack_address(decision.asked), decision.asked_port),
        (abi.unpack_address(decision.given), decision.given_port),
    )  # fmt: skip


def _origin(attributes: bytes) -> abi.Origin | None:
    for storage in _attributes(attributes, STORAGES):
        for one in _attributes(storage, STORAGE):
            for value in _attributes(one, VALUE):
                return abi.Origin.from_buffer_copy(value)
    return None


def _attributes(data: bytes, wanted: int) -> Iterator[bytes]:
    at = 0
    while at + ATTRIBUTE.size <= len(data):
        size, kind = ATTRIBUTE.unpack_from(data, at)
        if size < ATTRIBUTE.size:
            return
        if kind & 0x3FFF == wanted:
            yield data[at + ATTRIBUTE.size : at + size]
        at += (size + 3) & ~3
