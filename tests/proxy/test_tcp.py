"""The TCP relay over real sockets on loopback: what one side does, the other side sees."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import uvloop

from meshbpf.model import ConnectionPool, ServicePolicy, TcpPool
from meshbpf.reason import Reason
from meshbpf.record import Record
from userspace_proxy.hello import Hello
from userspace_proxy.poller import Poller
from userspace_proxy.relays import relays_of
from userspace_proxy.side import HIGH_WATER
from userspace_proxy.tcp import Relay, State

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the policy fixture, under a newer asyncio

ONE_READ = 256 * 1024  # what asyncio and uvloop read at once


@pytest.fixture(params=["uvloop", "asyncio"])
def event_loop_policy(request: pytest.FixtureRequest) -> Any:
    return uvloop.EventLoopPolicy() if request.param == "uvloop" else asyncio.DefaultEventLoopPolicy()


@dataclass
class Endpoint:
    address: str
    port: int
    active: int = 0


def make_socket(netns: Any, family: int) -> socket.socket:
    assert netns == "here"
    return socket.socket(family, socket.SOCK_STREAM)


def listener(address: str = "127.0.0.1", backlog: int = 16) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    sock.bind((address, 0))
    sock.listen(backlog)
    sock.setblocking(False)
    return sock


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Taken(asyncio.Protocol):
    """A connection that is relayed from its first byte on, as `Downstream` does it."""

    made: Relay

    def __init__(self, relay: Callable[[asyncio.Transport], Relay]) -> None:
        self._relay = relay

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.made = self._relay(cast(asyncio.Transport, transport))


@dataclass
class Harness:
    poller: Poller
    front: socket.socket
    server: socket.socket
    endpoint: Endpoint
    records: asyncio.Queue[Record] = field(default_factory=asyncio.Queue)
    failed: list[tuple[Any, str]] = field(default_factory=list)
    opened: list[socket.socket] = field(default_factory=list)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    async def dial(
        self, hosts: list[Endpoint | None] | None = None, policy: ServicePolicy | None = None, **more: Any
    ) -> tuple[socket.socket, Relay]:
        client = socket.socket()
        client.setblocking(False)
        await self.loop.sock_connect(client, self.front.getsockname())
        accepted, _ = await self.loop.sock_accept(self.front)
        self.opened.append(client)
        taken = Taken(lambda transport: self.relay(transport, hosts, policy, **more))
        self.poller.connected(accepted, taken)
        return client, taken.made

    def relay(
        self,
        downstream: asyncio.Transport,
        hosts: list[Endpoint | None] | None = None,
        policy: ServicePolicy | None = None,
        **more: Any,
    ) -> Relay:
        turn: Iterator[Endpoint | None] = iter(hosts) if hosts is not None else iter([self.endpoint])
        options: dict[str, Any] = {
            "pick": lambda: next(turn, None),
            "make_socket": make_socket,
            "netns": "here",
            "record": Record("db", 1.0, "web.service", "127.0.0.1:1"),
            "sink": self.records.put_nowait,
            "policy": policy or ServicePolicy(),
            "attempted": lambda host, outcome: self.failed.append((host, outcome)),
        }
        return Relay(self.poller, downstream, **(options | more))

    async def accept(self) -> socket.socket:
        sock, _ = await asyncio.wait_for(self.loop.sock_accept(self.server), 5)
        self.opened.append(sock)
        return sock

    async def pair(self, **more: Any) -> tuple[socket.socket, socket.socket, Relay]:
        client, made = await self.dial(**more)
        return client, await self.accept(), made

    async def read(self, sock: socket.socket, size: int = 65536) -> bytes:
        return await asyncio.wait_for(self.loop.sock_recv(sock, size), 5)

    async def read_all(self, sock: socket.socket) -> bytes:
        got = b""
        while more := await self.read(sock):
            got += more
        return got

    async def ended(self) -> Record:
        return await asyncio.wait_for(self.records.get(), 5)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


@pytest.fixture
async def harness() -> AsyncIterator[Harness]:
    front, server = listener(), listener()
    made = Harness(Poller(asyncio.get_running_loop()), front, server, Endpoint(*server.getsockname()))
    yield made
    for sock in (front, server, *made.opened):
        sock.close()
    relays = relays_of(asyncio.get_running_loop())
    relays.close()
    await until(lambda: not relays)
    assert made.endpoint.active == 0
    assert made.records.empty()  # exactly one record per connection


async def test_the_server_may_speak_first(harness: Harness) -> None:
    client, server, _ = await harness.pair()
    await harness.loop.sock_sendall(server, b"220 ready\r\n")
    assert await harness.read(client) == b"220 ready\r\n"
    await harness.loop.sock_sendall(client, b"QUIT\r\n")
    assert await harness.read(server) == b"QUIT\r\n"
    assert harness.endpoint.active == 1
    server.close()
    assert await harness.read(client) == b""
    client.close()
    record = await harness.ended()
    assert (record.protocol, record.response_code, record.response_flags, record.reason) == ("TCP", 0, None, None)
    assert (record.bytes_received, record.bytes_sent, record.attempts) == (6, 11, 1)
    assert record.upstream_host == f"127.0.0.1:{harness.endpoint.port}"
    assert record.endpoint_outcome == "ok"
    assert record.duration_ms > 0


async def test_the_caller_may_half_close(harness: Harness) -> None:
    client, server, _ = await harness.pair()
    await harness.loop.sock_sendall(client, b"question")
    client.shutdown(socket.SHUT_WR)
    assert await harness.read_all(server) == b"question"
    await harness.loop.sock_sendall(server, b"answer after the end")
    assert await harness.read(client) == b"answer after the end"
    server.close()
    assert await harness.read(client) == b""
    assert (await harness.ended()).reason is None


async def test_the_endpoint_may_half_close(harness: Harness) -> None:
    client, server, _ = await harness.pair()
    await harness.loop.sock_sendall(server, b"bye")
    server.shutdown(socket.SHUT_WR)
    assert await harness.read_all(client) == b"bye"
    await harness.loop.sock_sendall(client, b"still here")
    assert await harness.read(server) == b"still here"
    client.close()
    assert await harness.read(server) == b""
    record = await harness.ended()
    assert (record.bytes_received, record.bytes_sent, record.reason) == (10, 3, None)


async def test_a_reset_of_the_caller_reaches_the_endpoint(harness: Harness) -> None:
    client, server, _ = await harness.pair()
    await harness.loop.sock_sendall(client, b"x")
    await harness.read(server)
    reset(client)
    with pytest.raises(ConnectionResetError):
        await harness.read(server)
    record = await harness.ended()
    assert (record.reason, record.response_flags, record.endpoint_outcome) == ("downstream_closed", "DC", "ok")


async def test_a_reset_of_the_endpoint_reaches_the_caller(harness: Harness) -> None:
    client, server, _ = await harness.pair()
    await harness.loop.sock_sendall(client, b"x")
    await harness.read(server)
    reset(server)
    with pytest.raises(ConnectionResetError):
        await harness.read(client)
    record = await harness.ended()
    assert (record.reason, record.response_flags, record.endpoint_outcome) == ("upstream_reset", "UC", "upstream_reset")


@pytest.mark.parametrize("towards", ["server", "client"])
async def test_a_stalled_reader_stops_the_writer_in_bounded_memory(harness: Harness, towards: str) -> None:
    client, server, made = await harness.pair()
    await until(lambda: made.state is State.RELAYING)
    writer, reader = (client, server) if towards == "server" else (server, client)
    near, far = (made.down, made.up) if towards == "server" else (made.up, made.down)
    assert near.transport is not None
    assert far.transport is not None
    near_transport, far_transport = near.transport, far.transport
    block = os.urandom(1 << 20)
    sent = hashlib.sha256()

    async def send() -> None:
        for _ in range(64):
            sent.update(block)
            await harness.loop.sock_sendall(writer, block)
        writer.shutdown(socket.SHUT_WR)

    sending = asyncio.ensure_future(send())
    await until(lambda: not near_transport.is_reading())
    assert not sending.done()
    assert near.received < 64 << 20
    got, size, most = hashlib.sha256(), 0, 0
    while more := await harness.read(reader, 1 << 18):
        got.update(more)
        size += len(more)
        most = max(most, far_transport.get_write_buffer_size())
    await sending
    assert size == 64 << 20
    assert got.digest() == sent.digest()
    assert most <= HIGH_WATER + ONE_READ
    reader.close()
    assert (await harness.ended()).reason is None


async def test_a_refused_endpoint_is_followed_by_another(harness: Harness) -> None:
    dead = listener()
    refusing = Endpoint(*dead.getsockname())
    dead.close()
    client, server, _ = await harness.pair(hosts=[refusing, refusing, harness.endpoint])
    await harness.loop.sock_sendall(client, b"hello")
    assert await harness.read(server) == b"hello"
    client.close()
    server.close()
    record = await harness.ended()
    assert record.attempts == 2
    assert record.upstream_host == f"127.0.0.1:{harness.endpoint.port}"
    assert record.endpoint_outcome == "ok"
    assert harness.failed == [(refusing, "connect_failed")]
    assert refusing.active == 0


async def test_two_refusals_reset_the_caller(harness: Harness) -> None:
    ports = [listener(), listener()]
    hosts: list[Endpoint | None] = [Endpoint(*sock.getsockname()) for sock in ports]
    for sock in ports:
        sock.close()
    client, _ = await harness.dial(hosts=hosts)
    with pytest.raises(ConnectionResetError):
        await harness.read(client)
    record = await harness.ended()
    assert (record.reason, record.response_flags, record.attempts) == ("connect_failed", "UF", 2)
    assert record.endpoint_outcome == "connect_failed"
    assert harness.failed == [(hosts[0], "connect_failed")]


async def test_no_endpoint_at_all_resets_the_caller(harness: Harness) -> None:
    client, _ = await harness.dial(hosts=[])
    with pytest.raises(ConnectionResetError):
        await harness.read(client)
    record = await harness.ended()
    assert (record.reason, record.response_flags, record.attempts) == ("no_healthy_upstream", "UH", 0)
    assert record.upstream_host is None


async def test_an_endpoint_that_does_not_answer_times_out(harness: Harness) -> None:
    deaf = listener(backlog=0)
    fill = socket.create_connection(deaf.getsockname())  # the backlog is full: further SYNs are dropped
    policy = ServicePolicy(connection_pool=ConnectionPool(TcpPool(connect_timeout=0.05)))
    deaf_host = Endpoint(*deaf.getsockname())
    client, server, _ = await harness.pair(hosts=[deaf_host, harness.endpoint], policy=policy)
    assert harness.failed == [(deaf_host, "connect_timeout")]
    client.close()
    server.close()
    await harness.ended()
    client, _ = await harness.dial(hosts=[deaf_host], policy=policy)
    with pytest.raises(ConnectionResetError):
        await harness.read(client)
    record = await harness.ended()
    assert (record.reason, record.response_flags) == ("connect_timeout", "UF")
    fill.close()
    deaf.close()


async def test_a_socket_that_cannot_be_made_is_a_failed_connect(harness: Harness) -> None:
    def broken(netns: Any, family: int) -> socket.socket:
        raise OSError("the namespace is gone")

    client, _ = await harness.dial(make_socket=broken)
    with pytest.raises(ConnectionResetError):
        await harness.read(client)
    assert (await harness.ended()).reason == "connect_failed"


async def test_a_bug_in_pick_does_not_leave_the_caller_hanging(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise LookupError("a bug")

    client, _ = await harness.dial(pick=broken)
    with pytest.raises(ConnectionResetError):
        await harness.read(client)
    assert (await harness.ended()).response_flags == "UF"
    assert "a bug" in caplog.text


async def test_an_idle_connection_is_closed_by_the_sweep(harness: Harness) -> None:
    client, server, made = await harness.pair()
    await harness.loop.sock_sendall(client, b"x")
    await harness.read(server)
    relays = relays_of(harness.loop)
    now = harness.loop.time()
    relays.tick(now)
    await harness.loop.sock_sendall(server, b"y")
    await harness.read(client)
    relays.tick(now + 3599)  # a byte has moved since
    relays.tick(now + 3599 + 3598)
    assert made.state is State.RELAYING
    relays.tick(now + 3599 + 3601)
    assert await harness.read(client) == b""
    assert await harness.read(server) == b""
    record = await harness.ended()
    assert (record.reason, record.response_flags) == ("idle_timeout", None)
    assert not relays


async def test_the_sweep_runs_by_itself(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("userspace_proxy.relays.SWEEP_EVERY", 0.01)
    policy = ServicePolicy(connection_pool=ConnectionPool(TcpPool(idle_timeout=0.05)))
    client, _, _ = await harness.pair(policy=policy)
    assert await harness.read(client) == b""
    assert (await harness.ended()).reason == "idle_timeout"


async def test_a_drain_cuts_streams_visibly(harness: Harness) -> None:
    client, server, made = await harness.pair()
    await until(lambda: made.state is State.RELAYING)
    filler = asyncio.ensure_future(harness.loop.sock_sendall(client, bytes(16 << 20)))
    await until(lambda: made.down.transport is not None and not made.down.transport.is_reading())
    relays_of(harness.loop).close()
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        await filler
    with pytest.raises(ConnectionResetError):
        await harness.read_all(server)
    assert (await harness.ended()).reason == "draining"


async def test_a_caller_that_leaves_while_dialling_ends_the_dial(harness: Harness) -> None:
    deaf = listener(backlog=0)
    fill = socket.create_connection(deaf.getsockname())
    host = Endpoint(*deaf.getsockname())
    client, _ = await harness.dial(hosts=[host])
    await until(lambda: host.active == 1)
    reset(client)
    record = await harness.ended()
    assert (record.reason, record.response_flags) == ("downstream_closed", "DC")
    assert host.active == 0
    fill.close()
    deaf.close()


async def test_what_the_caller_says_while_dialling_is_kept_in_order(harness: Harness) -> None:
    deaf = listener(backlog=0)
    fill = socket.create_connection(deaf.getsockname())
    host = Endpoint(*deaf.getsockname())
    client, made = await harness.dial(hosts=[host])
    await until(lambda: host.active == 1)
    words = [b"%06d" % number for number in range(50_000)]
    sending = asyncio.ensure_future(harness.loop.sock_sendall(client, b"".join(words)))
    await until(lambda: made.down.received > 0)
    held = made.down.received
    assert held <= ONE_READ
    (await harness.loop.sock_accept(deaf))[0].close()  # `fill` leaves the backlog: the dial's next SYN gets through
    server, _ = await asyncio.wait_for(harness.loop.sock_accept(deaf), 5)
    harness.opened.append(server)
    got = b""
    while len(got) < 300_000:
        got += await harness.read(server)
    await sending
    assert got == b"".join(words)
    client.close()
    server.close()
    await harness.ended()
    fill.close()
    deaf.close()


async def test_a_drain_while_dialling_ends_the_connection(harness: Harness) -> None:
    deaf = listener(backlog=0)
    fill = socket.create_connection(deaf.getsockname())
    host = Endpoint(*deaf.getsockname())
    client, made = await harness.dial(hosts=[host])
    await until(lambda: host.active == 1)
    made.close(Reason.DRAINING)
    with pytest.raises(ConnectionResetError):
        await harness.read(client)
    assert (await harness.ended()).reason == "draining"
    assert host.active == 0
    fill.close()
    deaf.close()


async def test_a_relay_closed_before_it_began_leaves_nothing_open(harness: Harness) -> None:
    client, made = await harness.dial()
    made.close(Reason.DRAINING)
    with pytest.raises(ConnectionResetError):
        if await harness.read(client) == b"":  # closed before there was a transport: FIN is as good, nothing was lost
            raise ConnectionResetError
    assert (await harness.ended()).reason == "draining"


async def test_a_transport_can_be_taken_over_with_what_it_has_read(harness: Harness) -> None:
    first = asyncio.get_running_loop().create_future()

    class Before(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast(asyncio.Transport, transport)

        def data_received(self, data: bytes) -> None:
            harness.relay(self.transport, initial=data)
            first.set_result(data)

    client = socket.socket()
    client.setblocking(False)
    await harness.loop.sock_connect(client, harness.front.getsockname())
    accepted, _ = await harness.loop.sock_accept(harness.front)
    harness.poller.connected(accepted, Before())
    await harness.loop.sock_sendall(client, b"PRI * HTTP/2.0\r\n")
    await asyncio.wait_for(first, 5)
    server = await harness.accept()
    await harness.loop.sock_sendall(client, b"more")
    client.shutdown(socket.SHUT_WR)
    assert await harness.read_all(server) == b"PRI * HTTP/2.0\r\nmore"
    server.close()
    assert await harness.read(client) == b""
    client.close()
    assert (await harness.ended()).bytes_received == 20


async def test_a_half_close_seen_before_the_takeover_is_passed_on(harness: Harness) -> None:
    client, server, _ = await harness.pair(initial=b"all of it", eof=True)
    assert await harness.read_all(server) == b"all of it"
    await harness.loop.sock_sendall(server, b"answer")
    server.close()
    assert await harness.read_all(client) == b"answer"
    assert (await harness.ended()).bytes_received == 9


@pytest.mark.parametrize(("size", "reason"), [(2, "hello_cut"), (9, "not_tls")])
async def test_a_hello_that_ended_before_the_takeover_is_passed_on(harness: Harness, size: int, reason: str) -> None:
    said = b"\x16\3\1\0\4\2\0\0\0"[:size]
    client, server, _ = await harness.pair(initial=said, eof=True, hello=Hello())
    assert await harness.read_all(server) == said
    server.close()
    assert await harness.read_all(client) == b""
    assert (await harness.ended()).reason == reason


async def test_ipv6_endpoints_are_dialled_as_such(harness: Harness) -> None:
    try:
        six = listener("::1")
    except OSError as error:
        pytest.skip(f"no IPv6 loopback: {error}")
    host = Endpoint("::1", six.getsockname()[1])
    client, _ = await harness.dial(hosts=[host])
    server, _ = await harness.loop.sock_accept(six)
    server.close()
    assert await harness.read(client) == b""
    client.close()
    assert (await harness.ended()).upstream_host == f"[::1]:{host.port}"
    six.close()
