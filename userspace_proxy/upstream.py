"""One connection to an endpoint: reads answers, one at a time, and tells the exchange it serves. Decides nothing else.

An answer is only believed when its framing is beyond doubt; bytes that nobody asked for end the connection.
"""

from __future__ import annotations

import asyncio
import socket
from math import inf
from typing import TYPE_CHECKING, cast

from meshbpf.reason import Reason
from userspace_proxy.answer import open_tunnel, pass_body, pass_head, pass_interim, pass_whole
from userspace_proxy.attempt import upstream_lost
from userspace_proxy.body import Dechunker
from userspace_proxy.connection import UPSTREAM_FULL
from userspace_proxy.grammar import BARE, CHUNKED, END, UNTIL_CLOSE
from userspace_proxy.head import AnswerHead, answer_head
from userspace_proxy.wire import reset

if TYPE_CHECKING:
    from userspace_proxy.exchange import Exchange
    from userspace_proxy.pool import Pool
    from userspace_proxy.route import Target
    from userspace_proxy.server import Proxy

HEAD, LENGTH, CHUNKS, CLOSING = 0, 1, 2, 3  # what comes next: a head, a body of known length, chunks, all until the end
MEMO = 4096  # a head up to this size is remembered: the next answer often has the same


class Upstream(asyncio.Protocol):
    __slots__ = (
        "_buffer", "_head", "_last", "_left", "_proxy", "_stage", "alive", "chunks", "deadline", "due", "exchange",
        "netns", "pool", "reusable", "served", "sock", "target", "transport",
    )  # fmt: skip

    def __init__(self, proxy: Proxy, pool: Pool, target: Target, netns: int, sock: socket.socket) -> None:
        self._proxy = proxy
        self.pool = pool
        self.target = target
        self.netns = netns
        self.sock = sock
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)  # until connection_made
        self.exchange: Exchange | None = None
        self.alive = True
        self.reusable = True
        self.served = 0  # answers that were complete
        self.deadline = self.due = inf
        self.chunks: Dechunker | None = None
        self._stage = HEAD
        self._left = 0
        self._buffer = b""
        self._head = b""  # of the answer before, and what was read from it
        self._last: AnswerHead = AnswerHead(0)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:  # an answer to nothing
            self.discard()
            return
        stage = self._stage
        if stage == HEAD:
            answer = self._last
            if not self._buffer and self._head and data.startswith(self._head):
                self._begin(exchange, answer, data, len(self._head))
            else:
                self._read_head(exchange, data)
        elif stage == LENGTH:
            size = len(data)
            left = self._left = self._left - size
            if left > 0:
                pass_body(exchange, data, False)
            elif left == 0:
                self._complete()
                pass_body(exchange, data, True)
            else:
                self.reusable = False
                self._complete()
                pass_body(exchange, data[:left], True)
        elif stage == CHUNKS:
            self._read_chunks(exchange, None, data)
        else:
            pass_body(exchange, data, False)

    def _read_head(self, exchange: Exchange, data: bytes) -> None:
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        while True:
            end = data.find(END) + 4
            limits = self._proxy.limits
            if end == 3:
                if len(data) > limits.head or BARE.search(data):
                    self._refuse(exchange)
                else:
                    self._buffer = data
                return
            answer = answer_head(data[:end], limits) if end <= limits.head else None
            if answer is None:
                self._refuse(exchange)
                return
            if answer.status >= 200:
                if end <= MEMO:
                    self._head, self._last = data[:end], answer
                self._begin(exchange, answer, data, end)
                return
            if answer.status == 101:
                if answer.websocket and exchange.websocket:
                    open_tunnel(exchange, self, answer, data[end:])
                else:
                    self._refuse(exchange)
                return
            pass_interim(exchange, answer)
            data = data[end:]
            if not data:
                return

    def _begin(self, exchange: Exchange, answer: AnswerHead, data: bytes, end: int) -> None:
        """The final head has been read, it ends at `end`."""
        if answer.close:
            self.reusable = False
        length = 0 if exchange.head_only or answer.status in (204, 304) else answer.length
        if length >= 0:
            extra = len(data) - end - length
            if extra >= 0:
                if extra:
                    self.reusable = False
                    data = data[: end + length]
                self.served += 1
                pass_whole(exchange, answer, data, end)
            else:
                self._stage = LENGTH
                self._left = -extra
                pass_head(exchange, answer, length, data[end:], False)
        elif length == CHUNKED:
            self._stage = CHUNKS
            self.chunks = Dechunker(self._proxy.limits.fields)
            self._read_chunks(exchange, answer, data[end:])
        else:
            self._stage = CLOSING
            self.reusable = False
            pass_head(exchange, answer, UNTIL_CLOSE, data[end:], False)

    def _read_chunks(self, exchange: Exchange, answer: AnswerHead | None, data: bytes) -> None:
        """More of a chunked body; with `answer` its head has not been told yet."""
        chunks = self.chunks
        assert chunks is not None
        used = chunks.feed(data)
        if used < 0:
            self._refuse(exchange)
            return
        done = chunks.done
        payload = chunks.payload()
        trailers = b""
        if done:
            trailers = chunks.trailers
            if used < len(data):
                self.reusable = False
            self._complete()
        if answer is not None:
            pass_head(exchange, answer, CHUNKED, payload, done, trailers)
        elif payload or done:
            pass_body(exchange, payload, done, trailers)

    def _complete(self) -> None:
        self._stage = HEAD
        self.chunks = None
        self.served += 1

    def _refuse(self, exchange: Exchange) -> None:
        exchange.fail(Reason.UPSTREAM_PROTOCOL_ERROR)

    def eof_received(self) -> bool:
        exchange, self.exchange = self.exchange, None
        self.pool.forget(self)
        if exchange is not None:
            if self._stage == CLOSING:
                self.exchange = exchange
                self._complete()
                pass_body(exchange, b"", True)
            else:
                upstream_lost(exchange, self)
        self.discard()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.pool.forget(self)
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            upstream_lost(exchange, self)

    def pause_writing(self) -> None:
        if self.exchange is not None:
            self.exchange.down.hold(UPSTREAM_FULL)

    def resume_writing(self) -> None:
        if self.exchange is not None:
            self.exchange.down.free(UPSTREAM_FULL)

    def discard(self) -> None:
        """End this connection, which serves nobody: what the endpoint has not taken until now, nobody needs."""
        self.pool.forget(self)
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def break_off(self, hard: bool) -> None:
        """End this connection in the middle of an exchange; `hard`: with a reset, as the caller did."""
        self.exchange = None
        self.pool.forget(self)
        if hard:
            reset(self.transport)
        else:
            self.transport.abort()

    def expired(self, now: float) -> float:
        """The wheel: idle for too long. While it serves, the deadline of its last rest means nothing."""
        del now
        if self.exchange is None:
            self.discard()
        return inf
