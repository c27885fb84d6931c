"""Bytes to and fro after 101 Switching Protocols: no framing, but back-pressure, half-close, resets and idle time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING

from meshbpf.reason import Reason
from userspace_proxy.wire import reset

if TYPE_CHECKING:
    from userspace_proxy.exchange import Exchange
    from userspace_proxy.head import AnswerHead
    from userspace_proxy.upstream import Upstream


class Side(asyncio.Protocol):
    """What comes from one side goes to the other one's transport."""

    __slots__ = ("_other", "_tunnel", "ended", "moved")

    def __init__(self, tunnel: Tunnel, other: asyncio.Transport) -> None:
        self._tunnel = tunnel
        self._other = other
        self.ended = False
        self.moved = 0

    def data_received(self, data: bytes) -> None:
        self._tunnel.moved_at = self._tunnel.now()
        self.moved += len(data)
        if not self._other.is_closing():
            self._other.write(data)

    def eof_received(self) -> bool:
        self.ended = True
        if not self._other.is_closing():
            self._other.write_eof()
        return not self._tunnel.both_ended()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = True
        self._tunnel.lost(self._other, exc)

    def pause_writing(self) -> None:
        """This side takes no more: the other one is not read."""
        self._other.pause_reading()

    def resume_writing(self) -> None:
        if not self._tunnel.ended_of(self._other):
            self._other.resume_reading()


class Tunnel:
    __slots__ = (
        "_caller", "_down", "_endpoint", "_exchange", "_idle", "_up", "_upstream", "_wheel", "deadline", "due",
        "moved_at", "now",
    )  # fmt: skip

    def __init__(self, exchange: Exchange, upstream: Upstream) -> None:
        down = exchange.down
        self._exchange = exchange
        self._upstream = upstream
        self._down = down.transport
        self._up = upstream.transport
        self._caller = Side(self, self._up)
        self._endpoint = Side(self, self._down)
        route = exchange.route
        self._idle = route.policy.connection_pool.tcp.idle_timeout if route is not None else inf
        self._wheel = down.proxy.wheel
        self.now: Callable[[], float] = down.now
        self.moved_at = self.now()
        self.deadline = self.due = inf

    def begin(self, answer: AnswerHead, data: bytes) -> None:
        """Pass the answer on with what came behind it, then what the caller sent ahead of time."""
        exchange = self._exchange
        down = exchange.down
        exchange.record.response_code = answer.status
        exchange.record.upstream_service_time_ms = (self.now() - exchange.started) * 1e3
        if down.shortcut is not None:
            down.shortcut.leave()
        early = down.become_tunnel(self)
        self._down.set_protocol(self._caller)
        self._up.set_protocol(self._endpoint)
        self._endpoint.moved = len(data)
        self._down.write(answer.out + b"\r\n" + data)
        if early:
            self._caller.moved = len(early)
            self._up.write(early)
        if down.eof:
            self._caller.ended = True
            self._up.write_eof()
        if not down.full:
            self._up.resume_reading()
        if self._idle:
            self._wheel.at(self, self.now() + self._idle)

    def ended_of(self, transport: asyncio.Transport) -> bool:
        """Will nothing more come from this side?"""
        return (self._caller if transport is self._down else self._endpoint).ended

    def both_ended(self) -> bool:
        return self._caller.ended and self._endpoint.ended

    def lost(self, other: asyncio.Transport, exc: Exception | None) -> None:
        if not other.is_closing():
            if exc is None:
                other.close()
            else:
                reset(other)
        self._finish(None)

    def abort(self, reason: Reason) -> None:
        self._finish(reason)
        self._down.abort()
        self._up.abort()

    def expired(self, now: float) -> float:
        until = self.moved_at + self._idle
        if now < until:
            return until
        self._finish(Reason.IDLE_TIMEOUT)
        self._down.close()
        self._up.close()
        return inf

    def _finish(self, reason: Reason | None) -> None:
        exchange = self._exchange
        if exchange.ended:
            return
        self._wheel.drop(self)
        self._upstream.pool.forget(self._upstream)
        exchange.record.bytes_received += self._caller.moved
        exchange.record.bytes_sent += self._endpoint.moved
        exchange.end_tunnel(reason)
