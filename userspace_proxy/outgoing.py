"""What is written to a connection, and how it ends: sent in order, and an end behind all that was written before it.

Writing is tried at once; what the kernel does not take is kept, and sent when epoll says so. In a turn of the poller a
small write is held until others have had their events, because waking its reader at once costs more than sending. Held
bytes are unsent bytes to everybody who asks, and what is done with the connection is done behind them.
"""

from __future__ import annotations

import asyncio
import os
import socket
from abc import ABC, abstractmethod
from select import EPOLLIN, EPOLLOUT
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from userspace_proxy.poller import Poller

HIGH = 64 * 1024  # asyncio's default
HELD = 16 * 1024  # bytes of one connection that are held


class Outgoing(asyncio.Transport, ABC):
    __slots__ = (
        "_closing", "_ending", "_fd", "_held", "_high", "_paused", "_peer", "_poller", "_protocol", "_reading", "_sock",
        "_unsent", "_unsent_size", "_watched", "holds",
    )  # fmt: skip

    def __init__(self, poller: Poller, fd: int, peer: Any, sock: socket.socket | None = None) -> None:
        self._poller = poller
        self._fd = fd
        self._peer = peer
        self._sock = sock  # made when somebody asks for it
        self._protocol: asyncio.Protocol = cast(asyncio.Protocol, None)  # until it begins
        self._reading = True
        self._watched = 0  # what epoll watches for; 0: not in it
        self.holds = True  # small writes; False: whoever counts what the kernel has been given wants it given at once
        self._held = False  # the poller will have us send what is unsent; the kernel has not been asked yet
        self._unsent: list[bytes | memoryview] = []
        self._unsent_size = 0
        self._high = HIGH
        self._paused = False  # the protocol was asked to write no more
        self._ending = False  # FIN goes behind what is unsent
        self._closing = False

    @abstractmethod
    def ready(self, mask: int) -> None:
        """epoll: something can be done."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing or self._ending:
            return
        if self._held:
            if self._unsent_size + len(data) <= HELD:
                self._unsent.append(bytes(data))
                self._unsent_size += len(data)
                return
            self.send()
            if self._closing:  # the peer is gone
                return
        if self._unsent:
            self._keep(bytes(data))
            return
        if self.holds and self._poller.turning and len(data) <= HELD:
            self._held = True
            self._unsent.append(bytes(data))
            self._unsent_size = len(data)
            self._poller.held.append(self)
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

    def send(self) -> None:
        """Send what is held; the poller has it done before anybody waits."""
        if not self._held:
            return
        self._held = False
        self._flush()
        if self._unsent:
            self._watch()
            self._pause()

    def _keep(self, data: bytes | memoryview) -> None:
        self._unsent.append(data)
        self._unsent_size += len(data)
        self._pause()

    def _pause(self) -> None:
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
        if not self._unsent:
            self._lose(None)
        elif not self._held:  # else it is sent presently, most likely whole
            self._watch()

    def abort(self) -> None:
        self.send()  # what was written before would be with the kernel by now, had nobody held it
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
