"""One framing goes on: each vector says what the endpoint must receive, byte for byte, or that it receives nothing."""

# ruff: noqa: E501 (the vectors are bytes on the wire, kept whole)

from __future__ import annotations

import pytest

from tests.proxy.bed import OK, Bed, plain, script

GET = b"GET /next HTTP/1.1\r\nHost: a\r\n\r\n"
H = b"Host: a\r\n"
CL = b"Content-Length: "
TE = b"Transfer-Encoding: "
POST = b"POST / HTTP/1.1\r\n" + H
CHUNKED = POST + TE + b"chunked\r\n\r\n"
SENT = POST + b"transfer-encoding: chunked\r\n\r\n"

# what the caller sends → what the endpoint receives (without the request id)
GOOD = {
    "plain": (GET, GET),
    "empty line before": (b"\r\n" + GET, GET),
    "two empty lines before": (b"\r\n\r\n" + GET, GET),
    "no space behind colon": (b"GET / HTTP/1.1\r\nHost:a\r\n\r\n", b"GET / HTTP/1.1\r\nHost:a\r\n\r\n"),
    "tab around a value": (b"GET / HTTP/1.1\r\nHost:\ta\t\r\n\r\n", b"GET / HTTP/1.1\r\nHost:\ta\t\r\n\r\n"),
    "empty value": (b"GET / HTTP/1.1\r\n" + H + b"X:\r\n\r\n", b"GET / HTTP/1.1\r\n" + H + b"X:\r\n\r\n"),
    "latin-1 value": (b"GET / HTTP/1.1\r\n" + H + b"X: \xe4\r\n\r\n", b"GET / HTTP/1.1\r\n" + H + b"X: \xe4\r\n\r\n"),
    "utf-8 target": (b"GET /\xc3\xa4 HTTP/1.1\r\n" + H + b"\r\n", b"GET /\xc3\xa4 HTTP/1.1\r\n" + H + b"\r\n"),
    "unknown method": (b"BREW / HTTP/1.1\r\n" + H + b"\r\n", b"BREW / HTTP/1.1\r\n" + H + b"\r\n"),
    "asterisk": (b"OPTIONS * HTTP/1.1\r\n" + H + b"\r\n", b"OPTIONS * HTTP/1.1\r\n" + H + b"\r\n"),
    "IPv6 host": (b"GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", b"GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n"),
    "length": (POST + CL + b"3\r\n\r\nabc", POST + CL + b"3\r\n\r\nabc"),
    "length 0": (POST + CL + b"0\r\n\r\n", POST + CL + b"0\r\n\r\n"),
    "leading zeros": (POST + CL + b"003\r\n\r\nabc", POST + b"content-length: 3\r\n\r\nabc"),
    "a header that ends like it": (
        POST + b"X-Content-Length: 9\r\n" + CL + b"03\r\n\r\nabc", POST + b"X-Content-Length: 9\r\ncontent-length: 3\r\n\r\nabc",
    ),
    "chunked": (CHUNKED + b"3\r\nabc\r\n0\r\n\r\n", SENT + b"3\r\nabc\r\n0\r\n\r\n"),
    "chunked in capitals": (POST + TE + b"CHUNKED\r\n\r\n3\r\nabc\r\n0\r\n\r\n", SENT + b"3\r\nabc\r\n0\r\n\r\n"),
    "chunks are joined": (CHUNKED + b"1\r\na\r\n2\r\nbc\r\n0\r\n\r\n", SENT + b"3\r\nabc\r\n0\r\n\r\n"),
    "chunk size in capitals": (CHUNKED + b"A\r\n0123456789\r\n0\r\n\r\n", SENT + b"a\r\n0123456789\r\n0\r\n\r\n"),
    "chunk size with zeros": (CHUNKED + b"0003\r\nabc\r\n000\r\n\r\n", SENT + b"3\r\nabc\r\n0\r\n\r\n"),
    "chunk extension": (CHUNKED + b'3;a=b;c="d"\r\nabc\r\n0;e\r\n\r\n', SENT + b"3\r\nabc\r\n0\r\n\r\n"),
    "empty chunked": (CHUNKED + b"0\r\n\r\n", SENT + b"0\r\n\r\n"),
    "body that looks like an end": (CHUNKED + b"6\r\n\r\n\r\n\r\n\r\n0\r\n\r\n", SENT + b"6\r\n\r\n\r\n\r\n\r\n0\r\n\r\n"),
    "trailers": (CHUNKED + b"0\r\nX: y\r\nZ:\r\n\r\n", SENT + b"0\r\nX: y\r\nZ: \r\n\r\n"),
    "trailers that are none": (CHUNKED + b"0\r\nHost: b\r\nX: y\r\nX-Meshbpf-A: b\r\n\r\n", SENT + b"0\r\nX: y\r\n\r\n"),
    "hop by hop": (
        b"GET / HTTP/1.1\r\n" + H + b"Connection: keep-alive, x-a\r\nKeep-Alive: 5\r\nProxy-Connection: x\r\nX-A: 1\r\nX-B: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + H + b"X-B: 2\r\n\r\n",
    ),
    "Host named as hop by hop": (
        b"GET / HTTP/1.1\r\n" + H + b"Connection: host, content-length\r\n\r\n", b"GET / HTTP/1.1\r\n" + H + b"\r\n",
    ),
    "upgrade to h2c": (
        b"GET / HTTP/1.1\r\n" + H + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + H + b"\r\n",
    ),
    "expect from 1.0": (
        b"POST / HTTP/1.0\r\n" + H + CL + b"1\r\nExpect: 100-continue\r\nConnection: keep-alive\r\n\r\na",
        b"POST / HTTP/1.1\r\n" + H + CL + b"1\r\n\r\na",
    ),
    "1.0 with host": (b"GET / HTTP/1.0\r\n" + H + b"Connection: keep-alive\r\n\r\n", b"GET / HTTP/1.1\r\n" + H + b"\r\n"),
}  # fmt: skip

BAD = {
    "length and chunked": POST + CL + b"3\r\n" + TE + b"chunked\r\n\r\n0\r\n\r\n",
    "chunked and length": POST + TE + b"chunked\r\n" + CL + b"3\r\n\r\n0\r\n\r\n",
    "two lengths": POST + CL + b"3\r\n" + CL + b"4\r\n\r\nabcd",
    "the same length twice": POST + CL + b"3\r\n" + CL + b"3\r\n\r\nabc",
    "length list": POST + CL + b"3, 3\r\n\r\nabc",
    "length with plus": POST + CL + b"+3\r\n\r\nabc",
    "length with minus": POST + CL + b"-3\r\n\r\nabc",
    "length in hex": POST + CL + b"0x3\r\n\r\nabc",
    "length with space inside": POST + CL + b"3 3\r\n\r\nabc",
    "length empty": POST + CL + b"\r\n\r\n",
    "length too large": POST + CL + b"9" * 19 + b"\r\n\r\n",
    "length with underscore": POST + CL + b"1_0\r\n\r\n0123456789",
    "space before colon": POST + b"Content-Length : 3\r\n\r\nabc",
    "tab before colon": POST + b"Transfer-Encoding\t: chunked\r\n\r\n0\r\n\r\n",
    "TE identity": POST + TE + b"identity\r\n\r\n",
    "TE gzip, chunked": POST + TE + b"gzip, chunked\r\n\r\n0\r\n\r\n",
    "TE chunked, chunked": POST + TE + b"chunked, chunked\r\n\r\n0\r\n\r\n",
    "TE twice": POST + TE + b"chunked\r\n" + TE + b"chunked\r\n\r\n0\r\n\r\n",
    "TE xchunked": POST + TE + b"xchunked\r\n\r\n0\r\n\r\n",
    "TE quoted": POST + TE + b'"chunked"\r\n\r\n0\r\n\r\n',
    "TE with vertical tab": POST + TE + b"\x0bchunked\r\n\r\n0\r\n\r\n",
    "TE with parameter": POST + TE + b"chunked;q=1\r\n\r\n0\r\n\r\n",
    "TE empty": POST + TE + b"\r\n\r\n",
    "TE on 1.0": b"POST / HTTP/1.0\r\n" + H + TE + b"chunked\r\n\r\n0\r\n\r\n",
    "TE folded": POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "folded line": b"GET / HTTP/1.1\r\n" + H + b"X: a\r\n b\r\n\r\n",
    "folded by tab": b"GET / HTTP/1.1\r\n" + H + b"X: a\r\n\tb\r\n\r\n",
    "space before the first header": b"GET / HTTP/1.1\r\n " + H + b"\r\n",
    "bare LF behind the request line": b"GET / HTTP/1.1\n" + H + b"\r\n",
    "bare LF between headers": b"GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n",
    "bare LF at the end": b"GET / HTTP/1.1\r\nHost: a\n\n",
    "LF CR LF at the end": b"GET / HTTP/1.1\r\nHost: a\n\r\n",
    "bare CR in a value": b"GET / HTTP/1.1\r\n" + H + b"X: a\rb\r\n\r\n",
    "bare CR hides a header": b"GET / HTTP/1.1\r\n" + H + b"X: a\rContent-Length: 3\r\n\r\n",
    "CR CR LF": b"GET / HTTP/1.1\r\r\n" + H + b"\r\n",
    "NUL in a value": b"GET / HTTP/1.1\r\n" + H + b"X: a\0b\r\n\r\n",
    "NUL in a name": b"GET / HTTP/1.1\r\n" + H + b"X\0: a\r\n\r\n",
    "control byte in a value": b"GET / HTTP/1.1\r\n" + H + b"X: a\x01b\r\n\r\n",
    "DEL in a value": b"GET / HTTP/1.1\r\n" + H + b"X: a\x7fb\r\n\r\n",
    "odd byte in a name": b"GET / HTTP/1.1\r\n" + H + b"X(Y): a\r\n\r\n",
    "byte above 127 in a name": b"GET / HTTP/1.1\r\n" + H + b"\xe4: a\r\n\r\n",
    "empty name": b"GET / HTTP/1.1\r\n" + H + b": a\r\n\r\n",
    "line without colon": b"GET / HTTP/1.1\r\n" + H + b"nonsense\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "no host with absolute target": b"GET http://a/ HTTP/1.1\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\n" + H + H + b"\r\n",
    "host list": b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n",
    "host with path": b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
    "host with user": b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n",
    "host empty": b"GET / HTTP/1.1\r\nHost:\r\n\r\n",
    "bad method": b"G(T / HTTP/1.1\r\n" + H + b"\r\n",
    "space before the method": b" GET / HTTP/1.1\r\n" + H + b"\r\n",
    "two spaces": b"GET  / HTTP/1.1\r\n" + H + b"\r\n",
    "space in the target": b"GET /a b HTTP/1.1\r\n" + H + b"\r\n",
    "tab in the target": b"GET /a\tb HTTP/1.1\r\n" + H + b"\r\n",
    "control byte in the target": b"GET /a\x01 HTTP/1.1\r\n" + H + b"\r\n",
    "fragment in the target": b"GET /a#b HTTP/1.1\r\n" + H + b"\r\n",
    "relative target": b"GET a HTTP/1.1\r\n" + H + b"\r\n",
    "asterisk for GET": b"GET * HTTP/1.1\r\n" + H + b"\r\n",
    "other scheme": b"GET ftp://a/ HTTP/1.1\r\n" + H + b"\r\n",
    "absolute target with user": b"GET http://u@a/ HTTP/1.1\r\n" + H + b"\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\n" + H + b"\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/2.0": b"GET / HTTP/2.0\r\n" + H + b"\r\n",
    "lower case version": b"GET / http/1.1\r\n" + H + b"\r\n",
    "bad token in Connection": b"GET / HTTP/1.1\r\n" + H + b"Connection: a b\r\n\r\n",
    "chunk size with sign": CHUNKED + b"+3\r\nabc\r\n0\r\n\r\n",
    "chunk size with 0x": CHUNKED + b"0x3\r\nabc\r\n0\r\n\r\n",
    "chunk size with space": CHUNKED + b"3 \r\nabc\r\n0\r\n\r\n",
    "chunk size empty": CHUNKED + b"\r\nabc\r\n0\r\n\r\n",
    "chunk size overflow": CHUNKED + b"1" + b"0" * 16 + b"\r\nabc",
    "chunk with bare LF": CHUNKED + b"3\nabc\r\n0\r\n\r\n",
    "chunk data too long": CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n",
    "chunk data ends by LF": CHUNKED + b"3\r\nabc\n0\r\n\r\n",
    "chunk extension with LF": CHUNKED + b"3;a\nb\r\nabc\r\n0\r\n\r\n",
    "chunk extension with CR": CHUNKED + b"3;a\rb\r\nabc\r\n0\r\n\r\n",
    "chunk extension without end": CHUNKED + b"3;" + b"a" * 70_000,
    "last chunk by LF": CHUNKED + b"3\r\nabc\r\n0\n\n",
    "trailer with bare LF": CHUNKED + b"0\r\nX: a\nY: b\r\n\r\n",
    "trailer folded": CHUNKED + b"0\r\nX: a\r\n b\r\n\r\n",
    "length among the trailers": CHUNKED + b"0\r\nContent-Length: 3\r\n\r\n",
}

# answers of an endpoint that must not reach the caller
BAD_ANSWERS = {
    "length and chunked": b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok",
    "the same length twice": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\nok",
    "length list": b"HTTP/1.1 200 OK\r\ncontent-length: 2, 2\r\n\r\nok",
    "length with sign": b"HTTP/1.1 200 OK\r\ncontent-length: +2\r\n\r\nok",
    "TE gzip, chunked": b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "TE identity": b"HTTP/1.1 200 OK\r\ntransfer-encoding: identity\r\n\r\nok",
    "TE on 1.0": b"HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "bare LF": b"HTTP/1.1 200 OK\ncontent-length: 2\n\nok",
    "bare LF inside": b"HTTP/1.1 200 OK\r\nx: y\ncontent-length: 2\r\n\r\nok",
    "bare CR": b"HTTP/1.1 200 OK\r\nx: y\rset-cookie: a\r\ncontent-length: 2\r\n\r\nok",
    "NUL": b"HTTP/1.1 200 OK\r\nx: \0\r\ncontent-length: 2\r\n\r\nok",
    "folded": b"HTTP/1.1 200 OK\r\nx: y\r\n z\r\ncontent-length: 2\r\n\r\nok",
    "space before colon": b"HTTP/1.1 200 OK\r\ncontent-length : 2\r\n\r\nok",
    "status of two digits": b"HTTP/1.1 20 OK\r\ncontent-length: 2\r\n\r\nok",
    "status of four digits": b"HTTP/1.1 2000 OK\r\ncontent-length: 2\r\n\r\nok",
    "HTTP/2": b"HTTP/2 200 OK\r\ncontent-length: 2\r\n\r\nok",
    "no status line": b"hello\r\n\r\n",
    "204 with a body": b"HTTP/1.1 204 No\r\ncontent-length: 2\r\n\r\nok",
    "204 chunked": b"HTTP/1.1 204 No\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "100 with a length": b"HTTP/1.1 100 C\r\ncontent-length: 2\r\n\r\nok",
    "101 that nobody asked for": b"HTTP/1.1 101 S\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
    "bad chunk at once": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
    "too many headers": b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 101 + b"\r\n",
    "head too large": b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * 70_000 + b"\r\n\r\n",
}


@pytest.mark.parametrize("name", GOOD)
async def test_a_good_request_goes_on_as(bed: Bed, name: str) -> None:
    sent, expected = GOOD[name]
    endpoint = await bed.endpoint()
    await bed.serve(endpoint)
    caller = await bed.caller()
    assert (await caller.ask(sent))[0] == 200
    assert (await caller.ask(GET))[0] == 200  # nothing is left of it, on either side
    assert plain(bytes(endpoint.received)) == expected + GET
    assert len(endpoint.peers) == 1


@pytest.mark.parametrize("name", BAD)
async def test_nothing_of_a_bad_request_goes_on(bed: Bed, name: str) -> None:
    endpoint = await bed.endpoint()
    await bed.serve(endpoint)
    caller = await bed.caller()
    caller.send(BAD[name] + GET)
    answer = await caller.rest()
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"\r\nconnection: close\r\n" in answer and b"\r\nx-meshbpf-reason: bad_request\r\n" in answer
    assert answer.count(b"HTTP/1.1") == 1
    assert not endpoint.received and not endpoint.peers
    record = await bed.record()
    assert (record.response_code, record.response_flags, record.reason) == (400, "DPE", "bad_request")
    assert bed.records.empty()


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_request_behind_a_good_one_goes_nowhere_either(bed: Bed, name: str) -> None:
    endpoint = await bed.endpoint()
    await bed.serve(endpoint)
    caller = await bed.caller()
    caller.send(GET + BAD[name] + GET)
    answer = await caller.rest()
    assert answer.startswith(OK + b"HTTP/1.1 400 Bad Request\r\n") and answer.count(b"HTTP/1.1") == 2
    assert plain(bytes(endpoint.received)) == GET


@pytest.mark.parametrize("name", BAD_ANSWERS)
async def test_nothing_of_a_bad_answer_reaches_the_caller(bed: Bed, name: str) -> None:
    bad = await bed.endpoint(script(BAD_ANSWERS[name], OK))
    await bed.serve(bad)
    caller = await bed.caller()
    status, head, body = await caller.ask(GET)
    assert (status, body) == (
        502,
        b"upstream connect error or disconnect/reset before headers. reset reason: protocol error",
    )
    assert b"x-meshbpf-reason: upstream_protocol_error\r\n" in head
    record = await bed.record()
    assert (record.response_flags, record.endpoint_outcome) == ("UPE", "upstream_protocol_error")
    assert bed.route.pool.open == 0  # that connection is not used again


async def test_what_comes_behind_an_answer_is_dropped_with_its_connection(bed: Bed) -> None:
    forged = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nforged"
    endpoint = await bed.endpoint(script(OK + forged))
    await bed.serve(endpoint)
    caller = await bed.caller()
    for _ in range(3):
        assert (await caller.ask(GET))[2] == b"ok"
    assert len(endpoint.peers) == 3


async def test_an_answer_to_nothing_ends_the_idle_connection(bed: Bed) -> None:
    endpoint = await bed.endpoint()
    await bed.serve(endpoint)
    caller = await bed.caller()
    await caller.ask(GET)
    endpoint.peers[0].send(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nforged")
    await bed.settle(lambda: bed.route.pool.open == 0)
    assert (await caller.ask(GET))[2] == b"ok"


async def test_a_bad_chunk_in_the_middle_breaks_the_request_off(bed: Bed) -> None:
    endpoint = await bed.endpoint()
    await bed.serve(endpoint)
    caller = await bed.caller()
    caller.send(CHUNKED + b"3\r\nabc\r\n")
    await bed.settle(lambda: b"abc" in endpoint.received)
    caller.send(b"xyz\r\n" + GET)
    assert (await caller.rest()).startswith(b"HTTP/1.1 400 ")
    assert endpoint.received.endswith(b"3\r\nabc\r\n")  # no end: the endpoint cannot take it for the whole


async def test_a_bad_chunk_in_the_middle_breaks_the_answer_off(bed: Bed) -> None:
    start = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n"
    endpoint = await bed.endpoint(script(start))
    await bed.serve(endpoint)
    caller = await bed.caller()
    caller.send(GET)
    assert await caller.until(b"abc\r\n")
    endpoint.peers[0].send(b"xyz\r\n")
    with pytest.raises(ConnectionResetError):
        await caller.rest()
    record = await bed.record()
    assert (record.response_code, record.response_flags) == (200, "UPE")


@pytest.mark.parametrize(
    ("request_", "status", "reason"),
    [
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414, b"head_too_large"),
        (b"GET /" + b"a" * 9000, 414, b"head_too_large"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"x: y\r\n" * 100 + b"\r\n", 431, b"head_too_large"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nx: " + b"y" * 70_000 + b"\r\n\r\n", 431, b"head_too_large"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nx: " + b"y" * 70_000, 431, b"head_too_large"),
        (b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", 405, b"connect_method"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nExpect: 200-ok\r\n\r\n", 417, b"expectation_unknown"),
    ],
)
async def test_refused_heads(bed: Bed, request_: bytes, status: int, reason: bytes) -> None:
    endpoint = await bed.endpoint()
    await bed.serve(endpoint)
    caller = await bed.caller()
    caller.send(request_)
    answer = await caller.rest()
    assert answer.startswith(b"HTTP/1.1 %d " % status) and b"x-meshbpf-reason: " + reason + b"\r\n" in answer
    assert not endpoint.peers
    assert (await bed.record()).response_code == status


async def test_connect_is_refused_also_when_its_header_lines_are_known(bed: Bed) -> None:
    endpoint = await bed.endpoint()
    await bed.serve(endpoint)
    caller = await bed.caller()
    await caller.ask(GET)
    caller.send(b"CONNECT /x HTTP/1.1\r\nHost: a\r\n\r\n")
    answer = await caller.rest()
    assert answer.startswith(b"HTTP/1.1 405 ") and b"x-meshbpf-reason: connect_method\r\n" in answer
    assert b"CONNECT" not in endpoint.received


async def test_a_hundred_headers_are_fine(bed: Bed) -> None:
    await bed.serve(await bed.endpoint())
    caller = await bed.caller()
    assert (await caller.ask(b"GET / HTTP/1.1\r\nHost: a\r\n" + b"x: y\r\n" * 99 + b"\r\n"))[0] == 200
