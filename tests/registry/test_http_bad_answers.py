"""Whatever answers where a registry should be: what it said before stays, the error says why, and it ends by itself."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from meshbpf.registry import client
from tests.registry.test_http_source import following, ports, soon, well


@contextlib.asynccontextmanager
async def server(answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> AsyncIterator[str]:
    """Something that is no registry."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            await answer(reader, writer)
            await writer.drain()
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    listening.close()


GOOD = b'{"generation": 7, "services": [{"service": "orders", "instances": [{"id": "a", "address": "198.51.100.8", "ports": {"http": {"port": 8081}}}]}]}'  # noqa: E501


def ok(content: bytes, length: int | None = None, more: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n%b" % (
        more,
        len(content) if length is None else length,
        content,
    )


BAD_ANSWERS = [
    (b"SSH-2.0-OpenSSH_9.2\r\n", "cannot reach the registry"),
    (ok(b"<html>hello</html>"), "answered what no registry says"),
    (ok(b"[1]"), "answered what no registry says"),
    (ok(b"\xff\xfe\x00"), "answered what no registry says"),
    (ok(b"[" * 100_000), "answered what no registry says"),
    (ok(b'{"generation": %s, "services": []}' % (b"9" * 5000)), "answered what no registry says"),
    (ok(GOOD[:60]), "answered what no registry says"),
    (ok(GOOD[:60], length=len(GOOD)), "cannot reach the registry"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n" + GOOD[:5] + b"\r\n", "cannot reach the registry"),
    (ok(gzip.compress(GOOD), more=b"Content-Encoding: gzip\r\n"), "answered what no registry says"),
    (b"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\noops", "answered 500: b'oops'"),
    (b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n", "answered 401"),
    (b"HTTP/1.1 302 Elsewhere\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n", "answered 302"),
    (b'HTTP/1.1 403 No\r\nContent-Length: 33\r\n\r\n{"error": "no, me", "field": "H"}', "answered 403: H: no, me"),
    (b"", "cannot reach the registry"),
]


@pytest.mark.parametrize(("bad", "why"), BAD_ANSWERS)
async def test_whatever_answers_there_changes_nothing_here_but_the_error(bad: bytes, why: str) -> None:
    answers = [ok(GOOD), bad]

    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answers.pop(0) if len(answers) > 1 else answers[0])

    async with server(answer) as where, following(where) as snapshots:
        first = await anext(snapshots)
        assert ports(first) == [8081]
        second = await soon(snapshots, lambda s: bool(s.error))
        assert why in second.error and where in second.error + first.source
        assert second.services == first.services and second.stale
        assert "\n" not in second.error
        answers[:] = [ok(GOOD)]
        assert (await soon(snapshots, well)).services == first.services


async def test_a_body_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_ANSWER", 1 << 20)
    sent = 0

    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        while sent < 1 << 30:
            writer.write(b" " * 65536)
            sent += 65536
            await writer.drain()

    async with server(answer) as where, following(where) as snapshots:
        assert "answered more than 1 MiB" in (await anext(snapshots)).error
        assert sent < 1 << 25


async def test_who_says_nothing_at_all_holds_nobody_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with following(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.3) as snapshots:
            begun = time.monotonic()
            assert "did not answer in 0.3 s" in (await anext(snapshots)).error
            assert time.monotonic() - begun < 2.0
