"""HTTP/1.1 on the connection of a calling application: reads requests, has them served one at a time and in order.

What an exchange does is not known here, nor how a connection ends; what is here is heads, pipelining, and when to read.
"""

from __future__ import annotations

from meshbpf.reason import Reason
from userspace_proxy.attempt import half_close
from userspace_proxy.connection import PARKED, Connection
from userspace_proxy.exchange import Exchange
from userspace_proxy.grammar import END, LINE, METHODS, PREFACE, VERSIONS, Fault, partial_fault, whole_fault
from userspace_proxy.life import ANSWERING
from userspace_proxy.reply import CLOSE
from userspace_proxy.request import read_request, request_record
from userspace_proxy.wire import reset


class Downstream(Connection):
    __slots__ = ()

    # when to read

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
            half_close(exchange)
        else:
            self.lost = True
            exchange.fail(Reason.DOWNSTREAM_CLOSED)
            self._close()

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
            elif exchange.whole_request and exchange.state is not ANSWERING:
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
