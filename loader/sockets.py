"""Open TCP connections that connect led, with what it decided of each: from the storage of the sockets themselves.

The kernel hands a socket's storage out with the socket when inet_diag is asked for it (what `ss` uses; since Linux
5.7), so nothing is kept, counted or followed for it while connections come and go: whoever asks pays, for every TCP
socket of the namespace. Works in the calling thread's network namespace.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loader import abi, libbpf
from loader.sockdiag import SockDiag
from meshbpf.errors import DataplaneError

ATTRIBUTE = struct.Struct("=HH")  # nlattr; its type's upper bits are flags
ANSWER = struct.Struct("=BBBB2s2s16s16s12x4xIIII")  # inet_diag_msg: …, ports and addresses, …, expires … uid, inode
WANT_STORAGES, WANT_MAP = 2, 1  # INET_DIAG_REQ_SK_BPF_STORAGES, SK_DIAG_BPF_STORAGE_REQ_MAP_FD
STORAGES, STORAGE, VALUE = 20, 1, 3  # INET_DIAG_SK_BPF_STORAGES, SK_DIAG_BPF_STORAGE, …_MAP_VALUE
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
            return [found for found in map(read, answers) if found is not None]
    except OSError as error:
        raise DataplaneError(f"cannot list sockets: {error}") from error
    finally:
        os.close(table)


def _attribute(kind: int, body: bytes) -> bytes:
    return ATTRIBUTE.pack(ATTRIBUTE.size + len(body), kind) + body


def read(answer: bytes) -> Led | None:
    """One socket of the answer; None for one that is not ours, or not established by what connect decided. Pure."""
    family, _state, _timer, _retrans, port, _dport, address, *_rest = ANSWER.unpack_from(answer)
    for storage in _attributes(answer[ANSWER.size :], STORAGES):
        for one in _attributes(storage, STORAGE):
            for value in _attributes(one, VALUE):
                origin = abi.Origin.from_buffer_copy(value)
                if not origin.counted:
                    continue
                text = socket.inet_ntop(family, address[:4] if family == socket.AF_INET else address)
                return Led(
                    origin.service_id, abi.Carried(origin.carrier), origin.cgroup, origin.pid, origin.netns,
                    (abi.unpack_address(abi.pack_address(text)), int.from_bytes(port, "big")),
                    (abi.unpack_address(origin.asked), origin.asked_port),
                    (abi.unpack_address(origin.given), origin.given_port),
                )  # fmt: skip
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
