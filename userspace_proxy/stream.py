"""A connection's bytes, read and written at once: an asyncio transport on our own epoll, cheaper than the loop's.

The rules: reading and writing are tried before anybody waits; the kernel is asked to watch only what is awaited; the
protocol is told of an end behind the call that caused it, never within. Half of what a short connection cost a worker
was the loop's accept, its three system calls per socket, and its way of closing.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from select import EPOLLIN, EPOLLOUT
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from userspace_proxy.poller import Poller

SMALL, LARGE = 64 * 1024, 256 * 1024  # bytes of one read: the larger one behind a read that was full
HIGH = 64 * 1024  # asyncio's default


class Stream(asyncio.Transport):
    """`fd` is connected, non-blocking, and ours to close; `begin` starts it."""

    __slots__ = (
        "_closing", "_ending", "_fd", "_high", "_paused", "_peer", "_poller", "_protocol", "_reading", "_received",
        "_size", "_sock", "_unsent", "_unsent_size", "_watched",
    )  # fmt: skip

    def __init__(self, poller: Poller, fd: int, peer: Any, sock: socket.socket | None = None) -> None:
        self._poller = poller
        self._fd = fd
        self._peer = peer
        self._sock = sock  # made when somebody asks for it
        self._protocol: asyncio.Protocol = cast(asyncio.Protocol, None)  # until `begin`
        self._received: Callable[[bytes], None] = cast(Callable[[bytes], None], None)
        self._reading = True
        self._watched = 0  # what epoll watches for; 0: not in it
        self._size = SMALL
        self._unsent: list[bytes | memoryview] = []
        self._unsent_size = 0
        self._high = HIGH
        self._paused = False  # the protocol was asked to write no more
        self._ending = False  # FIN goes behind what is unsent
        self._closing = False

    def begin(self, protocol: asyncio.Protocol) -> None:
        """Tell `protocol` that it is connected, and read what is there already."""
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

    # writing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing or self._ending:
            return
        if self._unsent:
            self._keep(bytes(data))
            return
        try:
            sent = os.write(self._fd, data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._lose(error)
            return
        if sent < len(data):
            self._keep(memoryview(data)[sent:])
            self._watch()

    def _keep(self, data: bytes | memoryview) -> None:
        self._unsent.append(data)
        self._unsent_size += len(data)
        if self._unsent_size > self._high and not self._paused:
            self._paused = True
            self._protocol.pause_writing()

    def _flush(self) -> None:
        unsent = self._unsent
        while unsent:
            try:
                sent = os.writev(self._fd, unsent[:16])
            except BlockingIOError:
                return
            except OSError as error:
                self._lose(error)
                return
            self._unsent_size -= sent
            while unsent and sent >= len(unsent[0]):
                sent -= len(unsent.pop(0))
            if sent:
                unsent[0] = memoryview(unsent[0])[sent:]
                break
        if not unsent:
            if self._closing:
                self._lose(None)
                return
            if self._ending:
                self._shut()
            self._watch()
        if self._paused and self._unsent_size <= self._high // 4:
            self._paused = False
            self._protocol.resume_writing()

    def write_eof(self) -> None:
        if not self._ending and not self._closing:
            self._ending = True
            if not self._unsent:
                self._shut()

    def _shut(self) -> None:
        try:
            self._socket().shutdown(socket.SHUT_WR)
        except OSError as error:
            self._lose(error)

    def can_write_eof(self) -> bool:
        return True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """`low` is always a quarter of `high`."""
        del low
        self._high = HIGH if high is None else high

    def get_write_buffer_size(self) -> int:
        return self._unsent_size

    # the end

    def close(self) -> None:
        """Send what is unsent, then end."""
        if self._closing:
            return
        self._closing = True
        self._reading = False
        if self._unsent:
            self._watch()
        else:
            self._lose(None)

    def abort(self) -> None:
        self._lose(None)

    def is_closing(self) -> bool:
        return self._closing

    def _lose(self, error: Exception | None) -> None:
        fd = self._fd
        if fd < 0:
            return
        self._closing = True
        self._reading = False
        self._unsent.clear()
        self._unsent_size = 0
        if self._watched:
            self._watched = 0
            self._poller.forget(fd)
        self._fd = -1
        if self._sock is None:
            os.close(fd)
        else:
            self._sock.close()
        self._poller.lost(self._protocol, error)

    # what there is to know and to hand over

    def _watch(self) -> None:
        """Let epoll watch for what is awaited now. Without anything awaited even an end does not wake us."""
        wanted = (EPOLLIN if self._reading else 0) | (EPOLLOUT if self._unsent else 0)
        if wanted != self._watched and self._fd >= 0:
            self._poller.watch(self._fd, self, self._watched, wanted)
            self._watched = wanted

    def _socket(self) -> socket.socket:
        if self._sock is None:
            self._sock = socket.socket(fileno=self._fd)
        return self._sock

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
        self._received = self._protocol.data_received

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol
