"""Small things that every connection of the data path needs from its socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

_RST = struct.pack("ii", 1, 0)
_TCP_INFO_BYTES = 256
# struct tcp_info (linux/tcp.h, append only): bytes_acked at 120, bytes_sent at 200, bytes_retrans at 208
_ACKED, _SENT, _RETRANS = 120, 200, 208


def reset(transport: asyncio.Transport) -> None:
    """Close with RST: the peer must not take what it has for the whole."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        with contextlib.suppress(OSError):  # it has gone by itself
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
    transport.abort()


def unacknowledged(sock: socket.socket) -> int:
    """How many of the bytes sent the peer's kernel never confirmed; 0 when this kernel does not say."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    except OSError:
        return 0
    if len(info) < _RETRANS + 8:
        return 0
    acked, sent, retrans = (int.from_bytes(info[at : at + 8], "little") for at in (_ACKED, _SENT, _RETRANS))
    return max(0, sent - retrans - acked)
