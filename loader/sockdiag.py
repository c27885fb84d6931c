"""The kernel's list of connected UDP sockets of a network namespace, and how one of them is ended (`ss -K`).

Netlink, sock_diag: the socket opened here belongs to the namespace in which the calling thread is at that moment, and
sees and ends sockets of that one only. A socket is ended by its addresses and its cookie together, which the kernel
compares in one step: whoever connected elsewhere meanwhile is not found. Layouts: linux/inet_diag.h, linux/netlink.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from meshbpf.errors import DataplaneError

NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, SOCK_DESTROY = 4, 20, 21
REQUEST, ACK, DUMP = 1, 4, 0x300
ERROR, DONE = 2, 3
CONNECTED = 1 << 1  # TCP_ESTABLISHED is what a connected UDP socket is in, too
HEADER = struct.Struct("=IHHII")
REQUEST_V2 = struct.Struct("=BBBxI")  # family, protocol, extensions; states; then the socket's id
FAMILY = struct.Struct("=B3x")  # of an answer; the socket's id follows
ID = struct.Struct("=2s2s16s16sIQ")  # source port, destination port, source, destination, device, cookie
MAPPED = b"\0" * 10 + b"\xff\xff"
BUFFER = 1 << 16


@dataclass(frozen=True, slots=True)
class Found:
    """A connected UDP socket. `peer` is 16 bytes as in the tables, `port` too; `id` is the kernel's own."""

    family: int
    cookie: int
    peer: bytes
    port: bytes
    id: bytes


class SockDiag:
    """Use as a context manager, in the namespace that is meant. Raises DataplaneError: the kernel refused."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG)
        self._socket.settimeout(5)

    def connected(self) -> list[Found]:
        found = []
        for family in (socket.AF_INET, socket.AF_INET6):
            self._send(SOCK_DIAG_BY_FAMILY, DUMP, REQUEST_V2.pack(family, socket.IPPROTO_UDP, 0, CONNECTED), bytes(48))
            for message in self._answers():
                raw = message[FAMILY.size : FAMILY.size + ID.size]
                _source_port, port, _source, peer, _device, cookie = ID.unpack(raw)
                if family == socket.AF_INET:
                    peer = MAPPED + peer[:4]
                found.append(Found(family, cookie, peer, port, raw))
        return found

    def end(self, found: Found) -> bool:
        """Its next call fails with ECONNABORTED. False: it is not as it was found, and is left alone."""
        request = REQUEST_V2.pack(found.family, socket.IPPROTO_UDP, 0, CONNECTED)
        self._send(SOCK_DESTROY, ACK, request, found.id)
        try:
            list(self._answers())
        except FileNotFoundError:
            return False
        return True

    def _send(self, kind: int, flags: int, *parts: bytes) -> None:
        body = b"".join(parts)
        self._socket.send(HEADER.pack(HEADER.size + len(body), kind, REQUEST | flags, 1, 0) + body)

    def _answers(self) -> Iterator[bytes]:
        """The bodies up to the end of the answer. Raises FileNotFoundError (there is no such socket)."""
        while True:
            data = self._socket.recv(BUFFER)
            at = 0
            while at + HEADER.size <= len(data):
                length, kind, *_ = HEADER.unpack_from(data, at)
                body = data[at + HEADER.size : at + length]
                if kind == DONE:
                    return
                if kind == ERROR:
                    number = -struct.unpack_from("=i", body)[0]
                    if number == 0:
                        return
                    if number == errno.ENOENT:
                        raise FileNotFoundError(number, "no such socket")
                    raise DataplaneError(f"sock_diag of UDP: {os.strerror(number)}")
                yield body
                at += -(-length // 4) * 4

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> SockDiag:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
