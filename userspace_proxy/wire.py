"""Small things that every connection of the data path needs from its socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import termios
from fcntl import ioctl

_RST = struct.pack("ii", 1, 0)


def reset(transport: asyncio.Transport) -> None:
    """Close with RST: the peer must not take what it has for the whole."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        with contextlib.suppress(OSError):  # it has gone by itself
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
    transport.abort()


def spoken(sock: socket.socket) -> bool:
    """Has the peer of a connection at rest said something that is not read yet: an end, a reset, bytes unasked for?"""
    try:
        sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def waiting(transport: asyncio.Transport) -> int:
    """How much is still to be sent; while there is anything, with what the peer has not taken from the kernel."""
    left = transport.get_write_buffer_size()
    if left == 0:
        return 0
    queued = bytearray(4)
    with contextlib.suppress(OSError):  # it has gone by itself
        ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, queued)
    return left + int.from_bytes(queued, "little")
