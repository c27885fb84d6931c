"""The proxy of one worker: what all its connections share, its listeners, its mesh, and how it ends.

Composition only: connections are `connection` and `downstream`, requests `exchange`, their tries `attempt`, endpoints
`upstream` and `pool`, answers `answer`, TCP `tcp`.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Callable
from functools import partial

from meshbpf.model import Mesh, Protocol
from meshbpf.reason import Reason
from meshbpf.record import Record
from userspace_proxy.acceleration import Accelerator
from userspace_proxy.connection import Connection
from userspace_proxy.downstream import Downstream
from userspace_proxy.hello import Hello
from userspace_proxy.limits import DEFAULT_LIMITS, Limits
from userspace_proxy.origin import Lookup
from userspace_proxy.poller import Acceptor, Poller
from userspace_proxy.pool import Pool
from userspace_proxy.relays import relays_of
from userspace_proxy.requestid import RequestIds
from userspace_proxy.route import Route, Table, Target
from userspace_proxy.stats import Stats
from userspace_proxy.tcp import Relay
from userspace_proxy.wheel import Wheel


def _discard_idle(target: Target) -> None:
    for idle in target.idle.values():
        for upstream in list(idle):
            upstream.discard()


class Proxy:
    """One per worker, made inside its running loop. `stats` is told what has no record of its own."""

    def __init__(
        self,
        lookup: Lookup,
        sink: Callable[[Record], None],
        make_socket: Callable[[int, int], socket.socket],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        rnd: Callable[[], float] = random.random,
        accelerator: Accelerator | None = None,
        stats: Stats | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.poller = Poller(self.loop)
        self.lookup = lookup
        self.sink = sink
        self.make_socket = make_socket
        self.clock = clock
        self.wall = wall
        self.rnd = rnd
        self.accelerator = accelerator
        self.limits = limits
        self.ids = RequestIds()
        self.wheel = Wheel(self.loop, clock, limits.tick)
        self.draining = False
        self._stats = stats if stats is not None else Stats()
        self.table = Table(partial(Pool, self), self._stats.in_flight)
        self._connections: dict[Connection, str] = {}  # … and the service that each is counted for
        self._acceptors: dict[int, list[Acceptor]] = {}
        self._idle: asyncio.Event | None = None

    def use(self, mesh: Mesh) -> None:
        """Serve `mesh` from now on. What is under way goes on; targets that left lose their idle connections."""
        left = self.table.use(mesh)
        for target in left:
            _discard_idle(target)

    def listen(self, netns: int, sock: socket.socket) -> None:
        """Accept what `sock`, which listens already, is given. The caller keeps its own copy of the socket."""
        acceptor = Acceptor(self.poller, sock.dup(), partial(Downstream, self, netns))
        self._acceptors.setdefault(netns, []).append(acceptor)

    def unlisten(self, netns: int) -> None:
        """Accept no more in this namespace; its connections live on."""
        for acceptor in self._acceptors.pop(netns, []):
            acceptor.close()
        for target in self.table.targets():  # idle connections would keep the namespace alive
            for upstream in list(target.idle.get(netns, ())):
                upstream.discard()
            target.idle.pop(netns, None)

    async def drain(self, seconds: float) -> tuple[int, int]:
        """Take no more connections, close idle ones, let requests finish; whatever is left after `seconds` is cut.

        Returns how many connections ended in time, idle ones among them, and how many were cut: each of these is a
        verdict `draining`.
        """
        self.draining = True
        for netns in list(self._acceptors):
            self.unlisten(netns)
        begun_with = self.open_connections
        self._idle = asyncio.Event()
        for connection in list(self._connections):
            connection.drain()
        relays = relays_of(self.loop)
        until = self.loop.time() + seconds
        while (self._connections or relays) and (left := until - self.loop.time()) > 0:
            if self._connections:
                try:
                    async with asyncio.timeout(left):
                        await self._idle.wait()
                except TimeoutError:
                    break
            else:
                await asyncio.sleep(min(left, self.limits.tick))
        cut = len(relays) + sum(connection.abort() for connection in list(self._connections))
        relays.close(Reason.DRAINING)
        for target in self.table.targets():
            _discard_idle(target)
        await asyncio.sleep(0)  # what was closed above is told
        self.wheel.stop()
        return begun_with - cut, cut

    @property
    def open_connections(self) -> int:
        """Connections of applications, relayed ones included."""
        return len(self._connections) + len(relays_of(self.loop))

    # what connections tell

    def direct_hit(self) -> None:
        """A connection that no connect hook led here."""
        self._stats.verdict(Reason.NO_ORIGIN)

    def cut(self, connection: Connection) -> None:
        """The drain is over, and what it cut there is in no record."""
        self._stats.verdict(Reason.DRAINING, self._connections[connection])

    def opened(self, connection: Connection) -> None:
        route = connection.route
        service = self._connections[connection] = route.service if route is not None else ""
        self._stats.opened("outbound", connection.origin.workload, service, "proxy")

    def closed(self, connection: Connection) -> None:
        service = self._forget(connection)
        if service is not None:
            self._stats.closed(service, "proxy")

    def _forget(self, connection: Connection) -> str | None:
        service = self._connections.pop(connection, None)
        if self._idle is not None and not self._connections:
            self._idle.set()
        return service

    def attempt(self, service: str, endpoint: str, outcome: str) -> None:
        self._stats.attempt(service, endpoint, outcome)

    def relay(self, connection: Connection, route: Route, initial: bytes) -> None:
        """Hand a connection to the TCP relay, for a port that is not HTTP or a caller that speaks HTTP/2."""
        counted, origin = self._forget(connection), connection.origin
        record = Record(route.service, self.wall(), origin.workload, connection.remote)
        tried: Target | None = None

        def pick() -> Target | None:
            nonlocal tried
            tried = route.balancer_for(record.requested_server_name).pick(self.rnd, tried) or tried
            return tried

        def attempted(host: object, outcome: str) -> None:
            assert isinstance(host, Target)
            self._stats.attempt(route.service, host.label, outcome)

        def ended(record: Record) -> None:
            if route.http and record.reason is None:
                record.reason = Reason.HTTP2_NOT_YET.word
            if counted is not None:
                self._stats.closed(counted, "proxy")
            self.sink(record)

        Relay(
            self.poller,
            connection.transport,
            pick=pick,
            make_socket=self.make_socket,
            netns=origin.netns,
            record=record,
            sink=ended,
            policy=route.policy,
            initial=initial,
            eof=connection.eof,
            attempted=attempted,
            hello=Hello() if route.protocol is Protocol.TLS else None,
        )
