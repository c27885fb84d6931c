"""The tries of an exchange at an endpoint: pick one, get a connection, send, and perhaps once more. No answer is read.

A try runs `attempt` → (`wait` → `attempt` →) (`dial` →) `begin`; it fails in `connect_failed` or `upstream_lost`, where
`retry` decides on another. What is decided for one try stands here; for the request as a whole, in `Exchange.start`.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from meshbpf.reason import Reason
from userspace_proxy.connection import UNATTACHED, UPSTREAM_FULL
from userspace_proxy.life import ANSWERING, DIALLING, ENDED, OPEN, QUEUED, SENT
from userspace_proxy.retry import connects_again, replays
from userspace_proxy.wire import spoken

if TYPE_CHECKING:
    from userspace_proxy.exchange import Exchange
    from userspace_proxy.route import Target
    from userspace_proxy.upstream import Upstream


def attempt(exchange: Exchange) -> None:
    """The order of concerns for one try. It comes to `begin`, `connect_failed` or `fail`, now or later.

    Rather not to the endpoint that has just failed; and when it replays, on no connection that was used. Whoever waited
    for a place comes here again when there is one: its endpoint may have left meanwhile.
    """
    route, down, avoid = exchange.route, exchange.down, exchange.avoid
    assert route is not None
    rnd = down.proxy.rnd
    target = route.balancer.pick(rnd, avoid)
    if target is None and avoid is not None:
        target = route.balancer.pick(rnd)
    if target is None:
        exchange.fail(Reason.NO_HEALTHY_UPSTREAM)
        return
    idle = target.idle.get(down.netns)
    while idle and exchange.state is OPEN and not exchange.retried:
        upstream = idle.pop()
        if exchange.careful and spoken(upstream.sock):
            upstream.discard()
            continue
        target.active += 1
        begin(exchange, upstream, target)
        return
    route.pool.connect(exchange, target)


def wait(exchange: Exchange, timeout: float) -> None:
    """The pool: no connection yet."""
    exchange.state = QUEUED
    exchange.queue_until = exchange.down.now() + timeout if timeout else inf
    exchange.arm()


def dial(exchange: Exchange, target: Target) -> None:
    """The pool: `target` is being connected to."""
    exchange.state = DIALLING
    exchange.queue_until = inf
    exchange.target = target
    exchange.tries += 1


def begin(exchange: Exchange, upstream: Upstream, target: Target) -> None:
    """The pool: this connection is ours until the answer is complete."""
    if exchange.state is not DIALLING:
        exchange.tries += 1
    exchange.state = SENT
    exchange.target = target
    exchange.upstream = upstream
    upstream.exchange = exchange
    down = exchange.down
    if down.full:
        upstream.transport.pause_reading()
    if down.held:
        down.free(UNATTACHED)
    route = exchange.route
    if route is not None and route.per_try:
        exchange.try_until = down.now() + route.per_try
        exchange.arm()
    sent = exchange.sent
    assert sent is not None  # nothing is dropped before there is a connection
    upstream.transport.write(sent[0] if len(sent) == 1 else b"".join(sent))
    if exchange.sent_size > down.limits.replay:
        exchange.sent = None
    if exchange.half_closed:
        half_close(exchange)


def send(exchange: Exchange, out: bytes) -> None:
    """More of the request's body: on its way, and kept while it may have to be sent again."""
    sent, upstream = exchange.sent, exchange.upstream
    if sent is not None:
        sent.append(out)
        exchange.sent_size += len(out)
        if exchange.sent_size > exchange.down.limits.replay:
            if upstream is None:
                exchange.down.hold(UNATTACHED)
            else:
                exchange.sent = None
    if upstream is not None:
        upstream.transport.write(out)


def half_close(exchange: Exchange) -> None:
    """The caller will send no more and waits for the answer: the endpoint may know, as without us it would."""
    exchange.half_closed = True
    if exchange.upstream is not None:
        exchange.upstream.reusable = False
        exchange.upstream.transport.write_eof()


def connect_failed(exchange: Exchange, reason: Reason) -> None:
    """The pool: the target could not be reached."""
    if connects_again(exchange):
        _again(exchange, reason)
    else:
        exchange.fail(reason)


def upstream_lost(exchange: Exchange, upstream: Upstream) -> None:
    """The endpoint closed or reset the connection before the answer was complete."""
    if exchange.state is ANSWERING:
        exchange.fail(Reason.UPSTREAM_CLOSED_EARLY)
    elif exchange.state is not ENDED:
        if replays(exchange, upstream):
            exchange.retried = True
            _again(exchange, Reason.UPSTREAM_RESET)
        else:
            exchange.fail(Reason.UPSTREAM_RESET)


def _again(exchange: Exchange, reason: Reason) -> None:
    """Another try, behind one that failed for `reason`: that one is counted, and its target avoided."""
    route, target, down = exchange.route, exchange.target, exchange.down
    assert route is not None and target is not None
    target.active -= 1
    exchange.state = OPEN
    exchange.target = None
    exchange.avoid = target
    exchange.try_until = inf
    if exchange.upstream is not None:
        exchange.upstream.exchange = None
        exchange.upstream = None
    if down.held:
        down.free(UPSTREAM_FULL | UNATTACHED)
    down.proxy.attempt(route.service, target.label, reason.word)
    attempt(exchange)
