"""One epoll for the sockets of all connections, which the loop watches as one descriptor.

The rule: a turn takes what is ready a few times over, then lets the loop do the rest. What is written in it is sent,
and what ends in it is told, before anybody waits.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
import socket
from collections.abc import Callable
from typing import Protocol

from userspace_proxy.outgoing import Outgoing
from userspace_proxy.stream import Stream

log = logging.getLogger("proxy")
ROUNDS = 4  # how often a turn asks again before timers and the agent's messages have theirs
BATCH = 256
ACCEPTS = 16  # connections taken before those that are open are served again
EXHAUSTED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
HOLDERS = 16  # connections whose writes are held until those of the first are sent
REST = 0.1  # seconds without accepting when there is no descriptor or memory for another connection


class Watched(Protocol):
    """Whose descriptor is in the epoll."""

    def ready(self, mask: int) -> None: ...

    def abort(self) -> None: ...


class Poller:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._epoll = select.epoll()
        self._watched: dict[int, Watched] = {}
        self._lost: list[tuple[asyncio.Protocol, Exception | None]] = []
        self.turning = False
        self.held: list[Outgoing] = []  # those that hold what was written to them
        loop.add_reader(self._epoll.fileno(), self._turn)

    def _turn(self) -> None:
        self.turning = True
        try:
            for _ in range(ROUNDS):
                events = self._epoll.poll(0, BATCH)
                if not events:
                    break
                for fd, mask in events:
                    one = self._watched.get(fd)
                    if one is None:
                        continue  # closed by an event before it; a descriptor used again is only tried
                    try:
                        one.ready(mask)
                    except Exception as error:  # noqa: BLE001  whatever it is, the others go on
                        self.broken(one, error)
                    if len(self.held) >= HOLDERS:
                        self._send()
                self._settle()
        finally:
            self.turning = False
            if self.held or self._lost:  # the turn was broken off
                self.loop.call_soon(self._settle)

    def _settle(self) -> None:
        """Send what is held and tell what ended, until neither has led to more of it."""
        while self.held or self._lost:
            self._send()
            self._tell()

    def _send(self) -> None:
        held, self.held = self.held, []
        for one in held:
            try:
                one.send()
            except Exception as error:  # noqa: BLE001
                self.broken(one, error)

    def broken(self, one: Watched, error: Exception) -> None:
        """A bug: it costs its connection, and no other."""
        self.loop.call_exception_handler({"message": "a connection failed", "exception": error})
        one.abort()

    def watch(self, fd: int, one: Watched, before: int, wanted: int) -> None:
        """From now on `one` hears of the events `wanted`, where it was `before`; 0 is none."""
        if not wanted:
            self._epoll.unregister(fd)
            del self._watched[fd]
        elif before:
            self._epoll.modify(fd, wanted)
        else:
            self._watched[fd] = one
            self._epoll.register(fd, wanted)

    def forget(self, fd: int) -> None:
        """`fd`, which is watched, is about to be closed, by which epoll forgets it as well."""
        del self._watched[fd]

    def lost(self, protocol: asyncio.Protocol, error: Exception | None) -> None:
        """Tell `protocol` of its end, soon."""
        if not self._lost and not self.turning:
            self.loop.call_soon(self._tell)
        self._lost.append((protocol, error))

    def _tell(self) -> None:
        while self._lost:
            lost, self._lost = self._lost, []
            for protocol, error in lost:
                try:
                    protocol.connection_lost(error)
                except Exception as bug:  # noqa: BLE001
                    self.loop.call_exception_handler({"message": "a connection's end failed", "exception": bug})

    def connected(self, sock: socket.socket, protocol: asyncio.Protocol) -> None:
        """A connected, non-blocking socket; it is ours from now on."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.begin(Stream(self, sock.fileno(), None, sock), protocol)

    def begin(self, stream: Stream, protocol: asyncio.Protocol) -> None:
        try:
            stream.begin(protocol)
        except Exception as error:  # noqa: BLE001  whatever it is, the others go on
            self.broken(stream, error)


class Acceptor:
    """Takes what a listening socket is given; `make` gives the protocol of a new connection. Owns `sock`."""

    def __init__(self, poller: Poller, sock: socket.socket, make: Callable[[], asyncio.Protocol]) -> None:
        self._poller = poller
        self._sock = sock
        self._make = make
        self._open = False
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets inherit it
        self._resume()

    def ready(self, mask: int) -> None:
        del mask
        accept = self._sock._accept  # type: ignore[attr-defined]  # no socket object, whose making asks more
        for _ in range(ACCEPTS):
            try:
                fd, peer = accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in EXHAUSTED:
                    self._rest()
                    return
                continue  # that caller has gone already
            os.set_blocking(fd, False)
            self._poller.begin(Stream(self._poller, fd, peer), self._make())
            if not self._open:
                return

    def _rest(self) -> None:
        log.warning("no descriptor or memory for another connection: callers wait seconds=%s", REST)
        self._watch(0)
        self._poller.loop.call_later(REST, self._resume)

    def _resume(self) -> None:
        if self._sock.fileno() >= 0:
            self._watch(select.EPOLLIN)

    def _watch(self, wanted: int) -> None:
        if self._open != bool(wanted):
            self._poller.watch(self._sock.fileno(), self, 0, wanted)
            self._open = bool(wanted)

    def close(self) -> None:
        self._watch(0)  # epoll would not forget it: the socket has other owners
        self._sock.close()

    def abort(self) -> None:
        """Nothing that is accepted here ends the accepting."""
