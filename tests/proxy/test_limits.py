"""Time and memory have bounds: slow callers, slow readers, endless requests, shutdown."""

from __future__ import annotations

import asyncio

import pytest

from tests.proxy.bed import OK, Bed, Peer, silent, soon
from userspace_proxy.limits import Limits

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
MIB = 2**20


async def test_a_head_must_arrive_in_time(bed: Bed) -> None:
    endpoint = await bed.endpoint()
    await bed.serve(endpoint, limits=Limits(head_timeout=0.1))
    caller = await bed.caller()
    caller.send(b"GET / HTTP/1.1\r\nHo")
    answer = await caller.rest()
    assert answer.startswith(b"HTTP/1.1 408 ") and b"x-meshbpf-reason: head_timeout\r\n" in answer
    assert (await bed.record()).response_code == 408
    assert not endpoint.peers


async def test_drops_of_a_head_do_not_buy_time(bed: Bed) -> None:
    await bed.serve(await bed.endpoint(), limits=Limits(head_timeout=0.2))
    caller = await bed.caller()
    start = asyncio.get_running_loop().time()
    answer = asyncio.ensure_future(caller.rest())
    while not answer.done():
        if not caller.writer.is_closing():
            caller.send(b"x")
        await asyncio.wait([answer], timeout=0.02)
    assert answer.result().startswith(b"HTTP/1.1 408 ")
    assert asyncio.get_running_loop().time() - start < 1.0


async def test_a_body_must_go_on_arriving(bed: Bed) -> None:
    endpoint = await bed.endpoint()
    await bed.serve(endpoint, limits=Limits(body_timeout=0.1))
    caller = await bed.caller()
    caller.send(b"POST / HTTP/1.1\r\nHost: a\r\ncontent-length: 9\r\n\r\nabc")
    answer = await caller.rest()
    assert answer.startswith(b"HTTP/1.1 408 ") and b"x-meshbpf-reason: body_timeout\r\n" in answer
    record = await bed.record()
    assert (record.bytes_received, record.endpoint_outcome) == (3, None)


async def test_a_body_that_the_endpoint_does_not_take_is_not_late(bed: Bed) -> None:
    gate = asyncio.Event()

    async def talk(peer: Peer) -> None:
        await peer.head()
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await gate.wait()
        peer.writer.transport.resume_reading()  # type: ignore[attr-defined]
        await soon(peer.reader.readexactly(32 * MIB))
        peer.send(OK)

    await bed.serve(await bed.endpoint(talk), limits=Limits(body_timeout=0.3))
    caller = await bed.caller()
    caller.send(b"POST / HTTP/1.1\r\nHost: a\r\ncontent-length: %d\r\n\r\n" % (32 * MIB))
    caller.send(bytes(32 * MIB))
    await bed.settle(lambda: any(down.held for down in bed.proxy._connections))
    answer = asyncio.ensure_future(caller.answer())
    assert not (await asyncio.wait([answer], timeout=0.8))[0]
    gate.set()
    assert (await answer)[0] == 200


async def test_an_idle_connection_ends(bed: Bed) -> None:
    await bed.serve(await bed.endpoint(), limits=Limits(keep_alive=0.1))
    fresh, used = await bed.caller(), await bed.caller()
    await used.ask(GET)
    assert await fresh.rest() == b"" and await used.rest() == b""
    await bed.settle(lambda: bed.proxy.open_connections == 0)


async def test_a_busy_connection_does_not_end(bed: Bed) -> None:
    async def talk(peer: Peer) -> None:
        await peer.head()
        await asyncio.wait([asyncio.ensure_future(peer.reader.read())], timeout=0.4)
        peer.send(OK)

    await bed.serve(await bed.endpoint(talk), limits=Limits(keep_alive=0.1))
    assert (await (await bed.caller()).ask(GET))[0] == 200


async def test_a_refused_caller_may_finish_speaking_but_not_for_ever(bed: Bed) -> None:
    await bed.serve(await bed.endpoint(), limits=Limits(linger=0.1))
    caller = await bed.caller()
    caller.send(b"BAD\r\n\r\n" + bytes(MIB))
    assert (await caller.rest()).startswith(b"HTTP/1.1 400 ")  # and no reset has eaten it
    await bed.settle(lambda: bed.proxy.open_connections == 0)


def buffered(bed: Bed) -> int:
    """All bytes that the proxy holds for its connections outside the kernel."""
    total = 0
    for down in bed.proxy._connections:
        total += down.transport.get_write_buffer_size() + len(down._parked)
        if down.exchange is not None:
            total += sum(map(len, down.exchange.sent or ()))
            if down.exchange.upstream is not None:
                total += down.exchange.upstream.transport.get_write_buffer_size()
    return total


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_caller_that_does_not_read_holds_the_endpoint_back(bed: Bed, chunked: bool) -> None:
    size = 64 * MIB
    written = 0

    async def talk(peer: Peer) -> None:
        nonlocal written
        await peer.head()
        framing = b"transfer-encoding: chunked" if chunked else b"content-length: %d" % size
        peer.send(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\n")
        block = bytes(65536)
        for _ in range(size // len(block)):
            peer.send(b"10000\r\n" + block + b"\r\n" if chunked else block)
            await peer.writer.drain()
            written += len(block)
        if chunked:
            peer.send(b"0\r\n\r\n")
        await peer.reader.read()

    await bed.serve(await bed.endpoint(talk))
    caller = await bed.caller(receive_buffer=65536)
    caller.send(GET)
    await caller.head()
    caller.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await bed.settle(lambda: any(down.full for down in bed.proxy._connections))
    most, before = 0, -1
    while before != written:  # until nothing moves any more
        before = written
        for _ in range(200):
            await asyncio.sleep(0)
            most = max(most, buffered(bed))
    assert written < size // 2
    assert most < MIB
    caller.writer.transport.resume_reading()  # type: ignore[attr-defined]
    got = 0
    while got < size:
        got += len(await soon(caller.reader.read(MIB)))
        most = max(most, buffered(bed))
    assert most < MIB
    assert (await bed.record()).bytes_sent == size


@pytest.mark.parametrize("chunked", [False, True])
async def test_an_endpoint_that_does_not_read_holds_the_caller_back(bed: Bed, chunked: bool) -> None:
    size = 64 * MIB
    gate = asyncio.Event()

    async def talk(peer: Peer) -> None:
        await peer.head()
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await gate.wait()
        peer.writer.transport.resume_reading()  # type: ignore[attr-defined]
        left = size
        while left > 0:
            left -= len(await soon(peer.reader.read(MIB)))
        peer.send(OK.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        while await peer.reader.read(MIB):
            pass

    await bed.serve(await bed.endpoint(talk))
    caller = await bed.caller()
    framing = b"transfer-encoding: chunked" if chunked else b"content-length: %d" % size
    caller.send(b"POST / HTTP/1.1\r\nHost: a\r\n" + framing + b"\r\n\r\n")
    sent = 0

    async def upload() -> None:
        nonlocal sent
        block = bytes(65536)
        for _ in range(size // len(block)):
            caller.send(b"10000\r\n" + block + b"\r\n" if chunked else block)
            await caller.writer.drain()
            sent += len(block)
        if chunked:
            caller.send(b"0\r\n\r\n")

    task = asyncio.ensure_future(upload())
    await bed.settle(lambda: any(down.held for down in bed.proxy._connections))
    most, before = 0, -1
    while before != sent:
        before = sent
        for _ in range(200):
            await asyncio.sleep(0)
            most = max(most, buffered(bed))
    assert sent < size // 2
    assert most < MIB
    gate.set()
    await soon(task)
    assert (await caller.answer())[0] == 200
    assert (await bed.record()).bytes_received == size


async def test_a_flood_of_pipelined_requests_is_not_read_without_end(bed: Bed) -> None:
    gate = asyncio.Event()

    async def talk(peer: Peer) -> None:
        await peer.head()
        await gate.wait()
        for _ in range(400_000):
            peer.send(OK)
            if not await peer.head():
                return

    await bed.serve(await bed.endpoint(talk))
    caller = await bed.caller()
    caller.send(GET * 400_000)
    await bed.settle(lambda: any(down.held for down in bed.proxy._connections))
    for _ in range(200):
        await asyncio.sleep(0)
    assert buffered(bed) < MIB
    gate.set()
    for _ in range(1000):
        assert (await caller.answer())[0] == 200


async def test_a_pipeline_whose_answers_are_not_read_stops(bed: Bed) -> None:
    big = b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n" + bytes(100_000)

    async def talk(peer: Peer) -> None:
        while True:
            await peer.head()
            peer.send(big)

    endpoint = await bed.endpoint(talk)
    await bed.serve(endpoint)
    caller = await bed.caller(receive_buffer=4096)
    caller.writer.transport.pause_reading()  # type: ignore[attr-defined]
    caller.send(GET * 500)
    before = -1
    while before != bed.records.qsize() or before == 0:
        before = bed.records.qsize()
        for _ in range(500):
            await asyncio.sleep(0)
    assert before < 400 and buffered(bed) < MIB
    caller.writer.transport.resume_reading()  # type: ignore[attr-defined]
    for _ in range(500):
        assert len((await caller.answer())[2]) == 100_000


async def test_drain_closes_idle_and_lets_requests_finish(bed: Bed) -> None:
    gate = asyncio.Event()

    async def talk(peer: Peer) -> None:
        while True:
            await peer.head()
            await gate.wait()
            peer.send(OK)

    await bed.serve(await bed.endpoint(talk))
    fresh, idle, busy, slow = [await bed.caller() for _ in range(4)]
    busy.send(GET)
    slow.send(b"GET / HTTP/1.1\r\n")
    gate.set()
    await idle.ask(GET)
    await busy.answer()
    gate.clear()
    busy.send(GET)
    await bed.settle(lambda: bed.route.in_flight[0] == 1 and bed.proxy.open_connections == 4)
    drained = asyncio.ensure_future(bed.proxy.drain(60.0))
    assert await fresh.rest() == b"" and await idle.rest() == b""
    assert not drained.done()
    slow.send(b"Host: a\r\n\r\n")
    gate.set()
    assert (await busy.rest()).endswith(b"connection: close\r\n\r\nok")
    assert (await slow.rest()).endswith(b"connection: close\r\n\r\nok")
    assert await soon(drained) == (4, 0)
    assert bed.proxy.open_connections == 0
    with pytest.raises(ConnectionError):
        await bed.caller()


async def test_drain_has_an_end(bed: Bed) -> None:
    endpoint = await bed.endpoint(silent)
    await bed.serve(endpoint)
    caller = await bed.caller()
    caller.send(GET)
    await soon(endpoint.accepted.get())
    assert await soon(bed.proxy.drain(0.1)) == (0, 1)
    with pytest.raises(ConnectionResetError):
        await caller.rest()
    assert (await bed.record()).reason == "draining"


async def test_a_request_that_a_drain_cuts_before_its_record_begins_is_counted(bed: Bed) -> None:
    await bed.serve()
    caller = await bed.caller()
    caller.send(b"GET / HTTP/1.1\r\nHo")
    await bed.settle(lambda: any(down._headed for down in bed.proxy._connections))
    assert await soon(bed.proxy.drain(0.05)) == (0, 1)
    assert bed.stats.snapshot(0.0)["proxy_verdicts_total"] == [["orders", "draining", 1]]


async def test_unlisten_takes_no_more_and_keeps_what_there_is(bed: Bed) -> None:
    await bed.serve(await bed.endpoint())
    caller = await bed.caller()
    await caller.ask(GET)
    bed.proxy.unlisten(7)
    assert (await caller.ask(GET))[0] == 200
    with pytest.raises(ConnectionError):
        await (await bed.caller()).ask(GET)
