"""Nothing stays for ever: answers that stall, readers that stop, ends that are not taken, drains; and what was asked
before an end is answered, what comes behind it is not."""

from __future__ import annotations

import asyncio
import socket

import pytest

from meshbpf.model import ConnectionPool, Protocol, ServicePolicy, TcpPool
from tests.proxy.bed import NETNS, OK, Bed, Peer, never, script, soon
from tests.proxy.test_mesh import SWITCH, WEBSOCKET
from userspace_proxy import relays
from userspace_proxy.downstream import Downstream
from userspace_proxy.limits import Limits
from userspace_proxy.server import Proxy

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
CLOSE = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
MIB = 2**20
QUICK = Limits(keep_alive=0.1, stream_idle=0.2, linger=0.1, flush=0.1, body_timeout=0.1, tick=0.01, drain_quiet=0.05)
BIG = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (16 * MIB) + bytes(16 * MIB)


async def forever(peer: Peer) -> None:
    await peer.head()
    await never()


async def test_an_endpoint_that_says_nothing(bed: Bed) -> None:
    await bed.serve(await bed.endpoint(forever), limits=QUICK)
    caller = await bed.caller()
    status, head, body = await caller.ask(GET)
    assert (status, body) == (504, b"stream timeout") and b"x-meshbpf-reason: stream_idle_timeout\r\n" in head
    record = await bed.record()
    assert (record.response_flags, record.reason) == ("SI", "stream_idle_timeout")
    assert record.duration_ms >= 200 and bed.route.pool.open == 0


async def test_an_endpoint_that_stops_in_its_answer(bed: Bed) -> None:
    await bed.serve(await bed.endpoint(script(BIG[:100])), limits=QUICK)
    caller = await bed.caller()
    caller.send(GET)
    with pytest.raises(ConnectionResetError):
        await caller.rest()
    record = await bed.record()
    assert (record.response_code, record.response_flags, record.reason) == (200, "SI", "stream_idle_timeout")


async def test_an_endpoint_that_does_not_take_the_body(bed: Bed) -> None:
    async def talk(peer: Peer) -> None:
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await never()

    await bed.serve(await bed.endpoint(talk), limits=QUICK)
    caller = await bed.caller()
    caller.send(b"PUT / HTTP/1.1\r\nHost: a\r\ncontent-length: %d\r\n\r\n" % (32 * MIB) + bytes(32 * MIB))
    assert (await caller.answer())[0] == 504
    assert (await bed.record()).reason == "stream_idle_timeout"


async def test_a_caller_that_stops_reading(bed: Bed) -> None:
    await bed.serve(await bed.endpoint(script(BIG)), limits=QUICK)
    caller = await bed.caller(receive_buffer=4096)
    caller.writer.transport.pause_reading()  # type: ignore[attr-defined]
    caller.send(GET)
    assert (await bed.record()).reason == "stream_idle_timeout"
    await bed.settle(lambda: bed.proxy.open_connections == 0 and bed.route.pool.open == 0)


class Clock:
    """The proxy's clock, moved by hand; for callers that come later."""

    def __init__(self, proxy: Proxy) -> None:
        self._now = proxy.clock()
        self._wheel = proxy.wheel
        proxy.clock = self._wheel._clock = lambda: self._now

    def move(self, seconds: float) -> None:
        self._now += seconds
        self._wheel._turn()


async def test_what_moves_slowly_goes_on(bed: Bed) -> None:
    endpoint = await bed.endpoint(forever)
    clock = Clock(await bed.serve(endpoint, limits=QUICK))
    caller = await bed.caller()
    caller.send(GET)
    peer = await soon(endpoint.accepted.get())
    await bed.settle(lambda: b"GET" in peer.seen)
    hint = b"HTTP/1.1 103 Early Hints\r\n\r\n"
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n"
    for piece in [hint, hint, hint, head, b"w", b"x", b"y", b"z"]:
        peer.send(piece)
        await caller.until(piece[-4:])
        clock.move(0.6 * QUICK.stream_idle)
    assert (await bed.record()).response_code == 200


async def blocked(bed: Bed) -> tuple[Peer, Downstream]:
    """A caller that does not read, and its connection, of which the kernel buffers next to nothing."""
    caller = await bed.caller(receive_buffer=4096)
    caller.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await bed.settle(lambda: len(bed.proxy._connections) == 1)
    down = next(iter(bed.proxy._connections))
    down.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return caller, down


SMALL = b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n" + bytes(100_000)


@pytest.mark.parametrize("request_", [GET, CLOSE])
async def test_an_answer_that_is_never_taken_is_given_up_when_its_connection_closes(bed: Bed, request_: bytes) -> None:
    await bed.serve(await bed.endpoint(script(SMALL)), limits=QUICK)
    caller, down = await blocked(bed)
    caller.send(request_)
    await bed.record()
    assert down.transport.get_write_buffer_size() > 0
    await bed.settle(lambda: bed.proxy.open_connections == 0)


async def test_an_answer_that_is_taken_slowly_arrives_whole_on_a_connection_that_closes(bed: Bed) -> None:
    big = 6 * MIB
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % big + bytes(big)
    await bed.serve(await bed.endpoint(script(answer)), limits=QUICK)
    caller = await bed.caller(receive_buffer=65536)
    caller.send(CLOSE)
    got = 0
    while data := await soon(caller.reader.read(65536)):
        got += len(data)
        await asyncio.sleep(0.005)
    assert got > big


async def test_an_ended_tunnel_whose_rest_nobody_takes_is_given_up(bed: Bed) -> None:
    async def talk(peer: Peer) -> None:
        await peer.head()
        peer.send(SWITCH + bytes(16 * MIB))
        await peer.reader.read()

    pool = ConnectionPool(tcp=TcpPool(idle_timeout=0.2))
    await bed.serve(await bed.endpoint(talk), policy=ServicePolicy(connection_pool=pool), limits=QUICK)
    caller = await bed.caller(receive_buffer=4096)
    caller.send(WEBSOCKET)
    await caller.head()
    caller.writer.transport.pause_reading()  # type: ignore[attr-defined]
    down = next(iter(bed.proxy._connections))
    assert (await bed.record()).reason == "idle_timeout"
    assert down.transport.get_write_buffer_size() > 0 and bed.proxy.open_connections == 1  # not forgotten
    await bed.settle(lambda: bed.proxy.open_connections == 0)
    assert down.transport.get_write_buffer_size() == 0


async def test_an_ended_relay_whose_rest_nobody_takes_is_given_up(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relays, "FLUSH", 0.1)
    monkeypatch.setattr(relays, "SWEEP_EVERY", 0.02)

    async def talk(peer: Peer) -> None:
        await gate.wait()
        peer.send(bytes(60_000))
        peer.writer.close()

    gate = asyncio.Event()
    pool = ConnectionPool(tcp=TcpPool(idle_timeout=0.0))
    endpoint = await bed.endpoint(talk)
    await bed.serve(endpoint, policy=ServicePolicy(connection_pool=pool), protocol=Protocol.TCP, limits=QUICK)
    caller = await bed.caller(receive_buffer=4096)
    caller.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await soon(endpoint.accepted.get())
    (relay,) = relays.relays_of(asyncio.get_running_loop())._relays
    assert relay.down.transport is not None
    relay.down.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    gate.set()
    caller.end()
    await bed.settle(lambda: relay.up.ended and relay.down.ended)
    assert relay.down.transport.get_write_buffer_size() > 0
    await bed.settle(lambda: bed.proxy.open_connections == 0)


async def test_an_upload_that_was_answered_early_is_not_kept_in_the_pool(bed: Bed) -> None:
    gate = asyncio.Event()

    async def talk(peer: Peer) -> None:
        await peer.head()
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        peer.send(OK)
        await gate.wait()
        peer.send(OK)
        await never()

    endpoint = await bed.endpoint(talk)
    await bed.serve(endpoint)
    caller = await bed.caller()
    await caller.ask(GET)
    upstream = bed.route.targets[0].idle[NETNS][0]
    upstream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    peer = endpoint.peers[0].writer.get_extra_info("socket")
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    caller.send(b"PUT / HTTP/1.1\r\nHost: a\r\ncontent-length: 150000\r\n\r\n" + bytes(150_000))
    down = next(iter(bed.proxy._connections))
    await bed.settle(lambda: down.exchange is not None and down.exchange.whole_request)
    assert upstream.transport.get_write_buffer_size() > 0
    gate.set()
    assert (await caller.answer())[0] == 200
    assert bed.route.pool.open == 0


async def test_a_streamed_answer_that_ends_in_a_drain_ends_its_connection(bed: Bed) -> None:
    gate = asyncio.Event()

    async def talk(peer: Peer) -> None:
        await peer.head()
        peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nab")
        await gate.wait()
        peer.send(b"cd")
        await peer.reader.read()

    await bed.serve(await bed.endpoint(talk), limits=Limits(drain_quiet=0.05))
    caller = await bed.caller()
    caller.send(GET)
    await caller.until(b"ab")
    drained = asyncio.ensure_future(bed.proxy.drain(60.0))
    await bed.settle(lambda: bed.proxy.draining)
    gate.set()
    assert await caller.rest() == b"cd"
    await soon(drained, 2.0)


async def test_an_answer_whose_rest_a_drain_cuts_is_counted_and_not_taken_for_whole(bed: Bed) -> None:
    await bed.serve(await bed.endpoint(script(SMALL)))
    caller, _down = await blocked(bed)
    caller.send(CLOSE)
    assert (await bed.record()).reason is None
    assert await soon(bed.proxy.drain(0.05)) == (0, 1)
    assert bed.stats.snapshot(0.0)["proxy_verdicts_total"] == [["orders", "draining", 1]]
    caller.writer.transport.resume_reading()  # type: ignore[attr-defined]
    with pytest.raises(ConnectionResetError):
        await caller.rest()


async def test_nothing_is_served_behind_connection_close_when_the_answer_is_there_at_once(bed: Bed) -> None:
    await bed.serve()
    caller = await bed.caller()
    caller.send(CLOSE + GET * 2)
    assert (await caller.rest()).count(b"HTTP/1.1 503 ") == 1
    await bed.record()
    assert bed.records.empty()


async def test_requests_before_a_half_close_are_served_though_the_caller_was_slow_to_read(bed: Bed) -> None:
    await bed.serve(await bed.endpoint(script(*[SMALL] * 9)))
    caller, down = await blocked(bed)
    caller.send(GET * 9)
    await bed.settle(lambda: bool(down.exchange is None and down.full and down._parked))
    caller.end()
    await bed.settle(lambda: down.eof)
    caller.writer.transport.resume_reading()  # type: ignore[attr-defined]
    assert (await caller.rest()).count(b"HTTP/1.1 200 OK") == 9


async def test_more_connections_are_made_at_once_when_the_policy_allows_them(bed: Bed) -> None:
    def policy(count: int) -> ServicePolicy:
        return ServicePolicy(connection_pool=ConnectionPool(tcp=TcpPool(max_connections=count)))

    endpoint = await bed.endpoint(forever)
    await bed.serve(endpoint, policy=policy(1))
    for _ in range(3):
        (await bed.caller()).send(GET)
    await bed.settle(lambda: bed.route.pool.pending == 2)
    bed.proxy.use(bed.mesh(endpoint, policy=policy(2)))
    await bed.settle(lambda: bed.route.pool.pending == 1)
    await bed.settle(lambda: len(endpoint.peers) == 2)


async def test_a_target_that_is_no_ascii_is_logged_as_it_was_meant(bed: Bed) -> None:
    await bed.serve(await bed.endpoint())
    caller = await bed.caller()
    for target in ("/zürich".encode(), b"/z\xfcrich"):
        assert (await caller.ask(b"GET " + target + b" HTTP/1.1\r\nHost: a\r\n\r\n"))[0] == 200
    assert (await bed.record()).path == "/zürich"
    assert (await bed.record()).path == "/z\udcfcrich"
