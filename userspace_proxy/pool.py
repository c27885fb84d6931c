"""The connections of one route: which is used next, how many there may be, and who waits. Knows no HTTP.

Idle connections are kept per namespace and target, newest first, so that surplus ones age and are closed. Limits are
those of the policy and count per worker: above `max_connections` a request waits, above `max_pending` it is refused.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from typing import TYPE_CHECKING

from meshbpf.model import ServicePolicy
from meshbpf.reason import Reason
from meshbpf.tasks import spawn
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

    def acquire(self, exchange: Exchange) -> None:
        """Give `exchange` a connection: rather not to the target it avoids, and when it replays, none that was used.

        It hears `begin`, `connect_failed` or `fail`, now or later.
        """
        target = self._route.balancer.pick(self._proxy.rnd, exchange.avoid)
        if target is None and exchange.avoid is not None:
            target = self._route.balancer.pick(self._proxy.rnd)
        if target is None:
            exchange.fail(Reason.NO_HEALTHY_UPSTREAM)
            return
        idle = target.idle.get(exchange.down.netns)
        while idle and not exchange.retried:
            upstream = idle.pop()
            if exchange.careful and spoken(upstream.sock):
                upstream.discard()
                continue
            target.active += 1
            exchange.begin(upstream, target)
            return
        if self.pending >= self.max_pending:
            exchange.fail(Reason.TOO_MANY_PENDING)
        else:
            self.pending += 1
            if self.open >= self.max_connections and not self._evict():
                self._waiting.append(exchange)
                exchange.wait(self.queue_timeout)
            else:
                self._dial(exchange, target)

    def leave(self, exchange: Exchange) -> None:
        """A waiting exchange waits no more."""
        self._waiting.remove(exchange)
        self.pending -= 1

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
            exchange.begin(upstream, target)
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
        """Dial for those that wait, as far as there is room."""
        while self._waiting and self.open < self.max_connections:
            exchange = self._waiting[0]
            pick, rnd = self._route.balancer.pick, self._proxy.rnd
            target = pick(rnd, exchange.avoid) or pick(rnd)
            if target is None:
                self.leave(exchange)
                exchange.fail(Reason.NO_HEALTHY_UPSTREAM)
            else:
                self._waiting.popleft()
                self._dial(exchange, target)

    def _dial(self, exchange: Exchange, target: Target) -> None:
        self.open += 1
        target.active += 1
        exchange.dial(target)
        spawn(self._connect(exchange, target), "dial")

    async def _connect(self, exchange: Exchange, target: Target) -> None:
        proxy = self._proxy
        netns = exchange.down.netns
        sock: socket.socket | None = None
        failed: Reason | None = None
        try:
            async with asyncio.timeout(self.connect_timeout or None):
                sock = proxy.make_socket(netns, socket.AF_INET6 if ":" in target.address else socket.AF_INET)
                sock.setblocking(False)
                await proxy.loop.sock_connect(sock, (target.address, target.port))
            upstream = Upstream(proxy, self, target, netns, sock)
            proxy.poller.connected(sock, upstream)
        except TimeoutError:
            failed = Reason.CONNECT_TIMEOUT
        except (OSError, KeyError):  # KeyError: the namespace was unlistened while its connection waited
            failed = Reason.CONNECT_FAILED
        self.pending -= 1
        if failed is not None:
            if sock is not None:
                sock.close()
            self._ended()
        elif not upstream.alive:  # accepted and closed at once
            failed = Reason.CONNECT_FAILED
        if failed is not None:
            if exchange.dialling is target:
                exchange.connect_failed(failed)
        elif exchange.dialling is target:
            exchange.begin(upstream, target)
        else:  # the caller went away meanwhile: somebody else will use it
            self.release(upstream, proxy.clock())
