"""A new mesh takes over under load; what is known of endpoints lives on. Other carriers take what is not HTTP/1."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from meshbpf.model import EndpointState, Mesh, Protocol, ServicePolicy, Timeouts
from tests.proxy.bed import NETNS, OK, Bed, Peer, plain, script, soon

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
WEBSOCKET = (
    b"GET /chat HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n"
)
SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Accept: y\r\n\r\n"
)


async def test_a_mesh_swap_keeps_what_is_known_of_endpoints(bed: Bed) -> None:
    gate = asyncio.Event()

    async def talk(peer: Peer) -> None:
        while True:
            await peer.head()
            await gate.wait()
            peer.send(OK)

    one, two = await bed.endpoint(talk), await bed.endpoint()
    await bed.serve(one)
    caller = await bed.caller()
    caller.send(GET)
    await bed.settle(lambda: bed.route.targets[0].active == 1)
    target = bed.route.targets[0]
    route = bed.route
    bed.proxy.use(bed.mesh(one, two, policy=ServicePolicy(timeouts=Timeouts(request=9.0))))
    assert bed.route is route and target in bed.route.targets and target.active == 1
    assert bed.route.request == 9.0
    gate.set()
    assert (await caller.answer())[0] == 200
    await bed.settle(lambda: len(target.idle[NETNS]) == 1)
    bed.proxy.use(bed.mesh(one, two))
    assert len(target.idle[NETNS]) == 1


async def test_an_endpoint_that_left_finishes_and_gets_no_more(bed: Bed) -> None:
    gate = asyncio.Event()

    async def talk(peer: Peer) -> None:
        await peer.head()
        await gate.wait()
        peer.send(OK)
        assert await soon(peer.reader.read()) == b""  # closed: no pool keeps it

    old, new = await bed.endpoint(talk), await bed.endpoint()
    await bed.serve(old)
    busy = await bed.caller()
    busy.send(GET)
    await soon(old.accepted.get())
    bed.proxy.use(bed.mesh(new))
    other = await bed.caller()
    for _ in range(3):
        assert (await other.ask(GET))[0] == 200
    gate.set()
    assert (await busy.answer())[0] == 200
    assert len(old.peers) == 1
    await bed.settle(lambda: bed.route.pool.open == 1)


async def test_a_draining_endpoint_gets_nothing_new(bed: Bed) -> None:
    one, two = await bed.endpoint(), await bed.endpoint()
    await bed.serve(one, two)
    mesh = bed.mesh(one, two)
    service = mesh.services[0]
    endpoints = (replace(service.endpoints[0], state=EndpointState.DRAINING), service.endpoints[1])
    bed.proxy.use(Mesh(services=(replace(service, endpoints=endpoints),)))
    caller = await bed.caller()
    for _ in range(10):
        assert (await caller.ask(GET))[0] == 200
    assert not one.peers


async def test_no_request_fails_while_meshes_change(bed: Bed) -> None:
    endpoints = [await bed.endpoint() for _ in range(3)]
    await bed.serve(*endpoints)
    stop = asyncio.Event()
    served = 0

    async def load() -> None:
        nonlocal served
        caller = await bed.caller()
        while not stop.is_set():
            assert (await caller.ask(GET))[0] == 200
            served += 1

    tasks = [asyncio.ensure_future(load()) for _ in range(8)]
    for turn in range(60):
        bed.proxy.use(bed.mesh(*endpoints[turn % 3 :], endpoints[0]))
        want = served + 20
        await bed.settle(lambda want=want: served >= want)  # type: ignore[misc]
    stop.set()
    await soon(asyncio.gather(*tasks))


async def test_a_service_that_left_is_unknown_to_open_connections(bed: Bed) -> None:
    endpoint = await bed.endpoint()
    await bed.serve(endpoint)
    caller = await bed.caller()
    assert (await caller.ask(GET))[0] == 200
    mesh = bed.mesh(endpoint)
    bed.proxy.use(Mesh())
    assert (await caller.ask(GET))[0] == 404
    assert (await (await bed.caller()).ask(GET))[0] == 404
    bed.proxy.use(mesh)


async def test_websocket_becomes_a_tunnel_and_loses_nothing(bed: Bed) -> None:
    async def talk(peer: Peer) -> None:
        head = plain(await peer.head())
        assert head == (
            b"GET /chat HTTP/1.1\r\nHost: a\r\nSec-WebSocket-Key: x\r\n"
            b"connection: upgrade\r\nupgrade: websocket\r\n\r\n"
        )
        peer.send(SWITCH + b"hello")  # in one write with the head
        assert await peer.read(5) == b"early"
        peer.send(b"echo")
        assert await soon(peer.reader.read()) == b"\x00\xffraw"
        peer.send(b"bye")
        peer.writer.close()

    await bed.serve(await bed.endpoint(talk))
    caller = await bed.caller()
    caller.send(WEBSOCKET + b"early")
    assert await caller.head() == (
        b"HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: y\r\n"
        b"connection: upgrade\r\nupgrade: websocket\r\n\r\n"
    )
    assert await caller.read(9) == b"helloecho"
    assert bed.proxy.open_connections == 1 and bed.route.pool.open == 1
    caller.send(b"\x00\xffraw")
    caller.end()
    assert await caller.rest() == b"bye"
    record = await bed.record()
    assert (record.response_code, record.bytes_received, record.bytes_sent, record.reason) == (101, 10, 12, None)
    await bed.settle(lambda: bed.proxy.open_connections == 0 and bed.route.pool.open == 0)


async def test_websocket_resets_pass(bed: Bed) -> None:
    async def talk(peer: Peer) -> None:
        await peer.head()
        peer.send(SWITCH)
        with pytest.raises(ConnectionResetError):
            await peer.reader.read()

    endpoint = await bed.endpoint(talk)
    await bed.serve(endpoint)
    caller = await bed.caller()
    caller.send(WEBSOCKET)
    await caller.head()
    caller.reset()
    await bed.record()


async def test_a_tunnel_holds_back(bed: Bed) -> None:
    size = 32 * 2**20
    written = 0

    async def talk(peer: Peer) -> None:
        nonlocal written
        await peer.head()
        peer.send(SWITCH)
        for _ in range(size // 65536):
            peer.send(bytes(65536))
            await peer.writer.drain()
            written += 65536
        peer.writer.close()

    await bed.serve(await bed.endpoint(talk))
    caller = await bed.caller(receive_buffer=65536)
    caller.send(WEBSOCKET)
    await caller.head()
    caller.writer.transport.pause_reading()  # type: ignore[attr-defined]
    before = -1
    while before != written or written == 0:
        before = written
        for _ in range(300):
            await asyncio.sleep(0)
    assert written < size // 2
    caller.writer.transport.resume_reading()  # type: ignore[attr-defined]
    assert len(await caller.rest()) == size
    caller.end()
    await bed.record()


async def test_a_refused_websocket_is_an_answer_like_any_other(bed: Bed) -> None:
    await bed.serve(await bed.endpoint(script(OK, OK)))
    caller = await bed.caller()
    for _ in range(2):
        assert (await caller.ask(WEBSOCKET))[0] == 200


async def test_a_tunnel_ends_with_the_drain(bed: Bed) -> None:
    async def talk(peer: Peer) -> None:
        await peer.head()
        peer.send(SWITCH)
        await peer.reader.read()

    await bed.serve(await bed.endpoint(talk))
    caller = await bed.caller()
    caller.send(WEBSOCKET)
    await caller.head()
    await soon(bed.proxy.drain(0.1))
    assert (await bed.record()).reason == "draining"


async def test_a_tcp_port_is_relayed(bed: Bed) -> None:
    async def talk(peer: Peer) -> None:
        peer.send(b"220 hello\r\n")  # the server speaks first
        assert await peer.until(b"\n") == b"EHLO\n"
        peer.send(b"250\r\n")
        peer.writer.close()

    endpoint = await bed.endpoint(talk)
    await bed.serve(endpoint, protocol=Protocol.TCP)
    caller = await bed.caller()
    assert await caller.until(b"\r\n") == b"220 hello\r\n"
    caller.send(b"EHLO\n")
    assert await caller.rest() == b"250\r\n"
    caller.end()
    record = await bed.record()
    assert (record.protocol, record.service, record.bytes_sent, record.bytes_received) == ("TCP", "orders", 16, 5)
    assert (record.workload, record.reason) == ("shop.service", None)


async def test_http2_is_relayed_with_its_reason(bed: Bed) -> None:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

    async def talk(peer: Peer) -> None:
        assert await peer.read(len(preface) + 3) == preface + b"abc"
        peer.send(b"frames")
        peer.writer.close()

    await bed.serve(await bed.endpoint(talk))
    caller = await bed.caller()
    caller.send(preface + b"abc")
    assert await caller.rest() == b"frames"
    caller.end()
    record = await bed.record()
    assert (record.protocol, record.reason) == ("TCP", "http2_not_yet")
