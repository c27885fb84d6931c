"""When a connection joins the redirect table and leaves it. How that is done, the loader knows."""

from __future__ import annotations

import asyncio
from typing import Protocol


class Membership(Protocol):
    """A connection that is in the redirect table."""

    def leave(self) -> None:
        """From now on towards the application by TCP. Called before answers whose length is unknown or large."""
        ...


class Accelerator(Protocol):
    def join(
        self, netns: int, client_addr: str, client_port: int, local_addr: str, local_port: int
    ) -> Membership | None:
        """Try to enter the connection, which is idle: all answers written, nothing buffered. None: not now."""
        ...


class Shortcut:
    """One connection's way into the redirect table and out of it."""

    __slots__ = ("_accelerator", "_after", "_join_at", "_membership", "_served")

    def __init__(self, accelerator: Accelerator, after: int) -> None:
        self._accelerator = accelerator
        self._after = after
        self._join_at = after  # requests served before it is worth trying
        self._served = 0
        self._membership: Membership | None = None

    def rest(self, netns: int, transport: asyncio.Transport) -> None:
        """An answer has been written and the connection is idle: join, when it has proven worth it."""
        self._served += 1
        if self._membership is not None or self._served < self._join_at or transport.get_write_buffer_size():
            return
        peer, local = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
        self._membership = self._accelerator.join(netns, peer[0], peer[1], local[0], local[1])
        # Refused: the reason may pass, so ask again, but ever more rarely.
        self._join_at = self._served * 2

    def leave(self) -> None:
        """An answer follows that must not go through the table."""
        if self._membership is not None:
            membership, self._membership = self._membership, None
            self._join_at = self._served + self._after
            membership.leave()
