"""When something breaks, each side learns of it in its own words, and the record says what it was."""

from __future__ import annotations

import asyncio
import socket

import pytest

from meshbpf.model import ConnectionPool, HttpPool, ServicePolicy, TcpPool, Timeouts
from meshbpf.reason import Reason
from tests.proxy.bed import OK, Bed, Peer, script, silent, soon

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
BEFORE = b"upstream connect error or disconnect/reset before headers. reset reason: "


def closed_port() -> int:
    """A port that refuses, and that nobody else gets while the socket lives in a test's frame."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def vanish(peer: Peer) -> None:
    """Reads a request and closes without a word."""
    await peer.head()
    peer.writer.close()


async def test_no_endpoint(bed: Bed) -> None:
    await bed.serve()
    caller = await bed.caller()
    for _ in range(2):  # the connection goes on
        status, head, body = await caller.ask(GET)
        assert (status, body) == (503, b"no healthy upstream")
        assert b"x-meshbpf-reason: no_healthy_upstream\r\n" in head and b"connection" not in head
        record = await bed.record()
        assert (record.response_flags, record.reason, record.attempts) == ("UH", "no_healthy_upstream", 0)


async def test_unknown_service(bed: Bed) -> None:
    await bed.serve()
    assert bed.origin is not None
    bed.origin.port = 81
    caller = await bed.caller()
    status, head, body = await caller.ask(GET)
    assert (status, body) == (404, b"") and b"x-meshbpf-reason: no_service\r\n" in head
    record = await bed.record()
    assert (record.response_flags, record.service) == ("NR", "")


async def test_a_connection_without_origin_is_closed_and_counted(bed: Bed) -> None:
    await bed.serve(await bed.endpoint())
    bed.origin = None
    caller = await bed.caller()
    assert await caller.rest() == b""
    assert ["unknown", "no_origin", 1] in bed.stats.snapshot(0.0)["proxy_verdicts_total"]
    assert bed.proxy.open_connections == 0


async def test_head_gets_no_body_from_us(bed: Bed) -> None:
    await bed.serve()
    caller = await bed.caller()
    for _ in range(2):
        status, head, _body = await caller.ask(b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", head_only=True)
        assert status == 503 and b"content-length: 19\r\n" in head


async def test_connect_refused(bed: Bed) -> None:
    port = closed_port()
    await bed.serve(port)
    caller = await bed.caller()
    status, head, body = await caller.ask(GET)
    assert (status, body) == (503, BEFORE + b"remote connection failure")
    assert b"x-meshbpf-reason: connect_failed\r\n" in head
    record = await bed.record()
    assert (record.response_flags, record.attempts, record.endpoint_outcome) == ("UF", 1, "connect_failed")
    assert record.upstream_host == f"127.0.0.1:{port}"


async def test_connect_failure_tries_another_endpoint(bed: Bed) -> None:
    endpoint = await bed.endpoint()
    port = closed_port()
    await bed.serve(port, endpoint)
    caller = await bed.caller()
    attempts = set()
    for _ in range(12):
        assert (await caller.ask(GET))[0] == 200
        attempts.add((await bed.record()).attempts)
    assert attempts == {1, 2}
    rows = bed.stats.snapshot(0.0)["upstream_requests_total"]
    assert [row for row in rows if row[1] == f"127.0.0.1:{port}" and row[2] == "connect_failed" and row[3] >= 1]


async def test_connect_failure_is_tried_twice_at_most(bed: Bed) -> None:
    await bed.serve(*(closed_port() for _ in range(4)))
    caller = await bed.caller()
    assert (await caller.ask(GET))[0] == 503
    assert (await bed.record()).attempts == 2


async def test_connect_timeout(bed: Bed) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = []
        for _ in range(4):  # a listener whose queue is full answers no SYN
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
            fillers.append(filler)
        policy = ServicePolicy(connection_pool=ConnectionPool(tcp=TcpPool(connect_timeout=0.2)))
        await bed.serve(full.getsockname()[1], policy=policy)
        caller = await bed.caller()
        status, head, body = await caller.ask(GET)
        assert (status, body) == (503, BEFORE + b"connection timeout")
        assert b"x-meshbpf-reason: connect_timeout\r\n" in head
        record = await bed.record()
        assert (record.response_flags, record.endpoint_outcome) == ("UF", "connect_timeout")
        for filler in fillers:
            filler.close()


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 20", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n"])
async def test_the_endpoint_dies_before_the_head_is_complete(bed: Bed, start: bytes, hard: bool) -> None:
    async def talk(peer: Peer) -> None:
        await peer.head()
        peer.send(start)
        await peer.writer.drain()
        if hard:
            peer.reset()
        else:
            peer.writer.close()

    await bed.serve(await bed.endpoint(talk))
    caller = await bed.caller()
    status, head, body = await caller.ask(GET)
    assert (status, body) == (503, BEFORE + b"connection termination")
    assert b"x-meshbpf-reason: upstream_reset\r\n" in head
    record = await bed.record()
    assert (record.response_flags, record.attempts, record.endpoint_outcome) == ("UC", 1, "upstream_reset")


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(
    "start",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\nabc",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n",
    ],
)
async def test_the_endpoint_dies_in_its_answer(bed: Bed, start: bytes, hard: bool) -> None:
    endpoint = await bed.endpoint(script(start))
    await bed.serve(endpoint)
    caller = await bed.caller()
    caller.send(GET)
    assert (await caller.head()).startswith(b"HTTP/1.1 200 OK\r\n")
    if hard:
        endpoint.peers[0].reset()
    else:
        endpoint.peers[0].writer.close()
    with pytest.raises(ConnectionResetError):  # no fake end
        await caller.rest()
    record = await bed.record()
    assert (record.response_code, record.response_flags, record.reason) == (200, "UC", "upstream_closed_early")
    assert record.endpoint_outcome == "upstream_closed_early"


async def test_a_reset_does_not_end_an_answer_that_ends_by_close(bed: Bed) -> None:
    endpoint = await bed.endpoint(script(b"HTTP/1.1 200 OK\r\n\r\nabc"))
    await bed.serve(endpoint)
    caller = await bed.caller()
    caller.send(GET)
    await caller.until(b"abc\r\n")
    endpoint.peers[0].reset()
    with pytest.raises(ConnectionResetError):
        await caller.rest()
    assert (await bed.record()).response_flags == "UC"


@pytest.mark.parametrize("method", [b"GET", b"PUT", b"DELETE"])
async def test_a_pooled_connection_that_is_dead_is_replaced_unnoticed(bed: Bed, method: bytes) -> None:
    """The endpoint reads the second request and closes: as if it had timed out just then."""

    async def talk(peer: Peer) -> None:
        await peer.head()
        peer.send(OK)
        await peer.reader.read(2**16)
        peer.writer.close()

    endpoint = await bed.endpoint(talk)
    await bed.serve(endpoint)
    caller = await bed.caller()
    request = method + b" / HTTP/1.1\r\nHost: a\r\ncontent-length: 0\r\n\r\n"
    for _ in range(2):
        assert (await caller.ask(request))[0] == 200
    assert len(endpoint.peers) == 2
    assert [(await bed.record()).attempts for _ in range(2)] == [1, 2]
    assert ["orders", f"127.0.0.1:{endpoint.port}", "upstream_reset", 1] in bed.stats.snapshot(0.0)[
        "upstream_requests_total"
    ]


async def test_a_small_body_is_sent_again(bed: Bed) -> None:
    async def talk(peer: Peer) -> None:
        await peer.head()
        peer.send(OK)
        await peer.reader.read(2**16)
        peer.writer.close()

    async def second(peer: Peer) -> None:
        await peer.head()
        assert await peer.read(3) == b"abc"
        peer.send(OK)

    turns = iter((talk, second))

    async def either(peer: Peer) -> None:
        await next(turns)(peer)

    await bed.serve(await bed.endpoint(either))
    caller = await bed.caller()
    await caller.ask(GET)
    assert (await caller.ask(b"PUT / HTTP/1.1\r\nHost: a\r\ncontent-length: 3\r\n\r\nabc"))[0] == 200


async def test_a_post_that_may_have_been_seen_is_not_sent_again(bed: Bed) -> None:
    async def talk(peer: Peer) -> None:
        await peer.head()
        peer.send(OK)
        await peer.reader.read(2**16)  # it has been seen
        peer.writer.close()

    endpoint = await bed.endpoint(talk)
    await bed.serve(endpoint)
    caller = await bed.caller()
    await caller.ask(GET)
    assert (await caller.ask(b"POST / HTTP/1.1\r\nHost: a\r\ncontent-length: 3\r\n\r\nabc"))[0] == 503
    assert len(endpoint.peers) == 1


async def test_a_fresh_connection_that_dies_is_not_retried(bed: Bed) -> None:
    endpoint = await bed.endpoint(vanish)
    await bed.serve(endpoint)
    caller = await bed.caller()
    assert (await caller.ask(GET))[0] == 503
    assert len(endpoint.peers) == 1


async def test_the_caller_resets_while_it_waits(bed: Bed) -> None:
    endpoint = await bed.endpoint(silent)
    await bed.serve(endpoint)
    caller = await bed.caller()
    caller.send(GET)
    peer = await soon(endpoint.accepted.get())
    await peer.head()
    caller.reset()
    with pytest.raises(ConnectionResetError):
        await peer.rest()
    record = await bed.record()
    assert (record.response_code, record.response_flags, record.reason) == (0, "DC", "downstream_closed")
    assert record.endpoint_outcome is None


@pytest.mark.parametrize("hard", [False, True])
async def test_the_caller_goes_away_in_its_body(bed: Bed, hard: bool) -> None:
    endpoint = await bed.endpoint(silent)
    await bed.serve(endpoint)
    caller = await bed.caller()
    caller.send(b"POST / HTTP/1.1\r\nHost: a\r\ncontent-length: 9\r\n\r\nabc")
    peer = await soon(endpoint.accepted.get())
    await peer.until(b"\r\n\r\nabc")  # request ids and trace ids have letters too
    if hard:
        caller.reset()
        with pytest.raises(ConnectionResetError):
            await peer.rest()
    else:
        caller.end()
        assert await peer.rest() == b""
    record = await bed.record()
    assert (record.response_flags, record.bytes_received) == ("DC", 3)


async def test_the_caller_goes_away_while_its_endpoint_is_dialled(bed: Bed) -> None:
    endpoint = await bed.endpoint()
    await bed.serve(endpoint)
    caller = await bed.caller()
    caller.send(GET)
    await bed.settle(lambda: bed.route.pool.pending == 1)
    caller.reset()
    assert (await bed.record()).reason == "downstream_closed"
    await bed.settle(lambda: bed.route.pool.pending == 0)
    assert (await (await bed.caller()).ask(GET))[0] == 200  # by the connection that was made in vain
    assert len(endpoint.peers) == 1


async def test_request_timeout_before_the_answer(bed: Bed) -> None:
    endpoint = await bed.endpoint(silent)
    await bed.serve(endpoint, policy=ServicePolicy(timeouts=Timeouts(request=0.1)))
    caller = await bed.caller()
    status, head, body = await caller.ask(GET)
    assert (status, body) == (504, b"upstream request timeout") and b"x-meshbpf-reason: request_timeout\r\n" in head
    record = await bed.record()
    assert record.response_flags == "UT" and 100 <= record.duration_ms < 1000
    assert record.endpoint_outcome == "request_timeout"
    assert bed.route.pool.open == 0


async def test_request_timeout_in_the_answer(bed: Bed) -> None:
    endpoint = await bed.endpoint(script(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc"))
    await bed.serve(endpoint, policy=ServicePolicy(timeouts=Timeouts(request=0.1)))
    caller = await bed.caller()
    caller.send(GET)
    await caller.until(b"abc")
    with pytest.raises(ConnectionResetError):
        await caller.rest()
    assert (await bed.record()).response_flags == "UT"


async def test_per_try_timeout(bed: Bed) -> None:
    endpoint = await bed.endpoint(silent)
    await bed.serve(endpoint, policy=ServicePolicy(timeouts=Timeouts(per_try=0.1)))
    assert (await (await bed.caller()).ask(GET))[0] == 504


def pool_of(connections: int, pending: int, queue: float = 3.0) -> ServicePolicy:
    pool = ConnectionPool(tcp=TcpPool(max_connections=connections), http=HttpPool(http1_max_pending_requests=pending))
    return ServicePolicy(connection_pool=pool, timeouts=Timeouts(queue=queue))


async def test_above_max_connections_requests_wait_for_their_turn(bed: Bed) -> None:
    gate = asyncio.Event()

    async def talk(peer: Peer) -> None:
        while True:
            await peer.head()
            await gate.wait()
            peer.send(OK)

    endpoint = await bed.endpoint(talk)
    await bed.serve(endpoint, policy=pool_of(2, 10))
    callers = [await bed.caller() for _ in range(5)]
    for caller in callers:
        caller.send(GET)
    await bed.settle(lambda: bed.route.pool.pending == 3 and len(endpoint.peers) == 2)
    gate.set()
    assert [(await caller.answer())[0] for caller in callers] == [200] * 5
    assert len(endpoint.peers) == 2 and bed.route.pool.open == 2


async def test_a_waiting_request_gets_the_place_of_a_connection_that_ended(bed: Bed) -> None:
    endpoint = await bed.endpoint(script(OK.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"), close=True))
    await bed.serve(endpoint, policy=pool_of(1, 10))
    callers = [await bed.caller() for _ in range(3)]
    for caller in callers:
        caller.send(GET)
    assert [(await caller.answer())[0] for caller in callers] == [200] * 3
    assert len(endpoint.peers) == 3


async def test_above_max_pending_requests_are_refused(bed: Bed) -> None:
    endpoint = await bed.endpoint(silent)
    await bed.serve(endpoint, policy=pool_of(1, 1))
    first, second, third = [await bed.caller() for _ in range(3)]
    first.send(GET)
    await bed.settle(lambda: bed.route.pool.open == 1 and bed.route.pool.pending == 0)
    second.send(GET)
    await bed.settle(lambda: bed.route.pool.pending == 1)
    status, head, body = await third.ask(GET)
    assert (status, body) == (503, BEFORE + b"overflow")
    assert b"x-envoy-overloaded: true\r\n" in head and b"x-meshbpf-reason: too_many_pending\r\n" in head
    record = await bed.record()
    assert (record.response_flags, record.attempts, record.endpoint_outcome) == ("UO", 0, None)


async def test_waiting_has_an_end(bed: Bed) -> None:
    endpoint = await bed.endpoint(silent)
    await bed.serve(endpoint, policy=pool_of(1, 10, queue=0.1))
    first, second = [await bed.caller() for _ in range(2)]
    first.send(GET)
    await bed.settle(lambda: bed.route.pool.open == 1)
    status, head, _body = await second.ask(GET)
    assert status == 503 and b"x-meshbpf-reason: too_many_connections\r\n" in head
    record = await bed.record()
    assert (record.response_flags, record.reason) == ("UO", Reason.TOO_MANY_CONNECTIONS.word)


@pytest.mark.parametrize("queue", [3.0, 0.0])
async def test_a_caller_that_leaves_while_its_request_waits_costs_no_endpoint_a_request(bed: Bed, queue: float) -> None:
    gate = asyncio.Event()

    async def talk(peer: Peer) -> None:
        while True:
            await peer.head()
            await gate.wait()
            peer.send(OK)

    endpoint = await bed.endpoint(talk)
    await bed.serve(endpoint, policy=pool_of(1, 10, queue))
    first, second, third = [await bed.caller() for _ in range(3)]
    for count, caller in enumerate((first, second, third)):
        caller.send(GET)
        await bed.settle(lambda count=count: bed.route.pool.pending == count and bed.route.pool.open == 1)
    second.reset()
    left = await bed.record()
    assert (left.response_flags, left.attempts) == ("DC", 0) and bed.route.pool.pending == 1
    gate.set()
    assert [(await caller.answer())[0] for caller in (first, third)] == [200] * 2
    assert endpoint.peers[0].seen.count(b"\r\n\r\n") == 2


async def test_a_waiting_request_whose_endpoints_leave_is_answered_so(bed: Bed) -> None:
    endpoint = await bed.endpoint(silent)
    await bed.serve(endpoint, policy=pool_of(1, 10))
    first, second = [await bed.caller() for _ in range(2)]
    first.send(GET)
    await bed.settle(lambda: bed.route.pool.open == 1 and bed.route.pool.pending == 0)
    second.send(GET)
    await bed.settle(lambda: bed.route.pool.pending == 1)
    bed.proxy.use(bed.mesh(policy=pool_of(1, 10)))
    endpoint.peers[0].reset()
    assert (await second.answer())[::2] == (503, b"no healthy upstream")
    assert bed.route.pool.pending == bed.route.pool.open == 0


async def test_room_is_made_by_closing_an_idle_connection_to_another_endpoint(bed: Bed) -> None:
    endpoints = [await bed.endpoint() for _ in range(2)]
    await bed.serve(*endpoints, policy=pool_of(1, 10))
    for _ in range(20):
        caller = await bed.caller()
        assert (await caller.ask(GET))[0] == 200
        await caller.close()
        assert bed.route.pool.open == 1
    assert all(endpoint.peers for endpoint in endpoints)


async def test_idle_connections_to_endpoints_end(bed: Bed) -> None:
    endpoint = await bed.endpoint()
    pool = ConnectionPool(http=HttpPool(idle_timeout=0.1))
    await bed.serve(endpoint, policy=ServicePolicy(connection_pool=pool))
    caller = await bed.caller()
    await caller.ask(GET)
    await bed.settle(lambda: bed.route.pool.open == 0)
    assert (await caller.ask(GET))[0] == 200
