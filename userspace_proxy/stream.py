"""A connection's bytes, read and written at once: an asyncio transport on our own epoll, cheaper than the loop's.

The rules: reading is tried before anybody waits; the kernel is asked to watch only what is awaited; the protocol is
told of an end behind the call that caused it, never within. Half of what a short connection cost a worker was the
loop's accept, its three system calls per socket, and its way of closing. Writing and ending are in `outgoing`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from select import EPOLLIN, EPOLLOUT
from typing import Any, cast

from userspace_proxy.outgoing import Outgoing

SMALL, LARGE = 64 * 1024, 256 * 1024  # bytes of one read: the larger one behind a read that was full


class Stream(Outgoing):
    """`fd` is connected, non-blocking, and ours to close; `begin` starts it."""

    __slots__ = ("_received", "_size")

    def begin(self, protocol: asyncio.Protocol) -> None:
        """Tell `protocol` that it is connected, and read what is there already."""
        self._size = SMALL
        self.set_protocol(protocol)
        protocol.connection_made(self)
        if self._reading:
            self._read()
        if not self._watched and self._fd >= 0:
            self._watch()

    def ready(self, mask: int) -> None:
        """epoll: something can be done; errors are met in doing it."""
        if self._unsent and mask & ~EPOLLIN:
            self._flush()
        if mask & ~EPOLLOUT and self._reading:
            self._read()

    # reading

    def _read(self) -> None:
        size = self._size
        try:
            data = os.read(self._fd, size)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(error)
            return
        if data:
            self._size = LARGE if len(data) == size else SMALL
            self._received(data)
            return
        self._reading = False
        if self._protocol.eof_received():
            self._watch()
        else:
            self.close()

    def pause_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._watch()

    def resume_reading(self) -> None:
        if not self._reading and not self._closing:
            self._reading = True
            self._watch()

    def is_reading(self) -> bool:
        return self._reading

    # what there is to know and to hand over

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "peername":
            return self._peer
        if self._fd < 0:
            return default
        if name == "socket":
            return self._socket()
        if name == "sockname":
            return self._socket().getsockname()
        return default

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = cast(asyncio.Protocol, protocol)
        self._received: Callable[[bytes], None] = self._protocol.data_received

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol
