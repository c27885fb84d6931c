"""One request and its answer, from the head that was read to the record that is written. The order of concerns is here.

A request without a body, answered in one piece, passes `start` → Pool.acquire → `begin` → `whole` → `_finish`; all else
is for what can go wrong or is long. An exchange ends exactly once, in `_finish`.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from meshbpf.reason import Reason
from meshbpf.record import Record
from userspace_proxy.body import Intake, encode, last
from userspace_proxy.head import AnswerHead, RequestFields
from userspace_proxy.progress import Progress
from userspace_proxy.reply import BROKEN_FLAGS, CLOSE, ENDINGS, KEEP, KEEP_10, OUTCOMES, REPLIES, Reply
from userspace_proxy.retry import connect_again, replay
from userspace_proxy.tunnel import Tunnel
from userspace_proxy.upstream import UPSTREAM_FULL, Upstream

if TYPE_CHECKING:
    from userspace_proxy.downstream import Downstream
    from userspace_proxy.route import Route, Target

UNATTACHED = 4  # why a caller is not read: its request has no connection yet, and enough of it waits
_IDEMPOTENT = frozenset(("GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"))
HEAD_MARGIN = 64  # at least what ENDINGS adds to a head
_TE = b"transfer-encoding: chunked\r\n"


class Exchange:
    __slots__ = (
        "_body", "_chunked", "_half_closed", "_look", "_progress", "_queue_until", "_sent_size", "_try_until",
        "_until", "avoid", "begun", "body_until", "careful", "dialling", "down", "ended", "fields", "head_only",
        "record", "retried", "route", "sent", "started", "target", "tries", "upstream", "websocket", "whole_request",
    )  # fmt: skip

    def __init__(
        self,
        down: Downstream,
        route: Route | None,
        fields: RequestFields,
        request: bytes,
        record: Record,
        started: float,
    ) -> None:
        self.down = down
        self.route = route
        self.fields = fields
        self.record = record
        self.started = started
        self.head_only = record.method == "HEAD"
        self.websocket = fields.websocket
        self.target: Target | None = None  # who serves it: its `active` counts us
        self.dialling: Target | None = None
        self.upstream: Upstream | None = None
        self.careful = record.method not in _IDEMPOTENT  # must not be served twice
        self.avoid: Target | None = None  # has just failed us
        self.tries = 0
        self.retried = False  # a used connection was dead: from now on only new ones
        self.begun = False  # the answer's head has been written: no local reply and no retry any more
        self.ended = False
        self._half_closed = False
        self.sent: list[bytes] | None = [request]  # the request as sent or to be sent, while it may be sent again
        self._sent_size = 0
        self._body: Intake | None = None
        self.whole_request = fields.length == 0
        self._chunked = False  # the answer is written in chunks
        self._until = self._queue_until = self._try_until = self.body_until = self._look = inf
        self._progress: Progress | None = None

    # the request

    def start(self, data: bytes) -> bytes:
        """Begin, with the first bytes behind the head; returns those that belong to the next request."""
        route = self.route
        if route is not None:
            route.in_flight[0] += 1
        rest = data
        if not self.whole_request:
            # What came with the head is read before anything is sent: bad framing in it reaches no endpoint.
            self._body = Intake(self.fields.length, self.down.limits.fields)
            rest = self._take(data)
            if self.ended:
                return b""
        if route is None:
            self.fail(Reason.NO_SERVICE)
            return rest
        if self.whole_request and route.request:
            self._until = self.started + route.request
        route.pool.acquire(self)
        if not self.ended and (not self.whole_request or self._until != inf):
            self._arm()
        return rest

    def feed(self, data: bytes) -> bytes:
        """More bytes from the caller while its request is not complete; returns those of the next request."""
        rest = self._take(data)
        if not self.ended:
            self._arm()
        return rest

    def _take(self, data: bytes) -> bytes:
        """Read bytes of the body and send them on, or keep them until there is a connection."""
        body = self._body
        if body is None:
            return data
        taken = body.take(data)
        if taken is None:
            self.fail(Reason.BAD_REQUEST)
            return b""
        out, rest = taken
        self.record.bytes_received = body.size
        if not body.done:
            self.body_due()
        else:
            self.body_until = inf
            self.whole_request = True
            if self.route is not None and self.route.request:
                self._until = self.down.now() + self.route.request
        if out:
            self._send(out)
        return rest

    def body_due(self) -> None:
        """From now on the caller has its time to send more of the body, if there is more to come."""
        if not self.whole_request:
            self.body_until = self.down.now() + self.down.limits.body_timeout

    def _send(self, out: bytes) -> None:
        sent = self.sent
        if sent is not None:
            sent.append(out)
            self._sent_size += len(out)
            if self._sent_size > self.down.limits.replay:
                if self.upstream is None:
                    self.down.hold(UNATTACHED)
                else:
                    self.sent = None
        if self.upstream is not None:
            self.upstream.transport.write(out)

    def _arm(self) -> None:
        """Put the nearest of the deadlines on the wheel."""
        if self._look == inf:
            self._look = self.started + self.down.limits.stream_idle / 4
        nearest = min(self._until, self._queue_until, self._try_until, self.body_until, self._look)
        self.down.proxy.wheel.at(self.down, nearest)

    def expired(self, now: float) -> float:
        if now >= self._queue_until:
            self._leave_queue()
            self.fail(Reason.TOO_MANY_CONNECTIONS)
        elif now >= self._until or now >= self._try_until:
            self.fail(Reason.REQUEST_TIMEOUT)
        elif now >= self.body_until and not self.down.held:
            self.fail(Reason.BODY_TIMEOUT)
        elif self._stalled(now):
            self.fail(Reason.STREAM_IDLE_TIMEOUT)
        elif now >= self.body_until:  # it is we who do not read
            self.body_due()
        if self.ended:
            return self.down.deadline
        return min(self._until, self._queue_until, self._try_until, self.body_until, self._look)

    def _stalled(self, now: float) -> bool:
        self._look = now + self.down.limits.stream_idle / 4
        if self._progress is None:
            self._progress = Progress(now)
        return self._progress.stalled(self, now)

    def half_close(self) -> None:
        """The caller will send no more and waits for the answer: the endpoint may know, as without us it would."""
        self._half_closed = True
        if self.upstream is not None:
            self.upstream.reusable = False
            self.upstream.transport.write_eof()

    # the connection to the endpoint

    def wait(self, timeout: float) -> None:
        """The pool: no connection yet."""
        self._queue_until = self.down.now() + timeout if timeout else inf
        self._arm()

    def dial(self, target: Target) -> None:
        self._queue_until = inf
        self.dialling = self.target = target
        self.tries += 1

    def begin(self, upstream: Upstream, target: Target) -> None:
        """The pool: this connection is ours until the answer is complete."""
        if self.dialling is None:
            self.tries += 1
            self._queue_until = inf
        self.dialling = None
        self.target = target
        self.upstream = upstream
        upstream.exchange = self
        down = self.down
        if down.full:
            upstream.transport.pause_reading()
        if down.held:
            down.free(UNATTACHED)
        route = self.route
        if route is not None and route.per_try:
            self._try_until = down.now() + route.per_try
            self._arm()
        sent = self.sent
        assert sent is not None  # nothing is dropped before there is a connection
        upstream.transport.write(sent[0] if len(sent) == 1 else b"".join(sent))
        if self._sent_size > down.limits.replay:
            self.sent = None
        if self._half_closed:
            self.half_close()

    def connect_failed(self, reason: Reason) -> None:
        """The pool: the target could not be reached."""
        if not connect_again(self, reason):
            self.fail(reason)

    def upstream_lost(self, upstream: Upstream, exc: Exception | None) -> None:
        """The endpoint closed (exc None) or reset the connection before the answer was complete."""
        if self.begun:
            self.fail(Reason.UPSTREAM_CLOSED_EARLY)
        elif not self.ended and not replay(self, upstream):
            self.fail(Reason.UPSTREAM_RESET)

    def detach(self) -> None:
        """Let go of target and connection, which are of no more use to us."""
        if self.target is not None:
            self.target.active -= 1
            self.target = None
        self.dialling = None
        self._try_until = inf
        if self.upstream is not None:
            self.upstream.exchange = None
            self.upstream = None
        if self.down.held:
            self.down.free(UPSTREAM_FULL | UNATTACHED)

    def _leave_queue(self) -> None:
        if self._queue_until != inf and self.route is not None:
            self._queue_until = inf
            self.route.pool.leave(self)

    # the answer

    def interim(self, answer: AnswerHead) -> None:
        """100 Continue and its like; HTTP/1.0 knows none."""
        if self._progress is not None:
            self._progress.forget()
        if not self.down.version_10:
            if self.down.shortcut is not None:
                self.down.shortcut.leave()
            self.down.transport.write(answer.out + b"\r\n")

    def whole(self, answer: AnswerHead, data: bytes, end: int) -> None:
        """The complete answer, of known length: data[end:] is its body."""
        down = self.down
        ending = KEEP if self.fields.simple and not down.eof and not down.proxy.draining else self._ending(False)
        if not answer.verbatim or ending != KEEP:
            data, end = b"".join((answer.out, ENDINGS[ending], data[end:])), len(answer.out) + len(ENDINGS[ending])
        if down.shortcut is not None:
            down.shortcut.answering(len(data))
        down.transport.write(data)
        self.begun = True
        record = self.record
        record.response_code = answer.status
        record.bytes_sent = len(data) - end
        now = down.now()
        record.upstream_service_time_ms = (now - self.started) * 1e3
        self._finish(now, ending)

    def head(self, answer: AnswerHead, length: int, payload: bytes, done: bool, trailers: bytes = b"") -> None:
        """The head of an answer that is chunked, long, or ends with its connection, and the first bytes of its body."""
        down = self.down
        chunked = length < 0 and not down.version_10
        ending = self._ending(length < 0 and not chunked)
        if down.shortcut is not None:
            if length < 0:
                down.shortcut.leave()
            else:
                down.shortcut.answering(len(answer.out) + HEAD_MARGIN + length)
        out = [answer.out, _TE, ENDINGS[ending]] if chunked else [answer.out, ENDINGS[ending]]
        self._chunked = chunked
        self.begun = True
        record = self.record
        record.response_code = answer.status
        record.upstream_service_time_ms = (down.now() - self.started) * 1e3
        down.ending = ending
        if payload:
            record.bytes_sent += len(payload)
            out.append(encode(payload) if chunked else payload)
        if done and chunked:
            out.append(last(trailers))
        down.transport.write(b"".join(out))
        if done:
            self._finish(down.now(), ending)

    def body(self, payload: bytes, done: bool, trailers: bytes = b"") -> None:
        """More of the answer's body, the rest of it when `done`."""
        down = self.down
        self.record.bytes_sent += len(payload)
        if self._chunked:
            payload = encode(payload) + last(trailers) if done else encode(payload)
        if payload:
            if down.shortcut is not None:
                down.shortcut.going_on()
            down.transport.write(payload)
        if done:
            self._finish(down.now(), down.ending)

    def _ending(self, by_close: bool) -> int:
        """How the caller's connection goes on behind this answer."""
        down = self.down
        fields = self.fields
        if by_close or fields.close or not self.whole_request or down.last:
            return CLOSE
        if down.version_10:
            return KEEP_10 if fields.keep_alive else CLOSE
        return KEEP

    def tunnel(self, upstream: Upstream, answer: AnswerHead, data: bytes) -> None:
        """The endpoint agreed to speak WebSocket: from here on bytes, to and fro, until both have ended."""
        self.begun = True
        self.upstream = upstream.exchange = None
        Tunnel(self, upstream).begin(answer, data)

    def end_tunnel(self, reason: Reason | None) -> None:
        record = self.record
        record.endpoint_outcome = "ok"
        record.response_code_details = "via_upstream"
        if reason is not None:
            record.reason = reason.word
        self._finish(self.down.now(), CLOSE, broken=True)

    # the end

    def fail(self, reason: Reason, hard: bool = False) -> None:
        """End for `reason`: with a local reply while that is possible, else by breaking off what has begun."""
        if self.ended:
            return
        self._leave_queue()
        record = self.record
        if reason in OUTCOMES:
            record.endpoint_outcome = reason.word
        record.reason = reason.word
        upstream = self.upstream
        if upstream is not None:
            upstream.break_off(hard)
        down = self.down
        reply: Reply | None = None if self.begun or down.lost else REPLIES.get(reason)
        if reply is None:
            record.response_flags = BROKEN_FLAGS.get(reason)
            record.response_code_details = reason.word
            self._finish(down.now(), CLOSE, broken=True)
            return
        reply.tell(record, self.head_only)
        ending = CLOSE if reason in (Reason.BAD_REQUEST, Reason.BODY_TIMEOUT) else self._ending(False)
        out = reply.bytes(ending, self.head_only)
        if down.shortcut is not None:
            down.shortcut.answering(len(out))
        down.transport.write(out)
        self._finish(down.now(), ending)

    def _finish(self, now: float, ending: int, broken: bool = False) -> None:
        self.ended = True
        route, target, upstream, down = self.route, self.target, self.upstream, self.down
        record = self.record
        record.duration_ms = (now - self.started) * 1e3
        record.attempts = self.tries
        if target is not None:
            target.active -= 1
            record.upstream_host = target.label
        if route is not None:
            route.in_flight[0] -= 1
        if upstream is not None and record.reason is None:
            record.endpoint_outcome = "ok"
            record.response_code_details = "via_upstream"
            upstream.exchange = None
            if down.full:
                upstream.transport.resume_reading()
            if (
                upstream.reusable
                and upstream.alive
                and self.whole_request
                and (self._body is None or not upstream.transport.get_write_buffer_size())
            ):
                upstream.pool.release(upstream, now)
            else:
                upstream.discard()
        self.dialling = None
        self.upstream = None
        if down.held:
            down.free(UPSTREAM_FULL | UNATTACHED)
        down.proxy.sink(record)
        down.answered(self, now, ending, broken)
