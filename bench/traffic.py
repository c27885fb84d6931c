"""Both ends of a soak's load, each a process: `python -m bench.traffic serve PORT…` and `… call RATE TALLY HOST…`.

Rule: bounded in rate, and honest about failures. Callers share RATE requests per second; some keep their connections,
some make one per request, some misbehave on purpose: they leave in the middle, reset, read slowly. Every answer to the
others is checked byte by byte. What came of it is written to the file TALLY each second, and at the end; SIGTERM ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import uvloop

SIZES = (0, 1, 400, 400, 400, 5000, 5000, 60_000, 300_000)  # of answers, as often as they stand here
LARGE = 2 << 20  # what nobody reads whole
PATIENCE = 10.0
KEPT, FRESH, ROUGH = 4, 2, 1  # callers of each kind, for each host
LONGEST = 300  # requests on one connection
Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter
Kind = Callable[[str], Coroutine[Any, Any, None]]  # a caller of a host
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close by RST


def body(size: int) -> bytes:
    """What an answer of that size holds: other sizes hold other bytes, so a mixed-up answer is seen."""
    return bytes([97 + size % 26]) * size


# --- the endpoints -----------------------------------------------------------------------------------------------


async def answer(reader: Reader, writer: Writer) -> None:
    """GET /N: N bytes; a request's body is read first."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if (at := head.find(b"content-length:")) >= 0:
                await reader.readexactly(int(head[at + 15 :].split(b"\r\n", 1)[0]))
            size = int(head.split(b" ", 2)[1][1:] or 0)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (size, body(size)))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # the caller is done
    finally:
        writer.close()


async def serve(ports: list[int]) -> None:
    """On all of the ports, opened in this order."""
    servers = [await asyncio.start_server(answer, "127.0.0.1", port, backlog=1024) for port in ports]
    await asyncio.gather(*(server.serve_forever() for server in servers))


# --- the callers -------------------------------------------------------------------------------------------------


class Callers:
    def __init__(self, rate: float, hosts: list[str], dice: random.Random) -> None:
        self.dice = dice
        self.stop = asyncio.Event()
        self.tally: Counter[str] = Counter()
        kinds: list[tuple[Kind, int]] = [(self.kept, KEPT), (self.fresh, FRESH), (self.rough, ROUGH)]
        self._callers = [(kind, host) for host in hosts for kind, count in kinds for _ in range(count)]
        self._gap = len(self._callers) / rate

    async def run(self) -> None:
        await asyncio.gather(*(self._again(kind, host) for kind, host in self._callers))

    async def _again(self, kind: Kind, host: str) -> None:
        """One caller, over and over; what fails is counted by what it met."""
        await asyncio.sleep(self.dice.random() * self._gap)
        while not self.stop.is_set():
            try:
                await kind(host)
            except (OSError, EOFError, ValueError, TimeoutError) as error:
                self.tally["failed"] += 1
                self.tally[f"failed {type(error).__name__}: {error}"[:80]] += 1
                await asyncio.sleep(self._gap)

    async def kept(self, host: str) -> None:
        """Many requests on one connection: those that get redirected."""
        reader, writer = await asyncio.wait_for(asyncio.open_connection(host, 80), PATIENCE)
        try:
            for _ in range(self.dice.randrange(LONGEST)):
                if self.stop.is_set():
                    break
                await self._paced(self._ask(reader, writer, host))
        finally:
            writer.close()

    async def fresh(self, host: str) -> None:
        """A connection for one request."""

        async def once() -> None:
            reader, writer = await asyncio.open_connection(host, 80)
            try:
                await self._ask(reader, writer, host)
            finally:
                writer.close()

        await self._paced(once())

    async def rough(self, host: str) -> None:
        """A caller that leaves when nobody expects it. What it meets is its own fault."""
        with contextlib.suppress(OSError, EOFError, TimeoutError):
            await self._paced(self._leave(host, self.dice.randrange(6)))
        self.tally["aborted"] += 1

    async def _leave(self, host: str, how: int) -> None:
        reader, writer = await asyncio.open_connection(host, 80)
        made: socket.socket = writer.get_extra_info("socket")
        try:
            if how == 0:
                return  # said nothing
            if how == 1:
                writer.write(b"GET /1 HTTP/1.1\r\nHo")
            elif how == 2:
                writer.write(b"POST /1 HTTP/1.1\r\nHost: soak\r\nContent-Length: 1000000\r\n\r\n" + bytes(5000))
            else:
                writer.write(b"GET /%d HTTP/1.1\r\nHost: soak\r\n\r\n" % LARGE)
                await reader.readexactly(100)
            if how == 3:
                writer.write_eof()
                return
            if how == 4:
                await asyncio.sleep(1.0)  # the answer piles up meanwhile
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        finally:
            writer.transport.abort() if how != 3 else writer.close()

    async def _ask(self, reader: Reader, writer: Writer, host: str) -> None:
        size = self.dice.choice(SIZES)
        sent = self.dice.choice((0, 0, 0, 2000, 100_000))
        verb, length = (b"POST", b"Content-Length: %d\r\n" % sent) if sent else (b"GET", b"")
        writer.write(b"%b /%d HTTP/1.1\r\nHost: %b\r\n%b\r\n%b" % (verb, size, host.encode(), length, bytes(sent)))
        head = await reader.readuntil(b"\r\n\r\n")
        lower = head.lower()
        if not lower.startswith(b"http/1.1 200"):
            raise ValueError(head.split(b"\r\n", 1)[0].decode("latin-1"))
        length_said = int(lower[lower.index(b"content-length:") + 15 :].split(b"\r\n", 1)[0])
        if await reader.readexactly(length_said) != body(size):
            raise ValueError(f"not the {size} bytes that were asked for")
        self.tally["ok"] += 1

    async def _paced(self, work: Awaitable[None]) -> None:
        """The work, bounded in time, and the pause that keeps the caller to its share of the rate."""
        begun = time.monotonic()
        await asyncio.wait_for(work, PATIENCE)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stop.wait(), max(0.0, self._gap - (time.monotonic() - begun)))


async def call(rate: float, file: Path, hosts: list[str]) -> None:
    callers = Callers(rate, hosts, random.Random(len(hosts)))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, callers.stop.set)

    def write() -> None:
        staged = file.with_suffix(".new")
        staged.write_text(json.dumps(callers.tally))
        staged.replace(file)

    running = asyncio.ensure_future(callers.run())
    while not running.done():
        await asyncio.wait([running], timeout=1.0)
        write()
    running.result()


if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    if role == "serve":
        uvloop.run(serve([int(port) for port in arguments]))
    elif role == "call":
        # Not uvloop: it holds a pipe with both ends, and who does is never redirected.
        asyncio.run(call(float(arguments[0]), Path(arguments[1]), arguments[2:]))
    else:
        sys.exit(f"{role}: serve or call")
