"""One request and its answer, from the head that was read to the record that is written: what it is, and its life.

A request without a body, answered in one piece, passes `start` → `attempt` → `begin` → `pass_whole` → `finish`; all
else is for what can go wrong or is long. Its tries are in `attempt`, the way of the answer in `answer`, its states in
`life`. An exchange ends exactly once, in `finish`.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from meshbpf.reason import Reason
from meshbpf.record import Record
from userspace_proxy.answer import reply_locally
from userspace_proxy.attempt import attempt, send
from userspace_proxy.body import Intake
from userspace_proxy.connection import UNATTACHED, UPSTREAM_FULL
from userspace_proxy.head import RequestFields
from userspace_proxy.life import ANSWERING, ENDED, OPEN, QUEUED, State
from userspace_proxy.progress import Progress
from userspace_proxy.reply import BROKEN_FLAGS, CLOSE, OUTCOMES, REPLIES

if TYPE_CHECKING:
    from userspace_proxy.downstream import Downstream
    from userspace_proxy.route import Route, Target
    from userspace_proxy.upstream import Upstream

_IDEMPOTENT = frozenset(("GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"))


class Exchange:
    __slots__ = (
        "_body", "_look", "_until", "avoid", "body_until", "careful", "chunked", "down", "fields", "half_closed",
        "head_only", "progress", "queue_until", "record", "retried", "route", "sent", "sent_size", "started", "state",
        "target", "tries", "try_until", "upstream", "websocket", "whole_request",
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
        self.state: State = OPEN
        self.down = down
        self.route = route
        self.fields = fields
        self.record = record
        self.started = started
        # the request
        self.head_only = record.method == "HEAD"
        self.websocket = fields.websocket
        self.careful = record.method not in _IDEMPOTENT  # must not be served twice
        self.whole_request = fields.length == 0  # all of it is here
        self.half_closed = False  # … and the caller will send no other
        self._body: Intake | None = None
        # its tries
        self.tries = 0
        self.target: Target | None = None  # who serves it: its `active` counts us
        self.upstream: Upstream | None = None
        self.avoid: Target | None = None  # has just failed us
        self.retried = False  # a used connection was dead: from now on only new ones
        self.sent: list[bytes] | None = [request]  # the request as sent or to be sent, while it may be sent again
        self.sent_size = 0  # … without the head
        # its answer
        self.chunked = False  # is written in chunks
        self.progress: Progress | None = None
        # deadlines: of the answer, of a place in the pool, of this try, of more body, and when to look at progress
        self._until = self.queue_until = self.try_until = self.body_until = self._look = inf

    # the request

    def start(self, data: bytes) -> bytes:
        """Begin, with the first bytes behind the head; returns those that belong to the next request.

        The order of concerns for a request as a whole: what refuses, delays or leads it elsewhere stands here, before
        it costs an endpoint anything.
        """
        route = self.route
        if route is not None:
            route.in_flight[0] += 1
        rest = data
        if not self.whole_request:
            # What came with the head is read before anything is sent: bad framing in it reaches no endpoint.
            self._body = Intake(self.fields.length, self.down.limits.fields)
            rest = self._take(data)
            if self.state is ENDED:
                return b""
        if route is None:
            self.fail(Reason.NO_SERVICE)
            return rest
        if self.whole_request and route.request:
            self._until = self.started + route.request
        attempt(self)
        if (self._until != inf or not self.whole_request) and self.state is not ENDED:
            self.arm()
        return rest

    def feed(self, data: bytes) -> bytes:
        """More bytes from the caller while its request is not complete; returns those of the next request."""
        rest = self._take(data)
        if self.state is not ENDED:
            self.arm()
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
            send(self, out)
        return rest

    def body_due(self) -> None:
        """From now on the caller has its time to send more of the body, if there is more to come."""
        if not self.whole_request:
            self.body_until = self.down.now() + self.down.limits.body_timeout

    # time

    def arm(self) -> None:
        """Put the nearest of the deadlines on the wheel."""
        if self._look == inf:
            self._look = self.started + self.down.limits.stream_idle / 4
        self.down.proxy.wheel.at(self.down, self._nearest())

    def _nearest(self) -> float:
        return min(self._until, self.queue_until, self.try_until, self.body_until, self._look)

    def expired(self, now: float) -> float:
        if now >= self.queue_until:
            self.fail(Reason.TOO_MANY_CONNECTIONS)
        elif now >= self._until or now >= self.try_until:
            self.fail(Reason.REQUEST_TIMEOUT)
        elif now >= self.body_until and not self.down.held:
            self.fail(Reason.BODY_TIMEOUT)
        elif self._stalled(now):
            self.fail(Reason.STREAM_IDLE_TIMEOUT)
        elif now >= self.body_until:  # it is we who do not read
            self.body_due()
        return self.down.deadline if self.state is ENDED else self._nearest()

    def _stalled(self, now: float) -> bool:
        self._look = now + self.down.limits.stream_idle / 4
        if self.progress is None:
            self.progress = Progress(now)
        return self.progress.stalled(self, now)

    # the end

    def fail(self, reason: Reason, hard: bool = False) -> None:
        """End for `reason`: with a local reply while that is possible, else by breaking off what has begun."""
        state, route, down, record = self.state, self.route, self.down, self.record
        if state is ENDED:
            return
        if state is QUEUED and route is not None:
            route.pool.leave(self)
        if reason in OUTCOMES:
            record.endpoint_outcome = reason.word
        record.reason = reason.word
        if self.upstream is not None:
            self.upstream.break_off(hard)
        reply = None if state is ANSWERING or down.lost else REPLIES.get(reason)
        if reply is None:
            record.response_flags = BROKEN_FLAGS.get(reason)
            record.response_code_details = reason.word
            self.finish(down.now(), CLOSE, broken=True)
        else:
            reply_locally(self, reply)

    def finish(self, now: float, ending: int, broken: bool = False) -> None:
        """The one end: counts and the connection go back, the record is written, the caller's connection goes on."""
        self.state = ENDED
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
        self.upstream = None
        if down.held:
            down.free(UPSTREAM_FULL | UNATTACHED)
        down.proxy.sink(record)
        down.answered(self, now, ending, broken)
