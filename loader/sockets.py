"""Open TCP connections that connect led, with what it decided of each: from `recent` and from the sockets' storage.

The kernel hands a socket's storage out with the socket when inet_diag is asked for it (what `ss` uses; since Linux
5.7), so nothing is kept, counted or followed for it while connections come and go: whoever asks pays, for every TCP
socket of the namespace. Works in the calling thread's network namespace. A place of `recent` says nothing of who
connected: inet_diag tells the cgroup, and nobody the process (0).
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from loader import abi, libbpf
from loader.sockdiag import SockDiag
from loader.tables import netns_cookie
from meshbpf.errors import DataplaneError

ATTRIBUTE = struct.Struct("=HH")  # nlattr; its type's upper bits are flags
ANSWER = struct.Struct("=BBBB2s2s16s16s4xQ4xIIII")  # inet_diag_msg: …, ports, addresses, …, cookie, expires … inode
WANT_STORAGES, WANT_MAP = 2, 1  # INET_DIAG_REQ_SK_BPF_STORAGES, SK_DIAG_BPF_STORAGE_REQ_MAP_FD
STORAGES, CGROUP_ID, STORAGE, VALUE = (
    20,
    21,
    1,
    3,
)  # INET_DIAG_CGROUP_ID; INET_DIAG_SK_BPF_STORAGES, SK_DIAG_BPF_STORAGE, …_MAP_VALUE
ALL_BUT_LISTEN = 0xFFF & ~(1 << 10)


@dataclass(frozen=True, slots=True)
class Led:
    """`client` is the caller's own end, `asked` what it dialled, `given` where it was led."""

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
    families = (socket.AF_INET, socket.AF_INET6)
    try:
        with SockDiag() as diag:
            answers = (a for family in families for a in diag.every(family, socket.IPPROTO_TCP, ALL_BUT_LISTEN, want))
            recent = _recent(maps_folder)
            with socket.socket() as sock:
                netns = netns_cookie(sock)
            every = (read(answer, recent, netns) for answer in answers)
            return [found for found in every if found is not None]
    except OSError as error:
        raise DataplaneError(f"cannot list sockets: {error}") from error
    finally:
        os.close(table)


def _recent(maps_folder: Path) -> dict[int, abi.Decision]:
    with libbpf.Map(maps_folder / "recent", 4, ctypes.sizeof(abi.Recent)) as table:
        places = (abi.Recent.from_buffer_copy(value) for _index, value in table.items())
        return {place.cookie: place.decision for place in places if place.cookie}


def _attribute(kind: int, body: bytes) -> bytes:
    return ATTRIBUTE.pack(ATTRIBUTE.size + len(body), kind) + body


def read(answer: bytes, recent: Mapping[int, abi.Decision], netns: int) -> Led | None:
    """One socket of the answer; None for one that is not ours, or not established by what connect decided. Pure.

    `recent` is the table by cookie, `netns` the cookie of the namespace that answers.
    """
    family, _state, _timer, _retrans, port, _dport, address, _peer, cookie, *_rest = ANSWER.unpack_from(answer)
    client = socket.inet_ntop(family, address[:4] if family == socket.AF_INET else address), int.from_bytes(port, "big")
    if cookie in recent:
        (cgroup,) = (*_attributes(answer[ANSWER.size :], CGROUP_ID), bytes(8))[:1]
        return _led(recent[cookie], int.from_bytes(cgroup, sys.byteorder), 0, netns, client)
    for storage in _attributes(answer[ANSWER.size :], STORAGES):
        for one in _attributes(storage, STORAGE):
            for value in _attributes(one, VALUE):
                origin = abi.Origin.from_buffer_copy(value)
                return _led(origin.decision, origin.cgroup, origin.pid, origin.netns, client)
    return None


def _led(decision: abi.Decision, cgroup: int, pid: int, netns: int, client: tuple[str, int]) -> Led | None:
    if not decision.counted:
        return None
    return Led(
        decision.service_id, abi.Carried(decision.carrier), cgroup, pid, netns,
        (abi.unpack_address(abi.pack_address(client[0])), client[1]),
        (abi.unpack_address(decision.asked), decision.asked_port),
        (abi.unpack_address(decision.given), decision.given_port),
    )  # fmt: skip


def _attributes(data: bytes, wanted: int) -> Iterator[bytes]:
    at = 0
    while at + ATTRIBUTE.size <= len(data):
        size, kind = ATTRIBUTE.unpack_from(data, at)
        if size < ATTRIBUTE.size:
            return
        if kind & 0x3FFF == wanted:
            yield data[at + ATTRIBUTE.size : at + size]
        at += (size + 3) & ~3
