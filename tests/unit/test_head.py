"""Heads are read alike however they are cut, and nothing that is sent on could be read in two ways."""

from __future__ import annotations

import re

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from userspace_proxy.body import Dechunker, encode, last
from userspace_proxy.grammar import BAD, CHUNKED, TOO_LARGE, UNTIL_CLOSE, Fault
from userspace_proxy.head import RequestFields, answer_head, request_fields
from userspace_proxy.limits import DEFAULT_LIMITS, Limits
from userspace_proxy.requestid import RequestIds

NAMES = st.sampled_from(
    [
        "Host",
        "Content-Length",
        "Transfer-Encoding",
        "Connection",
        "Expect",
        "TE",
        "Upgrade",
        "X-A",
        "x-meshbpf-a",
        "X B",
    ]
)
VALUES = st.sampled_from(
    (
        "a", "3", "03", "+3", "3,3", "chunked", "Chunked", "gzip, chunked", "close", "upgrade", "websocket",
        "x-a, close", "host", "100-continue", "trailers",
        "", " ", "\t3", "a\rb", "a\nb", "\x00", "a b", "content-length",
    )
)  # fmt: skip
LINES = st.lists(st.tuples(NAMES, VALUES), max_size=6)


def read(lines: bytes, minor: int = 1, host: bytes | None = None) -> RequestFields | Fault:
    return request_fields(lines, minor, host, b"orders:80", DEFAULT_LIMITS)


@given(headers=LINES, minor=st.integers(0, 1))
def test_what_is_sent_on_has_one_framing_and_one_host(headers: list[tuple[str, str]], minor: int) -> None:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers).encode()
    fields = read(lines, minor)
    if isinstance(fields, Fault):
        return
    out = fields.out
    assert re.fullmatch(rb"(?:[!-9;-~]+:[^\r\n\x00]*\r\n)*", out)
    lower = out.lower()
    lengths = re.findall(rb"(?m)^content-length: *(.*)\r$", lower)
    chunked = re.findall(rb"(?m)^transfer-encoding: *(.*)\r$", lower)
    assert len(lengths) + len(chunked) <= 1
    assert fields.length == (CHUNKED if chunked else int(lengths[0]) if lengths else 0)
    assert len(re.findall(rb"(?m)^host:", lower)) == 1
    assert not re.search(rb"(?m)^(keep-alive|proxy-connection|x-meshbpf-)", lower)
    seen = Seen()
    parser = httptools.HttpRequestParser(seen)
    try:
        parser.feed_data(b"POST / HTTP/1.1\r\n" + out + b"\r\n")
    except httptools.HttpParserUpgrade:
        assert fields.websocket
    assert seen.heads == 1
    again = read(out)
    assert isinstance(again, RequestFields) and again.length == fields.length


class Seen:
    def __init__(self) -> None:
        self.heads = 0

    def on_headers_complete(self) -> None:
        self.heads += 1


def test_lines_without_anything_to_change_are_not_copied() -> None:
    lines = b"Host: a\r\nAccept: */*\r\n"
    fields = read(lines)
    assert isinstance(fields, RequestFields) and fields.out == lines and fields.simple


@pytest.mark.parametrize(
    ("lines", "minor", "simple"),
    [
        (b"Host: a\r\nConnection: keep-alive\r\n", 1, True),
        (b"Host: a\r\nConnection: close\r\n", 1, False),
        (b"Host: a\r\nContent-Length: 1\r\n", 1, False),
        (b"Host: a\r\n", 0, False),
    ],
)
def test_simple_requests(lines: bytes, minor: int, simple: bool) -> None:
    fields = read(lines, minor)
    assert isinstance(fields, RequestFields) and fields.simple is simple


def test_faults_are_values() -> None:
    assert read(b"Host: a\r\nHost: a\r\n") is BAD
    few = Limits(fields=2)
    assert request_fields(b"Host: a\r\nA: b\r\nC: d\r\n", 1, None, b"", few) is TOO_LARGE


@pytest.mark.parametrize(
    ("head", "length", "close", "verbatim"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", 3, False, True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", CHUNKED, False, False),
        (b"HTTP/1.1 200 OK\r\n\r\n", UNTIL_CLOSE, False, True),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\n", 3, True, False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\nConnection: keep-alive\r\n\r\n", 3, False, False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\n", 3, True, False),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 0, False, True),
        (b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", 0, False, False),
    ],
)
def test_answers(head: bytes, length: int, close: bool, verbatim: bool) -> None:
    answer = answer_head(head, DEFAULT_LIMITS)
    assert answer is not None
    assert (answer.length, answer.close, answer.verbatim) == (length, close, verbatim)
    assert answer.out.startswith(b"HTTP/1.1 ")
    if verbatim:
        assert answer.out + b"\r\n" == head


@given(
    pieces=st.lists(
        st.binary(min_size=1, max_size=40) | st.sampled_from([b"\r\n\r\n", b"\r\n", b"0\r\n\r\n"]), max_size=6
    ),
    trailers=st.booleans(),
    rest=st.binary(max_size=20),
    data=st.data(),
)
def test_a_chunked_body_ends_where_it_ends_however_it_is_cut(
    pieces: list[bytes], trailers: bool, rest: bytes, data: st.DataObject
) -> None:
    wire = b"".join(encode(piece) for piece in pieces) + last(b"a: b\r\nc: d\r\n" if trailers else b"")
    stream = wire + rest
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    body, at, chunks = b"", 0, Dechunker()
    for cut in [*cuts, len(stream)]:
        if cut == at:
            continue
        used = chunks.feed(stream[at:cut])
        body += chunks.payload()
        if chunks.done:
            at += used
            break
        assert used == cut - at
        at = cut
    assert chunks.done and at == len(wire)
    assert body == b"".join(pieces)
    assert chunks.trailers == (b"a: b\r\nc: d\r\n" if trailers else b"")


def test_framing_alone_cannot_fill_memory() -> None:
    chunks = Dechunker()
    line = b"1;" + b"a" * 1000 + b"\r\nx\r\n"
    used = [chunks.feed(line) for _ in range(200)]
    assert used[0] == len(line) and used[-1] == -1


def test_nothing_encoded_is_no_last_chunk() -> None:
    assert encode(b"") == b""


def test_request_ids_look_like_uuids_and_differ() -> None:
    ids = RequestIds()
    made = [ids.next() for _ in range(2000)]
    assert len(set(made)) == 2000
    assert all(
        re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", one) for one in made
    )
