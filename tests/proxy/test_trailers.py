"""Trailers have bounds, in both directions: what is longer than a head may be is refused before it fills memory."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from tests.proxy.bed import Bed, Peer, script
from userspace_proxy.body import Dechunker

START = b"POST / HTTP/1.1\r\nHost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n"
LONG = {
    "many": b"x: y\r\n" * 101 + b"\r\n",
    "many that are dropped": b"host: y\r\n" * 101 + b"\r\n",
    "one long": b"x: " + b"y" * 17_000 + b"\r\n\r\n",
    "long in sum": (b"x: " + b"y" * 1000 + b"\r\n") * 17 + b"\r\n",
    "without end": b"x: " + b"y" * 300_000,
}


@pytest.mark.parametrize("trailers", LONG.values(), ids=LONG.keys())
async def test_a_request_with_too_many_trailers_is_refused(bed: Bed, trailers: bytes) -> None:
    await bed.serve(await bed.endpoint())
    caller = await bed.caller()
    caller.send(START + trailers)
    answer = await caller.rest()
    assert answer.startswith(b"HTTP/1.1 400 ") and b"x-meshbpf-reason: bad_request\r\n" in answer


@pytest.mark.parametrize("trailers", LONG.values(), ids=LONG.keys())
async def test_an_answer_with_too_many_trailers_is_broken_off(bed: Bed, trailers: bytes) -> None:
    async def talk(peer: Peer) -> None:
        await peer.head()
        peer.send(ANSWER + trailers)
        await peer.reader.read()

    await bed.serve(await bed.endpoint(talk))
    caller = await bed.caller()
    caller.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    with contextlib.suppress(ConnectionResetError, asyncio.IncompleteReadError):
        assert (await caller.answer())[0] == 502  # when it came in one read with the head
    assert (await bed.record()).reason == "upstream_protocol_error"


async def test_trailers_within_bounds_go_on(bed: Bed) -> None:
    trailers = b"x: y\r\n" * 100
    await bed.serve(await bed.endpoint(script(ANSWER + trailers + b"\r\n")))
    caller = await bed.caller()
    caller.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    await caller.head()
    assert await caller.until(b"\r\n\r\n") == b"3\r\nabc\r\n0\r\n" + trailers + b"\r\n"


@pytest.mark.parametrize("size", [1, 100, 10_000])
def test_a_trailer_without_end_is_refused_however_it_is_cut(size: int) -> None:
    chunks = Dechunker()
    body = 4 * 2**20  # a large body buys no trailers
    assert chunks.feed(b"%x\r\n" % body + bytes(body) + b"\r\n0\r\nx: ") > 0
    fed = 0
    while chunks.feed(b"y" * size) >= 0:
        fed += size
        assert fed <= 16 * 1024 + size


def test_chunks_with_large_framing_and_much_body_are_no_trailers() -> None:
    chunks = Dechunker()
    for _ in range(1000):
        assert chunks.feed(b"1;" + b"e" * 5 + b"\r\na\r\n") > 0
    assert chunks.feed(b"0\r\n\r\n") == 5 and chunks.done and len(chunks.payload()) == 1000
