"""The connection of a calling application: who calls whom, when it is read, and how it ends. Knows no requests.

No end costs the caller an answer that was written: what is unsent is sent first, and while the caller may still be
sending, it is read and thrown away for a while, because closing over unread bytes would reset what it has not read.
"""

from __future__ import annotations

import asyncio
from math import inf
from typing import TYPE_CHECKING, cast

from meshbpf.reason import Reason
from userspace_proxy.acceleration import Shortcut, shortcut_of
from userspace_proxy.grammar import TOO_SLOW, Fault
from userspace_proxy.reply import CLOSE, LINE_TOO_LONG, REPLIES
from userspace_proxy.request import request_record
from userspace_proxy.wire import reset, waiting

if TYPE_CHECKING:
    from userspace_proxy.exchange import Exchange
    from userspace_proxy.origin import Origin
    from userspace_proxy.route import Route
    from userspace_proxy.server import Proxy
    from userspace_proxy.stream import Stream
    from userspace_proxy.tunnel import Tunnel

# Why a caller is not read, as bits: enough of what it sent waits, the endpoint does not take what it sends, or its
# request has no connection yet and enough of it waits.
PARKED, UPSTREAM_FULL, UNATTACHED = 1, 2, 4


class Connection(asyncio.Protocol):
    __slots__ = (
        "_busy", "_deaf", "_ends", "_headed", "_parked", "_patience", "_scanned", "_served", "_tunnel", "_unsent",
        "deadline", "due", "ending", "eof", "exchange", "full", "held", "limits", "lost", "netns", "now", "origin",
        "proxy", "remote", "route", "shortcut", "transport", "version_10",
    )  # fmt: skip

    def __init__(self, proxy: Proxy, netns: int) -> None:
        self.proxy = proxy
        self.netns = netns
        self.limits = proxy.limits
        self.now = proxy.clock
        self.transport: Stream = cast("Stream", None)  # until connection_made
        self.origin: Origin = cast("Origin", None)
        self.route: Route | None = None
        self.exchange: Exchange | None = None
        self.shortcut: Shortcut | None = None
        self.deadline = self.due = self._ends = inf  # _ends: when we close it unless there is a request
        self._patience = proxy.limits.drain_quiet if proxy.draining else proxy.limits.keep_alive
        self._unsent = 0  # when we last looked, of what was left to send on a connection that we have closed
        self.held = 0  # why the caller is not read, as bits
        self.full = False  # the caller does not take what we write
        self.eof = False  # the caller will send no more
        self.lost = False
        self._deaf = False  # the last answer has been given: what still comes is thrown away
        self.remote = ""
        self._tunnel: Tunnel | None = None
        # of requests, for `downstream`: another constructor for it would be paid by every connection
        self.version_10 = False
        self.ending = CLOSE
        self._parked = b""  # bytes of requests that are not served yet
        self._scanned = 0  # of which no line ends badly, and no head ends, before here
        self._headed = False  # part of a head is here
        self._busy = False  # `_advance` is at work
        self._served = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("Stream", transport)
        self.transport.set_write_buffer_limits(high=self.limits.write_high)
        peer = transport.get_extra_info("peername")
        proxy = self.proxy
        origin = proxy.lookup(self.netns, peer[0], peer[1]) if peer else None
        if origin is None:
            proxy.direct_hit()
            self.lost = True
            self.transport.abort()
            return
        self.origin = origin
        self.remote = f"[{peer[0]}]:{peer[1]}" if ":" in peer[0] else f"{peer[0]}:{peer[1]}"
        self.route = proxy.table.by_address.get((origin.address, origin.port))
        proxy.opened(self)
        if self.route is not None and not self.route.http:
            self._relay()
            return
        self.shortcut = shortcut_of(proxy.accelerator, self.route, self.limits.join_after)
        self._ends = self.now() + self._patience
        proxy.wheel.at(self, self._ends)

    def _search(self, data: bytes) -> bool:
        """Look up again what was dialled, which had left the mesh or not come; is it relayed from now on?"""
        route = self.route = self.proxy.table.by_address.get((self.origin.address, self.origin.port))
        if route is not None and not route.http and self._served == 0:
            self._relay(data)
            return True
        self.shortcut = self.shortcut or shortcut_of(self.proxy.accelerator, route, self.limits.join_after)
        return False

    def hold(self, why: int) -> None:
        if not self.held:
            self.transport.pause_reading()
        self.held |= why

    def free(self, why: int) -> None:
        self.held &= ~why
        if not self.held and not self.eof and not self.lost:
            self.transport.resume_reading()
            if self.exchange is not None:
                self.exchange.body_due()

    # ends

    def connection_lost(self, exc: Exception | None) -> None:
        if self.origin is None:
            return
        self.lost = True
        self.proxy.closed(self)
        self.proxy.wheel.drop(self)
        if self.exchange is not None:
            self.exchange.fail(Reason.DOWNSTREAM_CLOSED, hard=exc is not None)

    def _refuse(self, fault: Fault, method: str | None = None, path: str | None = None) -> None:
        """Answer a head that cannot be served, and end the connection: what follows it cannot be trusted."""
        reply = LINE_TOO_LONG if fault.status == 414 else REPLIES[fault.reason]
        head_only = method == "HEAD"
        record = request_record(self, self.route, method, path)
        reply.tell(record, head_only)
        out = reply.bytes(CLOSE, head_only)
        if self.shortcut is not None:
            self.shortcut.answering(len(out))
        self.transport.write(out)
        self.proxy.sink(record)
        self._linger()

    def _close(self) -> None:
        """Close behind what is still to be sent; whether the caller takes it is looked at in `expired`."""
        self._deaf = True
        self._parked = b""
        self.transport.close()
        self.proxy.wheel.at(self, self.now() + self.limits.linger)

    def _linger(self) -> None:
        """Say that no more is read, and wait a little: closing at once could cost the caller the answer."""
        self._deaf = True
        self._parked = b""
        self.held = 0
        if self.shortcut is not None:
            self.shortcut.leave()
        if self.eof:
            self._close()
            return
        self.transport.write_eof()
        self.transport.resume_reading()
        self.proxy.wheel.at(self, self.now() + self.limits.linger)

    @property
    def last(self) -> bool:
        """Will no other request come behind the one being answered?"""
        return self.proxy.draining or (self.eof and not self._parked)

    def expired(self, now: float) -> float:
        """The wheel: `deadline` has passed, of whatever the connection is waiting for."""
        if self.exchange is not None:
            return self.exchange.expired(now)
        if self._deaf:
            left = waiting(self.transport)
            if left and left != self._unsent:  # it is still being taken
                self._unsent = left
                return now + self.limits.flush
            self.transport.abort()
            return inf
        if self._headed:
            self._refuse(TOO_SLOW)
            return self.deadline
        if self.shortcut is not None:
            self.shortcut.leave()  # idle: whoever takes the socket over finds it as it was
        if now < self._ends:  # not all is read, perhaps: ask again
            return min(self._ends, now + self.limits.leave_idle)
        self._close()
        return self.deadline

    def drain(self) -> None:
        """Shutdown begins: the next answer is the last one. Who is silent is closed a little later: at once would be
        into the face of a caller whose next request, or first one, is on its way."""
        self._patience = self.limits.drain_quiet
        if self.exchange is None and not self._headed and not self._deaf and self._tunnel is None:
            self._ends = min(self._ends, self.now() + self._patience)
            self.proxy.wheel.at(self, self._ends)

    def abort(self) -> bool:
        """Shutdown is over. Whether that cut anything: a request, a tunnel, or the rest of an answer."""
        cut = True
        if self._tunnel is not None:
            self._tunnel.abort(Reason.DRAINING)
        elif self.exchange is not None:
            self.exchange.fail(Reason.DRAINING)
        elif cut := self._headed or waiting(self.transport) > 0:
            self.proxy.cut(self)  # a request without a record, or an answer that had its own already
            reset(self.transport)
        self.transport.abort()
        return cut

    # other carriers of the bytes

    def become_tunnel(self, tunnel: Tunnel) -> bytes:
        """From now on the tunnel has the transport; returns what the caller sent ahead of time."""
        self._tunnel = tunnel
        self.proxy.wheel.drop(self)
        early, self._parked = self._parked, b""
        if self.held and not self.eof:
            self.transport.resume_reading()
        self.held = 0
        return early

    def _relay(self, data: bytes = b"") -> None:
        """Not HTTP/1: the TCP relay takes the transport, with the bytes that were read already."""
        route = self.route
        if self.lost or route is None:
            return
        self.lost = True
        self.proxy.wheel.drop(self)
        self.proxy.relay(self, route, self._parked + data)
