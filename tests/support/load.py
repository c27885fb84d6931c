"""A careful HTTP client under load: every request is accounted for. `load.py HOST PORT CONNECTIONS RATE new|kept`.

RATE is requests per second over all connections (0: as fast as they come back); `new` makes a connection per request.
Prints `begun` when each client has had an answer, runs until stdin ends (at most 60 s), then prints the result as JSON.

A request fails when the caller gets no whole 2xx answer. On a kept connection that ended without a byte of an answer
every HTTP client asks again on a new one: that is counted as `stale`, and only the second try can fail.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import uvloop

MOST_SECONDS = 60.0
PATIENCE = 10.0


class Stale(Exception):
    """The kept connection had ended."""


@dataclass
class Result:
    ok: int = 0
    stale: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    failed_kept: Counter[str] = field(default_factory=Counter)
    endpoints: Counter[str] = field(default_factory=Counter)
    slowest_ms: float = 0.0
    first_failure: float = 0.0  # CLOCK_MONOTONIC
    last_failure: float = 0.0


class Load:
    def __init__(self, host: str, port: int, connections: int, rate: float, new: bool) -> None:
        self.host, self.port, self.connections, self.new = host, port, connections, new
        self.result = Result()
        self.stop = asyncio.Event()
        self._unanswered = connections  # clients that have had no answer yet
        self._gap = 1 / rate if rate else 0.0
        self._next = time.monotonic()
        self._request = f"GET /load HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()

    async def run(self) -> None:
        await asyncio.gather(*(self._client() for _ in range(self.connections)))

    async def _pace(self) -> None:
        if self._gap:
            self._next = max(self._next + self._gap, time.monotonic() - 0.1)
            await asyncio.sleep(max(0.0, self._next - time.monotonic()))

    async def _client(self) -> None:
        kept: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        answered = False
        while not self.stop.is_set():
            await self._pace()
            begin = time.monotonic()
            try:
                async with asyncio.timeout(PATIENCE):
                    kept = await self._ask(kept)
            except Stale:
                self.result.stale += 1
                kept = None
                try:
                    async with asyncio.timeout(PATIENCE):
                        kept = await self._ask(None)
                except (OSError, EOFError, TimeoutError, ValueError) as error:
                    self._fail(self.result.failed, error)
                    continue
            except (OSError, EOFError, TimeoutError, ValueError) as error:
                self._fail(self.result.failed_kept if kept else self.result.failed, error)
                kept = None
                continue
            self.result.slowest_ms = max(self.result.slowest_ms, (time.monotonic() - begin) * 1e3)
            self.result.ok += 1
            if not answered:
                answered = True
                self._unanswered -= 1
                if not self._unanswered:
                    print("begun", flush=True)
        if kept:
            kept[1].close()

    def _fail(self, where: Counter[str], error: Exception) -> None:
        where[f"{type(error).__name__}: {error}"] += 1
        self.result.last_failure = time.monotonic()
        self.result.first_failure = self.result.first_failure or self.result.last_failure

    async def _ask(
        self, kept: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """One request and its answer; the connection, if it may be used again."""
        reader, writer = kept or await asyncio.open_connection(self.host, self.port)
        whole = False
        try:
            try:
                writer.write(self._request)
                first = await reader.read(1)
            except ConnectionError as error:
                raise Stale if kept else error from error
            if not first:
                raise Stale if kept else EOFError("closed without an answer")
            lines = (first + await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
            fields = dict(line.split(b": ", 1) for line in lines[1:] if b": " in line)
            body = await reader.readexactly(int(fields[b"content-length"]))
            if not lines[0].startswith(b"http/1.1 2"):
                raise ValueError(f"{lines[0].decode()} {fields.get(b'x-meshbpf-reason', b'').decode()}")
            self.result.endpoints[json.loads(body)["endpoint"]] += 1
            whole = not self.new and fields.get(b"connection") != b"close"
        finally:
            if not whole:
                writer.close()
        return (reader, writer) if whole else None


async def main() -> None:
    host, port, connections, rate, kind = sys.argv[1:]
    load = Load(host, int(port), int(connections), float(rate), kind == "new")
    loop = asyncio.get_running_loop()
    loop.add_reader(0, load.stop.set)
    loop.call_later(MOST_SECONDS, load.stop.set)
    await load.run()
    loop.remove_reader(0)
    print(json.dumps(vars(load.result)), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
