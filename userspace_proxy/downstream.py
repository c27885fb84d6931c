"""One connection of a calling application: reads requests, one exchange at a time and in order, and ends properly.

What an exchange does is not known here; what is here is heads, pipelining, when to read, and how a connection ends.
"""

from __future__ import annotations

import asyncio
from math import inf
from typing import TYPE_CHECKING, cast

from meshbpf.reason import Reason
from userspace_proxy.acceleration import Shortcut, shortcut_of
from userspace_proxy.exchange import Exchange
from userspace_proxy.grammar import END, LINE, METHODS, PREFACE, TOO_SLOW, VERSIONS, Fault, partial_fault, whole_fault
from userspace_proxy.reply import CLOSE, LINE_TOO_LONG, REPLIES
from userspace_proxy.request import read_request, request_record
from userspace_proxy.wire import reset, waiting

if TYPE_CHECKING:
    from userspace_proxy.origin import Origin
    from userspace_proxy.route import Route
    from userspace_proxy.server import Proxy
    from userspace_proxy.tunnel import Tunnel

PARKED = 1  # why the caller is not read: enough of what it sent waits (others: UPSTREAM_FULL, UNATTACHED)


class Downstream(asyncio.Protocol):
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
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)  # until connection_made
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
        self.version_10 = False
        self.ending = CLOSE
        self._parked = b""  # bytes of requests that are not served yet
        self._scanned = 0  # of which no line ends badly, and no head ends, before here
        self._headed = False  # part of a head is here
        self._busy = False  # `_advance` is at work
        self._deaf = False  # the last answer has been given: what still comes is thrown away
        self._served = 0
        self.remote = ""
        self._tunnel: Tunnel | None = None

    # the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
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

    def connection_lost(self, exc: Exception | None) -> None:
        if self.origin is None:
            return
        self.lost = True
        self.proxy.closed(self)
        self.proxy.wheel.drop(self)
        if self.exchange is not None:
            self.exchange.fail(Reason.DOWNSTREAM_CLOSED, hard=exc is not None)

    def eof_received(self) -> bool:
        """A caller may close its side and still wait for the answer: with plain TCP it would get it."""
        self.eof = True
        if self._deaf:
            return False
        if self._headed or not self._parked:
            self._ended()
        return True  # what is parked is served when the caller takes its answers

    def _ended(self) -> None:
        """The caller sends no more, and all it sent is read."""
        exchange = self.exchange
        if exchange is None:
            self._close()
        elif exchange.whole_request:
            exchange.half_close()
        else:
            self.lost = True
            exchange.fail(Reason.DOWNSTREAM_CLOSED)
            self._close()

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

    def pause_writing(self) -> None:
        self.full = True
        if self.exchange is not None and self.exchange.upstream is not None:
            self.exchange.upstream.transport.pause_reading()

    def resume_writing(self) -> None:
        self.full = False
        if self.exchange is None:
            if self._parked and not self._deaf:
                self._advance(b"")
        elif self.exchange.upstream is not None:
            self.exchange.upstream.transport.resume_reading()

    # requests

    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            if not self._deaf:
                if self.full:
                    self._park(data)
                    return
                if not self._parked and data[0] != 13 and (end := data.find(END)) > 0:
                    data = self._open(data, end)  # the frequent case: one whole head
                    if data and self.exchange is not None:
                        self._park(data)
                        return
                if data:
                    self._advance(data)
        elif exchange.whole_request:
            self._park(data)
        else:
            rest = exchange.feed(data)
            if rest:
                self._park(rest)
            elif exchange.whole_request and not exchange.begun:
                self._asked(exchange)

    def _park(self, data: bytes) -> None:
        self._parked = self._parked + data if self._parked else data
        if len(self._parked) > self.limits.parked:
            self.hold(PARKED)

    def _advance(self, data: bytes) -> None:
        """Serve the requests in what is parked and `data`, until one is on its way or the bytes are used up."""
        if self._parked:
            data = self._parked + data
            self._parked = b""
        if self.held:
            self.free(PARKED)
        self._busy = True
        while data and not self._deaf and not self.lost:  # behind the last answer nothing is served
            if self.full:
                self._park(data)
                break
            if data.startswith(b"\r\n"):  # RFC 9112 2.2: an empty line before a request is ignored
                data = data[2:]
                continue
            end = data.find(END, max(0, self._scanned - 3))
            if end < 0:
                self._await_head(data)
                break
            self._scanned = 0
            data = self._open(data, end)
            if self.exchange is not None:
                if data:
                    self._park(data)
                break
        self._busy = False
        if self.eof and (not self._parked or self._headed) and not self._deaf and not self.lost:
            self._ended()

    def _await_head(self, data: bytes) -> None:
        """Keep part of a head, unless it is already clear that it can be no good."""
        limits = self.limits
        if self.route is None and self._search(data):
            return
        self._parked = data
        if not self._headed:
            self._headed = True
            self.proxy.wheel.at(self, self.now() + limits.head_timeout)
        fault = partial_fault(data, self._scanned, limits)
        if fault is not None:
            self._refuse(fault)
        self._scanned = len(data)

    def _open(self, data: bytes, end: int) -> bytes:
        """Begin the exchange whose head ends at `end`; returns the bytes behind its request."""
        limits = self.limits
        self._headed = False
        route = self.route
        if route is None or route.retired:
            if self._search(data):
                return b""
            route = self.route
        line = LINE.match(data)
        if line is None or end > limits.head or line.end() > limits.request_line + 2:
            if data.startswith(PREFACE) and self._served == 0 and route is not None:
                self._relay(data)
            else:
                self._refuse(whole_fault(data, end, limits))
            return b""
        at = line.end()
        method, target, version = line.groups()
        lines = data[at : end + 2]
        name = METHODS.get(method) or method.decode()
        path = target.decode("utf-8", "surrogateescape")
        known = route.heads.get(lines) if route is not None else None
        if known is not None and version == b"1" and target[0] == 47 and method != b"CONNECT":
            fields = known
            first = data[:at]
        else:
            read = read_request(route, self.origin, method, target, version, lines, limits)
            if isinstance(read, Fault):
                self._refuse(read, name, path)
                return b""
            fields, first = read
        self.version_10 = version == b"0"
        request_id = fields.request_id
        if request_id is None:
            request_id = self.proxy.ids.next()
            request = b"".join((first, fields.out, b"x-request-id: ", request_id.encode(), END))
        else:
            request = b"".join((first, fields.out, b"\r\n"))
        started = self.now()
        record = request_record(self, route, name, path, fields)
        record.request_id = request_id
        record.protocol = VERSIONS[version]
        exchange = self.exchange = Exchange(self, route, fields, request, record, started)
        rest = exchange.start(data[end + 4 :])
        if exchange.whole_request and not rest:
            self._asked(exchange)
        return rest

    def _asked(self, exchange: Exchange) -> None:
        """The whole request is here, and nothing behind it."""
        if self.shortcut is not None and self.exchange is exchange:  # it is ours still: no answer has ended it
            self.shortcut.asked(self.netns, self.transport)

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

    # the end of an exchange, and of the connection

    def answered(self, exchange: Exchange, now: float, ending: int, broken: bool) -> None:
        """The exchange has ended, and the caller's connection goes on as `ending` says."""
        self.exchange = None
        self._served += 1
        if self._tunnel is not None or self.lost:
            return
        if broken:
            # No fake end: the caller must see that the answer is not the whole of it.
            self.lost = True
            reset(self.transport)
        elif ending == CLOSE:
            if exchange.whole_request and not self._parked:
                self._close()
            else:
                self._linger()
        else:
            shortcut = self.shortcut
            until = self._ends = now + self._patience
            if shortcut is not None:
                if exchange.record.bytes_sent:
                    shortcut.answered()
                if shortcut.joined:
                    until = min(until, now + self.limits.leave_idle)
            self.deadline = until
            if until < self.due:
                self.proxy.wheel.at(self, until)
            if self._parked and not self._busy and not self.full:
                self._advance(b"")

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
