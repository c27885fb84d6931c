"""Bytes to and fro after 101 Switching Protocols: no framing, but back-pressure, half-close, resets and idle time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING

from meshbpf.reason import Reason
from userspace_proxy.life import ENDED
from userspace_proxy.reply import CLOSE
from userspace_proxy.wire import reset, waiting

if TYPE_CHECKING:
    from userspace_proxy.acceleration import Shortcut
    from userspace_proxy.exchange import Exchange
    from userspace_proxy.head import AnswerHead
    from userspace_proxy.upstream import Upstream


class Side(asyncio.Protocol):
    """What comes from one side goes to the other one's transport."""

    __slots__ = ("_other", "_shortcut", "_tunnel", "ended", "gone", "moved")

    def __init__(self, tunnel: Tunnel, other: asyncio.Transport, shortcut: Shortcut | None) -> None:
        self._shortcut = shortcut  # of the other side: what goes by TCP must not come before what was redirected
        self._tunnel = tunnel
        self._other = other
        self.ended = False
        self.gone = False
        self.moved = 0

    def data_received(self, data: bytes) -> None:
        self._tunnel.moved_at = self._tunnel.now()
        self.moved += len(data)
        if not self._other.is_closing():
            if self._shortcut is not None:
                self._shortcut.going_on()
            self._other.write(data)

    def eof_received(self) -> bool:
        self.ended = True
        if not self._other.is_closing():
            if self._shortcut is not None:
                self._shortcut.going_on()
            self._other.write_eof()
        return not self._tunnel.both_ended()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = self.gone = True
        self._tunnel.lost(self._other, exc)

    def pause_writing(self) -> None:
        """This side takes no more: the other one is not read."""
        self._other.pause_reading()

    def resume_writing(self) -> None:
        if not self._tunnel.ended_of(self._other):
            self._other.resume_reading()


class Tunnel:
    __slots__ = (
        "_caller", "_down", "_endpoint", "_exchange", "_idle", "_limits", "_unsent", "_up", "_upstream", "_wheel",
        "deadline", "due", "moved_at", "now",
    )  # fmt: skip

    def __init__(self, exchange: Exchange, upstream: Upstream) -> None:
        down = exchange.down
        self._exchange = exchange
        self._upstream = upstream
        self._down = down.transport
        self._up = upstream.transport
        self._caller = Side(self, self._up, None)
        self._endpoint = Side(self, self._down, down.shortcut)
        route = exchange.route
        self._idle = route.policy.connection_pool.tcp.idle_timeout if route is not None else inf
        self._wheel = down.proxy.wheel
        self._limits = down.limits
        self.now: Callable[[], float] = down.now
        self.moved_at = self.now()
        self._unsent = 0  # when we last looked, of what was left to send behind the end
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
        """Can nothing more come? Then all that is left is to send what is on its way."""
        if not (self._caller.ended and self._endpoint.ended):
            return False
        self._finish(None)
        self._down.close()
        self._up.close()
        return True

    def lost(self, other: asyncio.Transport, exc: Exception | None) -> None:
        down = self._exchange.down
        if self._caller.gone:
            down.proxy.closed(down)
        if not other.is_closing():
            if exc is None:
                other.close()
            else:
                reset(other)
        self._finish(None)
        if self._caller.gone and self._endpoint.gone:
            self._wheel.drop(self)

    def abort(self, reason: Reason) -> None:
        self._finish(reason)
        self._down.abort()
        self._up.abort()

    def expired(self, now: float) -> float:
        if self._exchange.state is ENDED:
            left = waiting(self._down) + waiting(self._up)
            if left and left != self._unsent:  # it is still being taken
                self._unsent = left
                return now + self._limits.flush
            self._down.abort()
            self._up.abort()
            return inf
        until = self.moved_at + self._idle
        if now < until:
            return until
        self._finish(Reason.IDLE_TIMEOUT)
        self._down.close()
        self._up.close()
        return self.deadline

    def _finish(self, reason: Reason | None) -> None:
        exchange = self._exchange
        if exchange.state is ENDED:
            return
        self._wheel.at(self, self.now() + self._limits.linger)
        self._upstream.pool.forget(self._upstream)
        record = exchange.record
        record.bytes_received += self._caller.moved
        record.bytes_sent += self._endpoint.moved
        record.endpoint_outcome = "ok"
        record.response_code_details = "via_upstream"
        if reason is not None:
            record.reason = reason.word
        exchange.finish(self.now(), CLOSE, broken=True)
