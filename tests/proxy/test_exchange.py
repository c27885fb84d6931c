"""Requests and answers of every shape pass through unchanged in meaning, and connections go on when they may."""

# ruff: noqa: E501 (the vectors are bytes on the wire, kept whole)

from __future__ import annotations

import pytest

from meshbpf.model import ConnectionPool, HttpPool, ServicePolicy
from tests.proxy.bed import OK, Bed, Peer, plain, script, soon
from userspace_proxy.body import Dechunker

GET = b"GET /a?b=c HTTP/1.1\r\nHost: orders\r\n\r\n"


async def test_a_request_passes_and_is_recorded(bed: Bed) -> None:
    endpoint = await bed.endpoint()
    await bed.serve(endpoint)
    caller = await bed.caller()
    caller.send(b"GET /a?b=c HTTP/1.1\r\nHost: orders\r\nUser-Agent: me\r\nX-Forwarded-For: 192.0.2.3\r\n")
    caller.send(b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n\r\n")
    assert await caller.answer() == (200, b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n", b"ok")
    record = await bed.record()
    assert plain(bytes(endpoint.received)).startswith(b"GET /a?b=c HTTP/1.1\r\nHost: orders\r\nUser-Agent: me\r\n")
    assert (record.method, record.path, record.authority, record.protocol) == ("GET", "/a?b=c", "orders", "HTTP/1.1")
    assert (record.response_code, record.response_flags, record.reason, record.attempts) == (200, None, None, 1)
    assert (record.service, record.workload, record.carrier) == ("orders", "shop.service", "proxy")
    assert (record.user_agent, record.x_forwarded_for) == ("me", "192.0.2.3")
    assert record.trace_id == "0af7651916cd43dd8448eb211c80319c"
    assert record.upstream_host == f"127.0.0.1:{endpoint.port}"
    assert (record.bytes_received, record.bytes_sent, record.endpoint_outcome) == (0, 2, "ok")
    assert record.request_id and f"x-request-id: {record.request_id}\r\n".encode() in endpoint.received
    assert record.upstream_service_time_ms is not None and record.duration_ms >= record.upstream_service_time_ms > 0


async def test_keep_alive_uses_one_connection_on_both_sides(bed: Bed) -> None:
    endpoint = await bed.endpoint()
    await bed.serve(endpoint)
    caller = await bed.caller()
    for _ in range(5):
        assert (await caller.ask(GET))[0] == 200
    assert len(endpoint.peers) == 1
    assert bed.route.pool.open == 1


async def test_another_caller_takes_over_the_idle_connection(bed: Bed) -> None:
    endpoint = await bed.endpoint()
    await bed.serve(endpoint)
    for _ in range(3):
        caller = await bed.caller()
        assert (await caller.ask(GET))[0] == 200
        await caller.close()
    assert len(endpoint.peers) == 1


async def test_pipelined_requests_are_answered_in_order(bed: Bed) -> None:
    endpoint = await bed.endpoint(script(*(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n%d" % n for n in range(9))))
    await bed.serve(endpoint)
    caller = await bed.caller()
    caller.send(GET * 9)
    assert [(await caller.answer())[2] for _ in range(9)] == [b"%d" % n for n in range(9)]


async def test_a_pipeline_of_requests_with_bodies_is_cut_at_the_right_places(bed: Bed) -> None:
    endpoint = await bed.endpoint()
    await bed.serve(endpoint)
    caller = await bed.caller()
    one = b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"
    two = b"POST /2 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nde\r\n0\r\n\r\n"
    caller.send(one + two + GET + two)
    assert [(await caller.answer())[0] for _ in range(4)] == [200] * 4
    sent_two = b"POST /2 HTTP/1.1\r\nHost: a\r\ntransfer-encoding: chunked\r\n\r\n2\r\nde\r\n0\r\n\r\n"
    assert plain(bytes(endpoint.received)) == one + sent_two + GET + sent_two


@pytest.mark.parametrize("size", [1, 2, 3, 7])
async def test_bytes_may_come_in_any_pieces(bed: Bed, size: int) -> None:
    endpoint = await bed.endpoint()
    await bed.serve(endpoint)
    caller = await bed.caller()
    whole = b"\r\nPOST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n" + GET
    for at in range(0, len(whole), size):
        caller.send(whole[at : at + size])
        await caller.writer.drain()
        await bed.settle(lambda: True)
    assert [(await caller.answer())[0] for _ in range(2)] == [200] * 2
    received = plain(bytes(endpoint.received))
    head, _, rest = received.partition(b"\r\n\r\n")
    assert head == b"POST / HTTP/1.1\r\nHost: a\r\ntransfer-encoding: chunked"
    chunks = Dechunker()
    assert rest[chunks.feed(rest) :] == GET
    assert (chunks.payload(), chunks.trailers) == (b"abc", b"X-T: 1\r\n")


async def test_answers_may_come_in_any_pieces(bed: Bed) -> None:
    async def talk(peer: Peer) -> None:
        for _ in range(2):
            await peer.head()
            for byte in b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx: y\r\n\r\n":
                peer.send(bytes((byte,)))
                await peer.writer.drain()

    endpoint = await bed.endpoint(talk)
    await bed.serve(endpoint)
    caller = await bed.caller()
    for _ in range(2):
        caller.send(GET)
        assert b"transfer-encoding: chunked" in await caller.head()
        assert (await caller.until(b"0\r\nx: y\r\n\r\n")).replace(b"1\r\n", b"").count(b"\r\n") >= 4
    assert len(endpoint.peers) == 1


async def test_chunks_are_written_anew_with_trailers(bed: Bed) -> None:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\ntrailer: x-sum\r\n\r\n"
    endpoint = await bed.endpoint(
        script(head + b"3;ext=1\r\nabc\r\n0002\r\nde\r\n0\r\nx-sum: 5\r\ncookie: no\r\n\r\n", OK)
    )
    await bed.serve(endpoint)
    caller = await bed.caller()
    caller.send(GET)
    expected = (
        b"HTTP/1.1 200 OK\r\ntrailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\nx-sum: 5\r\n\r\n"
    )
    assert await caller.read(len(expected)) == expected
    assert (await caller.ask(GET))[0] == 200
    assert (await bed.record()).bytes_sent == 5


@pytest.mark.parametrize(
    ("request_", "answer", "expected"),
    [
        (b"HEAD", b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n"),
        (b"HEAD", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"),
        (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n", b"HTTP/1.1 204 No Content\r\n\r\n"),
        (b"GET", b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n", b"HTTP/1.1 204 No Content\r\n\r\n"),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n"),
        (b"GET", b"HTTP/1.1 200\r\ncontent-length: 0\r\n\r\n", b"HTTP/1.1 200 \r\ncontent-length: 0\r\n\r\n"),
        (
            b"GET",
            b"HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Hop\r\nKeep-Alive: timeout=5\r\nX-Hop: 1\r\nX-meshbpf-Reason: x\r\nServer: s\r\ncontent-length: 0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nServer: s\r\ncontent-length: 0\r\n\r\n",
        ),
    ],
)  # fmt: skip
async def test_answers_without_body(bed: Bed, request_: bytes, answer: bytes, expected: bytes) -> None:
    endpoint = await bed.endpoint(script(answer, OK))
    await bed.serve(endpoint)
    caller = await bed.caller()
    caller.send(request_ + b" / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert await caller.read(len(expected)) == expected
    assert (await caller.ask(GET))[2] == b"ok"
    assert len(endpoint.peers) == 1


async def test_continue_is_the_endpoints_to_say(bed: Bed) -> None:
    async def talk(peer: Peer) -> None:
        assert b"Expect: 100-continue\r\n" in await peer.head()
        peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert await peer.read(3) == b"abc"
        peer.send(OK)
        await peer.reader.read()

    await bed.serve(await bed.endpoint(talk))
    caller = await bed.caller()
    caller.send(b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
    assert await caller.head() == b"HTTP/1.1 100 Continue\r\n\r\n"
    caller.send(b"abc")
    assert (await caller.answer())[0] == 200


async def test_a_refusal_instead_of_continue_ends_the_connection(bed: Bed) -> None:
    refused = b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n"
    endpoint = await bed.endpoint(script(refused))
    await bed.serve(endpoint)
    caller = await bed.caller()
    caller.send(b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
    assert await caller.rest() == b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    await bed.settle(lambda: bed.route.pool.open == 0)


async def test_early_hints_pass(bed: Bed) -> None:
    endpoint = await bed.endpoint(script(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 102 \r\n\r\n" + OK))
    await bed.serve(endpoint)
    caller = await bed.caller()
    caller.send(GET)
    assert await caller.head() == b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    assert await caller.head() == b"HTTP/1.1 102 \r\n\r\n"
    assert (await caller.answer())[0] == 200


async def test_an_answer_that_ends_with_its_connection_becomes_chunked(bed: Bed) -> None:
    endpoint = await bed.endpoint(script(b"HTTP/1.1 200 OK\r\n\r\nabc", close=True))
    await bed.serve(endpoint)
    caller = await bed.caller()
    for _ in range(2):
        assert (await caller.ask(GET))[1:] == (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
            b"3\r\nabc\r\n0\r\n\r\n",
        )
    assert len(endpoint.peers) == 2


@pytest.mark.parametrize(
    ("asked", "answered", "expected"),
    [
        (b"", OK, b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok"),
        (b"", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nok"),
        (b"Connection: keep-alive\r\n", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nok"),
        (b"", b"HTTP/1.1 103 Hints\r\n\r\n" + OK, b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok"),
    ],
)  # fmt: skip
async def test_http_10_callers(bed: Bed, asked: bytes, answered: bytes, expected: bytes) -> None:
    endpoint = await bed.endpoint(script(answered))
    await bed.serve(endpoint)
    caller = await bed.caller()
    caller.send(b"GET / HTTP/1.0\r\n" + asked + b"\r\n")
    assert await caller.rest() == expected
    assert plain(endpoint.peers[0].seen) == b"GET / HTTP/1.1\r\nhost: orders:80\r\n\r\n"
    assert (await bed.record()).protocol == "HTTP/1.0"


async def test_http_10_keep_alive(bed: Bed) -> None:
    await bed.serve(await bed.endpoint())
    caller = await bed.caller()
    for _ in range(2):
        status, head, _body = await caller.ask(b"GET / HTTP/1.0\r\nHost: a\r\nConnection: Keep-Alive\r\n\r\n")
        assert (status, head) == (200, b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: keep-alive\r\n\r\n")


async def test_connection_close_is_obeyed_on_both_sides(bed: Bed) -> None:
    endpoint = await bed.endpoint(script(OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), close=True))
    await bed.serve(endpoint)
    caller = await bed.caller()
    assert (await caller.ask(GET))[1] == b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"
    caller.send(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert await caller.rest() == b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok"
    assert len(endpoint.peers) == 2


async def test_max_requests_per_connection(bed: Bed) -> None:
    endpoint = await bed.endpoint()
    pool = ConnectionPool(http=HttpPool(max_requests_per_connection=2))
    await bed.serve(endpoint, policy=ServicePolicy(connection_pool=pool))
    caller = await bed.caller()
    for _ in range(5):
        assert (await caller.ask(GET))[0] == 200
    assert len(endpoint.peers) == 3


async def test_a_caller_that_closed_its_side_still_gets_the_answer(bed: Bed) -> None:
    async def talk(peer: Peer) -> None:
        await peer.head()
        assert await soon(peer.reader.read()) == b""  # the endpoint sees it, as it would without us
        peer.send(OK)
        peer.writer.close()

    await bed.serve(await bed.endpoint(talk))
    caller = await bed.caller()
    caller.send(GET)
    caller.end()
    assert (await caller.rest()).endswith(b"connection: close\r\n\r\nok")


async def test_the_last_of_a_pipeline_is_half_closed_not_the_first(bed: Bed) -> None:
    endpoint = await bed.endpoint()
    await bed.serve(endpoint)
    caller = await bed.caller()
    caller.send(GET + GET)
    caller.end()
    assert (await caller.rest()).count(b"\r\n\r\nok") == 2


async def test_an_absolute_target_replaces_host(bed: Bed) -> None:
    endpoint = await bed.endpoint()
    await bed.serve(endpoint)
    caller = await bed.caller()
    for target, sent in ((b"http://shop:81/x?y", b"/x?y"), (b"HTTP://shop:81", b"/"), (b"http://shop:81?q", b"/?q")):
        endpoint.received.clear()
        assert (await caller.ask(b"GET " + target + b" HTTP/1.1\r\nHost: other\r\nA: b\r\n\r\n"))[0] == 200
        assert plain(bytes(endpoint.received)) == b"GET " + sent + b" HTTP/1.1\r\nhost: shop:81\r\nA: b\r\n\r\n"
        assert (await bed.record()).authority == "shop:81"


async def test_request_ids_are_kept_and_foreign_words_of_ours_are_not(bed: Bed) -> None:
    endpoint = await bed.endpoint()
    await bed.serve(endpoint)
    caller = await bed.caller()
    request = (
        b"GET / HTTP/1.1\r\nHost: a\r\nX-Request-Id: mine\r\nX-MeshBPF-Reason: forged\r\nTE: gzip, trailers\r\n\r\n"
    )
    assert (await caller.ask(request))[0] == 200
    assert endpoint.received == b"GET / HTTP/1.1\r\nHost: a\r\nX-Request-Id: mine\r\nte: trailers\r\n\r\n"
    assert (await bed.record()).request_id == "mine"


async def test_two_requests_never_share_an_id(bed: Bed) -> None:
    await bed.serve(await bed.endpoint())
    caller = await bed.caller()
    ids = set()
    for _ in range(300):
        await caller.ask(GET)
        ids.add((await bed.record()).request_id)
    assert len(ids) == 300
