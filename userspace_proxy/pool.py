"""The connections of one route: how many there may be, who waits, and what becomes of them. Knows no HTTP.

Idle connections are kept per namespace and target, newest first, so that surplus ones age and are closed. Limits are
those of the policy and count per worker: above `max_connections` a request waits, above `max_pending` it is refused.
"""

from __future__ import annotations

from collections import deque
from math import inf
from typing import TYPE_CHECKING

from meshbpf.model import ServicePolicy
from meshbpf.reason import Reason
from meshbpf.tasks import spawn
from userspace_proxy.attempt import attempt, begin, connect_failed, dial, wait
from userspace_proxy.dial import connect
from userspace_proxy.life import DIALLING, QUEUED
from userspace_proxy.upstream import Upstream
from userspace_proxy.wire import spoken

if TYPE_CHECKING:
    from userspace_proxy.exchange import Exchange
    from userspace_proxy.route import Route, Target
    from userspace_proxy.server import Proxy


class Pool:
    __slots__ = (
        "_proxy", "_route", "_waiting", "connect_timeout", "idle_timeout", "max_connections", "max_pending",
        "max_requests", "open", "pending", "queue_timeout",
    )  # fmt: skip

    def __init__(self, proxy: Proxy, route: Route) -> None:
        self._proxy = proxy
        self._route = route
        self._waiting: deque[Exchange] = deque()
        self.open = 0  # connections, those being made included
        self.pending = 0  # requests without a connection: waiting or dialling
        self.follow(route.policy)

    def follow(self, policy: ServicePolicy) -> None:
        tcp, http = policy.connection_pool.tcp, policy.connection_pool.http
        self.max_connections = tcp.max_connections
        self.connect_timeout = tcp.connect_timeout
        self.max_pending = http.http1_max_pending_requests
        self.max_requests = http.max_requests_per_connection
        self.idle_timeout = http.idle_timeout
        self.queue_timeout = policy.timeouts.queue
        self._admit()

    def connect(self, exchange: Exchange, target: Target) -> None:
        """No connection to `target` idles: make one, or let `exchange` wait until there is room, or refuse it."""
        if exchange.state is QUEUED:
            self._waiting.remove(exchange)
        elif self.pending >= self.max_pending:
            exchange.fail(Reason.TOO_MANY_PENDING)
            return
        else:
            self.pending += 1
            if self.open >= self.max_connections and not self._evict():
                self._waiting.append(exchange)
                wait(exchange, self.queue_timeout)
                return
        self.open += 1
        target.active += 1
        dial(exchange, target)
        spawn(self._dial(exchange, target), "dial")

    def leave(self, exchange: Exchange) -> None:
        """A waiting exchange waits no more."""
        self._waiting.remove(exchange)
        self.pending -= 1
        exchange.queue_until = inf

    def release(self, upstream: Upstream, now: float) -> None:
        """The answer of `upstream` is complete and it may serve again."""
        target = upstream.target
        if target.gone or (self.max_requests and upstream.served >= self.max_requests):
            upstream.discard()
        elif self._waiting:
            exchange = self._waiting[0]
            if (
                exchange.down.netns != upstream.netns
                or target.draining
                or (exchange.retried and upstream.served)
                or (exchange.careful and spoken(upstream.sock))
            ):
                upstream.discard()  # its place is what is needed
                return
            self.leave(exchange)
            target.active += 1
            begin(exchange, upstream, target)
        else:
            idle = target.idle.get(upstream.netns)
            if idle is None:
                idle = target.idle[upstream.netns] = []
            idle.append(upstream)
            until = upstream.deadline = now + self.idle_timeout
            if until < upstream.due:
                self._proxy.wheel.at(upstream, until)

    def forget(self, upstream: Upstream) -> None:
        """`upstream` has ended or is about to; may be said twice."""
        if not upstream.alive:
            return
        upstream.alive = False
        self._proxy.wheel.drop(upstream)
        idle = upstream.target.idle.get(upstream.netns)
        if idle is not None and upstream in idle:
            idle.remove(upstream)
        self._ended()

    def _evict(self) -> bool:
        """Make room by closing a connection that idles, to whatever target."""
        for target in self._route.targets:
            for idle in target.idle.values():
                if idle:
                    self.open += 1  # keeps `forget` from giving the place to a waiting one
                    idle[0].discard()
                    self.open -= 1
                    return True
        return False

    def _ended(self) -> None:
        self.open -= 1
        self._admit()

    def _admit(self) -> None:
        """Those that wait have their turn, as far as there is room."""
        while self._waiting and self.open < self.max_connections:
            attempt(self._waiting[0])

    async def _dial(self, exchange: Exchange, target: Target) -> None:
        proxy, netns = self._proxy, exchange.down.netns
        outcome = await connect(proxy.loop, proxy.make_socket, netns, target, self.connect_timeout)
        self.pending -= 1
        failed: Reason | None = None
        if isinstance(outcome, Reason):
            failed = outcome
            self._ended()
        else:
            upstream = Upstream(proxy, self, target, netns, outcome)
            proxy.poller.connected(outcome, upstream)
            if not upstream.alive:  # accepted and closed at once
                failed = Reason.CONNECT_FAILED
        if exchange.state is DIALLING and exchange.target is target:
            if failed is None:
                begin(exchange, upstream, target)
            else:
                connect_failed(exchange, failed)
        elif failed is None:  # the caller went away meanwhile: somebody else will use it
            self.release(upstream, proxy.clock())
