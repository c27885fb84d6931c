"""Every TCP packet that crosses the loopback of a namespace, as a person would compare two of them."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

ETH_P_ALL, OUTGOING = 3, 4
TIMESTAMP, END, PADDING = 8, 0, 1
FLAGS = "FSRPAUEC"


@dataclass(frozen=True)
class Packet:
    """Without what differs from run to run: ports, sequence numbers, timestamps' values, checksums, identification."""

    sender: str
    receiver: str
    flags: str
    payload: bytes
    options: tuple[tuple[int, bytes], ...]
    window: int
    ttl: int
    tos: int
    fragment: int


def _options(raw: bytes) -> Iterator[tuple[int, bytes]]:
    while raw and raw[0] != END:
        if raw[0] == PADDING:
            yield PADDING, b""
            raw = raw[1:]
        else:
            kind, size = raw[0], raw[1]
            yield kind, b"" if kind == TIMESTAMP else raw[2:size]
            raw = raw[size:]


def parse(frame: bytes) -> Packet | None:
    """An Ethernet frame; None when it holds no TCP over IPv4."""
    if frame[12:14] != b"\x08\x00" or frame[23] != socket.IPPROTO_TCP:
        return None
    ip = frame[14:]
    tcp = ip[(ip[0] & 15) * 4 : int.from_bytes(ip[2:4], "big")]
    offset = (tcp[12] >> 4) * 4
    return Packet(
        socket.inet_ntoa(ip[12:16]),
        socket.inet_ntoa(ip[16:20]),
        "".join(letter for bit, letter in enumerate(FLAGS) if tcp[13] >> bit & 1),
        tcp[offset:],
        tuple(_options(tcp[20:offset])),
        struct.unpack_from(">H", tcp, 14)[0],
        ip[8],
        ip[1],
        struct.unpack_from(">H", ip, 6)[0],
    )


@contextlib.contextmanager
def captured() -> Iterator[list[Packet]]:
    """Filled at the end of the block with what crossed the loopback of the calling thread's namespace within."""
    found: list[Packet] = []
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as tap:
        tap.bind(("lo", ETH_P_ALL))
        tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        tap.setblocking(False)
        yield found
        with contextlib.suppress(BlockingIOError):
            while True:
                frame, (_name, _protocol, kind, *_rest) = tap.recvfrom(1 << 17)
                packet = parse(frame) if kind == OUTGOING else None  # each is seen leaving and coming in
                if packet is not None:
                    found.append(packet)
