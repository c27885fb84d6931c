"""Relays a TCP connection to an endpoint and back, byte for byte: `tcp` ports in proxy mode, and tunnels.

What one side does the other side sees: data (with back-pressure, at most HIGH_WATER plus one read, 256 KiB, per
direction in memory), half-close, reset. The endpoint is dialled before the caller has said anything, because in many
protocols the server speaks first; only on a `tls` port the caller's hello is read first (`hello`), and passed on as it
came. Nothing is decided here: `pick` names the endpoint, the policy holds the times, the Record says what came of it
and goes to `sink` exactly once. Idle connections, and callers that stay silent, are found by `relays`.
Measured: a BufferedProtocol costs a third more CPU per byte here, because what it read must be copied to be passed on.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, Protocol, cast

from meshbpf.model import ServicePolicy
from meshbpf.reason import Reason
from meshbpf.record import Record
from meshbpf.tasks import spawn
from userspace_proxy.hello import Found, Hello
from userspace_proxy.limits import DEFAULT_LIMITS
from userspace_proxy.poller import Poller
from userspace_proxy.relays import relays_of
from userspace_proxy.stats import endpoint_label
from userspace_proxy.wire import reset, waiting

HIGH_WATER = 64 * 1024
ATTEMPTS = 2
FLUSH, HELLO_TIMEOUT = DEFAULT_LIMITS.flush, DEFAULT_LIMITS.hello_timeout
# What a hello was that gave no name: passed on all the same, because the endpoint's own answer tells the caller more.
NAMELESS = {
    Found.NO_NAME: Reason.SNI_MISSING,
    Found.NOT_TLS: Reason.NOT_TLS,
    Found.TOO_LARGE: Reason.HELLO_TOO_LARGE,
}


class Host(Protocol):
    """What a relay needs to know of an endpoint; `active` is counted up while it is dialled or connected."""

    address: str
    port: int
    active: int


class State(Enum):
    GREETING = auto()  # the caller's hello is not whole yet
    DIALLING = auto()
    RELAYING = auto()
    CLOSED = auto()


class Side(asyncio.Protocol):
    """One of the two connections: what it receives goes to `other`."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.other: Side = self  # the relay sets it
        self.transport: asyncio.Transport | None = None
        self.received = 0
        self.ended = False  # the peer has sent FIN
        self.gone = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=HIGH_WATER)
        self.relay.made(self)

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        if self.other.transport is not None:
            self.other.transport.write(data)
        else:
            self.relay.early(data)

    def eof_received(self) -> bool:
        self.ended = True
        self.relay.half_closed(self)
        return True  # keep the transport: the other direction lives on

    def pause_writing(self) -> None:
        if self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        other = self.other
        if other.transport is not None and not other.ended and not other.transport.is_closing():
            other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = True
        self.relay.lost(self, exc)

    def reset(self) -> None:
        """Close by RST: the peer learns that the stream was cut, which a FIN would hide."""
        if self.transport is not None:
            reset(self.transport)


class Relay:
    """One relayed connection. Made by `relay`; ends by itself, or by `close`."""

    def __init__(
        self,
        poller: Poller,
        *,
        pick: Callable[[], Host | None],
        make_socket: Callable[[Any, int], socket.socket],
        netns: Any,
        record: Record,
        sink: Callable[[Record], None],
        policy: ServicePolicy,
        initial: bytes,
        attempted: Callable[[Host, str], None] | None,
        hello: Hello | None,
    ) -> None:
        self._poller = poller
        self._loop = poller.loop
        self._pick = pick
        self._make_socket = make_socket
        self._netns = netns
        self._record = record
        self._sink = sink
        self._policy = policy
        self._initial = initial
        self._attempted = attempted
        self._hello = hello
        self._nameless: Reason | None = None
        self._host: Host | None = None
        self._started = time.monotonic()  # not loop.time(): uvloop's is in whole milliseconds
        self._dialling: asyncio.Task[None] | None = None
        self.state = State.DIALLING if hello is None else State.GREETING
        self.down, self.up = Side(self), Side(self)
        self.down.other, self.up.other = self.up, self.down
        self.quiet_since = self._loop.time()  # while greeting, since the caller came: dripping is no excuse
        self.seen = (0, 0)  # `moved` at the last sweep

    @property
    def moved(self) -> tuple[int, int]:
        """All bytes that came, and those that are still to be sent."""
        unsent = [waiting(side.transport) for side in (self.down, self.up) if side.transport is not None]
        return self.down.received + self.up.received, sum(unsent)

    @property
    def idle_timeout(self) -> float:
        """How long nothing may move; 0: for ever, which what is only to be sent may not."""
        idle = self._policy.connection_pool.tcp.idle_timeout
        transports = (self.down.transport, self.up.transport)
        if all(transport is not None and transport.is_closing() for transport in transports):
            return min(idle, FLUSH) if idle else FLUSH
        return idle

    @property
    def dialling(self) -> bool:
        return self.state is State.DIALLING

    def late(self, now: float) -> Reason | None:
        """Why this is to be ended at the sweep of `now`, if it is."""
        if self.state is State.GREETING:
            return Reason.HELLO_TIMEOUT if now - self.quiet_since >= HELLO_TIMEOUT else None
        moved = self.moved
        if moved != self.seen or self.dialling:
            self.seen, self.quiet_since = moved, now
        elif self.idle_timeout and now - self.quiet_since >= self.idle_timeout:
            return Reason.IDLE_TIMEOUT
        return None

    def start(self, downstream: asyncio.Transport, eof: bool) -> None:
        self.down.received = len(self._initial)
        self.down.ended = eof
        downstream.set_protocol(self.down)
        self.down.connection_made(downstream)
        if self._hello is None or self._hello.feed(self._initial) is not None or eof:
            self._begin()
        if self.dialling and (self._initial or eof):
            downstream.pause_reading()
        else:
            downstream.resume_reading()

    def _begin(self) -> None:
        """Dial: the caller's hello has been read, or can be no more, or is none of our business."""
        self.state = State.DIALLING
        hello = self._hello
        if hello is not None:
            self._record.requested_server_name = hello.name
            self._nameless = Reason.HELLO_CUT if hello.found is None else NAMELESS.get(hello.found)
        self._dialling = spawn(self._run(), "relay")
        self._dialling.add_done_callback(self._dialled)

    async def _run(self) -> None:
        upstream = await self._dial()
        if upstream is not None:
            self._poller.connected(upstream, self.up)

    def _dialled(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:  # a bug, which spawn logs: the caller must not hang
            self._fail(Reason.CONNECT_FAILED, "UF")

    async def _dial(self) -> socket.socket | None:
        """A connected socket; None when no endpoint took it, and then everything is closed and told."""
        reason, flags = Reason.NO_HEALTHY_UPSTREAM, "UH"
        failed: list[Host] = []
        for _ in range(ATTEMPTS):
            host = self._another(failed)
            if host is None:
                break
            if failed and self._attempted is not None:
                self._attempted(failed[-1], reason.word)
            self._host = host
            host.active += 1
            self._record.attempts += 1
            self._record.upstream_host = endpoint_label(host.address, host.port)
            outcome = await self._connect(host)
            if isinstance(outcome, socket.socket):
                self._record.endpoint_outcome = "ok"
                return outcome
            reason, flags = outcome, "UF"
            self._record.endpoint_outcome = reason.word
            self._release()
            failed.append(host)
        self._fail(reason, flags)
        return None

    def _another(self, failed: list[Host]) -> Host | None:
        """An endpoint that has not just failed. Balancers may name the same one twice, so a few are asked for."""
        for _ in range(1 if not failed else 4):
            host = self._pick()
            if host is None or host not in failed:
                return host
        return None

    async def _connect(self, host: Host) -> socket.socket | Reason:
        family = socket.AF_INET6 if ":" in host.address else socket.AF_INET
        try:
            sock = self._make_socket(self._netns, family)
        except OSError:  # the caller's namespace is gone, or no descriptor is left
            return Reason.CONNECT_FAILED
        connected = False
        try:
            sock.setblocking(False)
            async with asyncio.timeout(self._policy.connection_pool.tcp.connect_timeout or None):
                await self._loop.sock_connect(sock, (host.address, host.port))
            connected = True
        except TimeoutError:
            return Reason.CONNECT_TIMEOUT
        except OSError:
            return Reason.CONNECT_FAILED
        finally:
            if not connected:
                sock.close()
        return sock

    def made(self, side: Side) -> None:
        """`side` has its transport. The caller's is read at once, so that its leaving ends the dial."""
        if self.state is State.CLOSED:
            side.reset()
            return
        down, up = self.down.transport, self.up.transport
        if down is None or up is None:
            return
        self.state = State.RELAYING
        if self._initial:
            up.write(self._initial)
            self._initial = b""
        if down.get_write_buffer_size() > HIGH_WATER:  # a transport taken over full; its resume_writing will come
            up.pause_reading()
        if self.down.ended:
            up.write_eof()
        elif up.get_write_buffer_size() <= HIGH_WATER:
            down.resume_reading()

    def early(self, data: bytes) -> None:
        """The caller spoke before the endpoint is there: keep its hello and one read, then it has to wait."""
        assert self.down.transport is not None
        self._initial += data
        if self.state is State.GREETING:
            assert self._hello is not None
            if self._hello.feed(data) is None:
                return
            self._begin()
        self.down.transport.pause_reading()

    def half_closed(self, side: Side) -> None:
        if self.state is State.GREETING:
            self._begin()
        other = side.other
        if other.transport is None or other.transport.is_closing():
            return
        if other.ended:  # both have: nothing more can come, what is buffered is still sent
            for each in (side, other):
                if each.transport is not None:
                    each.transport.close()
        else:
            other.transport.write_eof()

    def lost(self, side: Side, error: Exception | None) -> None:
        if error is not None and self.state is not State.CLOSED and self._record.reason is None:
            if side is self.up:
                # Resetting what is no TLS, an endpoint does right: the caller's fault is the reason.
                sound = self._nameless in (None, Reason.SNI_MISSING)
                self._tell(Reason.UPSTREAM_RESET if sound else self._nameless, "UC")
                self._record.endpoint_outcome = Reason.UPSTREAM_RESET.word
            else:
                self._tell(Reason.DOWNSTREAM_CLOSED, "DC")
        other = side.other
        if error is not None or self.state is State.DIALLING:
            other.reset()
        if other.gone or other.transport is None:
            self._end()

    def close(self, reason: Reason) -> None:
        """End it now. A stream that is at rest ends by FIN, a cut one by RST."""
        self._tell(reason, None)
        sides = (self.down, self.up)
        silent = self.state is State.GREETING and not self._initial
        at_rest = silent or all(
            side.transport is not None and side.transport.get_write_buffer_size() == 0 for side in sides
        )
        for side in sides:
            if not at_rest or side.transport is None:
                side.reset()
            else:
                side.transport.close()
        if self.down.transport is None:
            self._end()

    def _fail(self, reason: Reason, flags: str) -> None:
        self._tell(reason, flags)
        self.down.reset()
        if self.down.transport is None:
            self._end()

    def _tell(self, reason: Reason | None, flags: str | None) -> None:
        if reason is not None and self._record.reason is None:
            self._record.reason = reason.word
            self._record.response_flags = flags

    def _release(self) -> None:
        if self._host is not None:
            self._host.active -= 1
            self._host = None

    def _end(self) -> None:
        if self.state is State.CLOSED:
            return
        dialled = self.state is State.DIALLING
        self.state = State.CLOSED
        self._release()
        relays_of(self._loop).discard(self)
        if dialled and self._dialling is not None and self._dialling is not asyncio.current_task(self._loop):
            self._dialling.cancel()
        record = self._record
        self._tell(self._nameless, None)
        record.bytes_received, record.bytes_sent = self.down.received, self.up.received
        record.duration_ms = (time.monotonic() - self._started) * 1000.0
        self._sink(record)


def relay(
    poller: Poller,
    downstream: asyncio.Transport,
    *,
    pick: Callable[[], Host | None],
    make_socket: Callable[[Any, int], socket.socket],
    netns: Any,
    record: Record,
    sink: Callable[[Record], None],
    policy: ServicePolicy,
    initial: bytes = b"",
    eof: bool = False,
    attempted: Callable[[Host, str], None] | None = None,
    hello: Hello | None = None,
) -> Relay:
    """Relay `downstream`, which is taken over from its protocol, to an endpoint.

    `initial` is what was already read from it, `eof` that its FIN was; `sink` gets the record at the end; `attempted`
    is told of an endpoint that failed (connect_failed, connect_timeout) when another one is tried: the record names
    only the last. `make_socket` is called with `netns` and an address family. With `hello`, the endpoint is picked and
    dialled when that is read, and the record has the server's name by then.
    """
    record.protocol = "TCP"
    made = Relay(
        poller,
        pick=pick,
        make_socket=make_socket,
        netns=netns,
        record=record,
        sink=sink,
        policy=policy,
        initial=initial,
        attempted=attempted,
        hello=hello,
    )
    relays_of(poller.loop).add(made)
    made.start(downstream, eof)
    return made
