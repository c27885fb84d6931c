"""Relays a TCP connection to an endpoint and back, byte for byte: `tcp` and `tls` ports in proxy mode, and HTTP/2.

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
from typing import Any

from meshbpf.model import ServicePolicy
from meshbpf.reason import Reason
from meshbpf.record import Record
from meshbpf.tasks import spawn
from userspace_proxy.dial import Host, dial
from userspace_proxy.hello import Found, Hello
from userspace_proxy.poller import Poller
from userspace_proxy.relays import relays_of
from userspace_proxy.side import HIGH_WATER, Side

# What a hello was that gave no name: passed on all the same, because the endpoint's own answer tells the caller more.
NAMELESS = {
    Found.NO_NAME: Reason.SNI_MISSING,
    Found.NOT_TLS: Reason.NOT_TLS,
    Found.TOO_LARGE: Reason.HELLO_TOO_LARGE,
}


class State(Enum):
    GREETING = auto()  # the caller's hello is not whole yet
    DIALLING = auto()
    RELAYING = auto()
    CLOSED = auto()


class Relay:
    """One relayed connection: `downstream` is taken over from its protocol. Ends by itself, or by `close`.

    `initial` is what was already read from it, `eof` that its FIN was; `sink` gets the record at the end; `attempted`
    is told of an endpoint that failed (connect_failed, connect_timeout) when another one is tried: the record names
    only the last. `make_socket` is called with `netns` and an address family. With `hello`, the endpoint is picked and
    dialled when that is read, and the record has the server's name by then.
    """

    def __init__(
        self,
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
    ) -> None:
        record.protocol = "TCP"
        self._poller = poller
        self.loop = poller.loop
        self.pick = pick
        self.make_socket = make_socket
        self.netns = netns
        self.record = record
        self._sink = sink
        self.policy = policy
        self._initial = initial
        self.attempted = attempted
        self._hello = hello
        self._nameless: Reason | None = None
        self.host: Host | None = None
        self._started = time.monotonic()  # not loop.time(): uvloop's is in whole milliseconds
        self._dialling: asyncio.Task[None] | None = None
        self.state = State.DIALLING if hello is None else State.GREETING
        self.down, self.up = Side(self), Side(self)
        self.down.other, self.up.other = self.up, self.down
        self.quiet_since = self.loop.time()  # while greeting, since the caller came: dripping is no excuse
        self.seen = (0, 0)  # how far it was at the last sweep
        relays_of(self.loop).add(self)
        self._start(downstream, eof)

    @property
    def greeting(self) -> bool:
        return self.state is State.GREETING

    @property
    def dialling(self) -> bool:
        return self.state is State.DIALLING

    def _start(self, downstream: asyncio.Transport, eof: bool) -> None:
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
            self.record.requested_server_name = hello.name
            self._nameless = Reason.HELLO_CUT if hello.found is None else NAMELESS.get(hello.found)
        self._dialling = spawn(self._run(), "relay")
        self._dialling.add_done_callback(self._dialled)

    async def _run(self) -> None:
        outcome = await dial(self)
        if isinstance(outcome, Reason):
            self._fail(outcome)
        else:
            self._poller.connected(outcome, self.up)

    def _dialled(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:  # a bug, which spawn logs: the caller must not hang
            self._fail(Reason.CONNECT_FAILED)

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
        if self.greeting:
            assert self._hello is not None
            if self._hello.feed(data) is None:
                return
            self._begin()
        self.down.transport.pause_reading()

    def half_closed(self, side: Side) -> None:
        if self.greeting:
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
        if error is not None and self.state is not State.CLOSED and self.record.reason is None:
            if side is self.up:
                # Resetting what is no TLS, an endpoint does right: the caller's fault is the reason.
                sound = self._nameless in (None, Reason.SNI_MISSING)
                self._tell(Reason.UPSTREAM_RESET if sound else self._nameless, "UC")
                self.record.endpoint_outcome = Reason.UPSTREAM_RESET.word
            else:
                self._tell(Reason.DOWNSTREAM_CLOSED, "DC")
        other = side.other
        if error is not None or self.dialling:
            other.reset()
        if other.gone or other.transport is None:
            self._end()

    def close(self, reason: Reason) -> None:
        """End it now. A stream that is at rest ends by FIN, a cut one by RST."""
        self._tell(reason, None)
        sides = (self.down, self.up)
        silent = self.greeting and not self._initial
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

    def _fail(self, reason: Reason) -> None:
        """No endpoint took it: everything is closed and told."""
        self._tell(reason, "UH" if reason is Reason.NO_HEALTHY_UPSTREAM else "UF")
        self.down.reset()
        if self.down.transport is None:
            self._end()

    def _tell(self, reason: Reason | None, flags: str | None) -> None:
        if reason is not None and self.record.reason is None:
            self.record.reason = reason.word
            self.record.response_flags = flags

    def release(self) -> None:
        if self.host is not None:
            self.host.active -= 1
            self.host = None

    def _end(self) -> None:
        if self.state is State.CLOSED:
            return
        dialled = self.dialling
        self.state = State.CLOSED
        self.release()
        relays_of(self.loop).discard(self)
        if dialled and self._dialling is not None and self._dialling is not asyncio.current_task(self.loop):
            self._dialling.cancel()
        record = self.record
        self._tell(self._nameless, None)
        record.bytes_received, record.bytes_sent = self.down.received, self.up.received
        record.duration_ms = (time.monotonic() - self._started) * 1000.0
        self._sink(record)
