"""The callers of long checksummed streams: `python -m bench.stream_callers NAME:KIND:HOST:COUNT…`.

Kinds: `lasting` and `brief`, TCP both ways at once, until the end or until told to wind up; `kept`, HTTP requests on
one connection for as long as the mesh keeps it, one stream over all of its connections; `download`, an HTTP answer that
never ends, on a connection that has had some answers before, so that it is redirected where it can be.

Says `begun` when every stream runs, reads `wind` (brief ones finish) and `end` from stdin, and prints the tally: by
NAME how many streams were whole, cut, wrong or never came up, the bytes, and how often HTTP was told to close.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from bench.course import HEAD, Incoming, Outgoing, Wrong
from bench.stream_server import BROKEN, GAP, SIZE, Reader, Writer, send, take

PATIENCE = 20.0  # for an answer
FIRST = 6  # answers before a download: by then the connection is redirected, where it can be


class Stale(Exception):
    """A kept connection had ended before a byte of the answer: whoever speaks HTTP asks again on another one."""


class Cut(Exception):
    """An answer that is none of the endpoint's."""


class Callers:
    def __init__(self, dice: random.Random) -> None:
        self.tally: dict[str, Counter[str]] = {}
        self.winding, self.ending = asyncio.Event(), asyncio.Event()
        self._dice = dice
        self._waiting = 0  # streams that do not run yet
        self._numbers = itertools.count(1)
        self._kinds: dict[str, Callable[[Counter[str], str, Callable[[], None]], Coroutine[Any, Any, None]]] = {
            "lasting": self.lasting, "brief": self.brief, "kept": self.kept, "download": self.download,
        }  # fmt: skip

    async def run(self, wanted: list[str]) -> None:
        streams = []
        for name, kind, host, count in (one.split(":") for one in wanted):
            tally = self.tally.setdefault(name, Counter())
            streams += [self._stream(self._kinds[kind], tally, host) for _ in range(int(count))]
        self._waiting = len(streams)
        await asyncio.gather(*streams)

    def told(self) -> None:
        """Something came in on stdin, or its end."""
        words = os.read(0, 4096).split()
        if b"wind" in words:
            self.winding.set()
        if b"end" in words or not words:
            self.ending.set()

    async def _stream(self, kind: Any, tally: Counter[str], host: str) -> None:
        begun = asyncio.Event()

        def runs() -> None:
            if not begun.is_set():
                begun.set()
                self._waiting -= 1
                if not self._waiting:
                    print("begun", flush=True)

        tally["streams"] += 1
        await asyncio.sleep(self._dice.random())  # connections do not come all at once
        try:
            await kind(tally, host, runs)
        except Wrong as error:
            tally["wrong"] += 1
            tally[f"wrong: {error}"] += 1
        except (*BROKEN, Cut, TimeoutError) as error:
            tally["cut" if begun.is_set() else "failed"] += 1
            tally[f"{type(error).__name__}: {error}"[:60]] += 1
        runs()

    async def lasting(self, tally: Counter[str], host: str, runs: Callable[[], None]) -> None:
        await self._raw(tally, host, runs, self.ending)

    async def brief(self, tally: Counter[str], host: str, runs: Callable[[], None]) -> None:
        await self._raw(tally, host, runs, self.winding)

    async def _raw(self, tally: Counter[str], host: str, runs: Callable[[], None], over: asyncio.Event) -> None:
        reader, writer = await asyncio.open_connection(host, 80)
        out, came = Outgoing(next(self._numbers)), Incoming()

        async def sending() -> None:
            await send(writer, out, over.is_set)
            writer.write(out.last(came.received))

        sender = asyncio.ensure_future(sending())
        try:
            while came.told is None:
                await asyncio.wait_for(take(reader, came), PATIENCE)
                if came.received >= 2 * SIZE:
                    runs()
            if not over.is_set():
                raise Wrong("the endpoint has ended the stream")
            await sender
            self._whole(tally, out, came)
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
            tally["sent"] += out.sent
            tally["received"] += came.received
            writer.close()

    def _whole(self, tally: Counter[str], out: Outgoing, came: Incoming) -> None:
        assert came.told is not None
        if (lost := out.sent - came.told[1]) != 0:
            tally["lost"] += lost
            raise Wrong(f"{lost} bytes did not arrive")
        tally["whole"] += 1

    # The names of streams are those of one process: the endpoint may hear several.

    async def kept(self, tally: Counter[str], host: str, runs: Callable[[], None]) -> None:
        out, came, path = Outgoing(number := next(self._numbers)), Incoming(), f"/{os.getpid()}-{number}"
        connection: tuple[Reader, Writer] | None = None
        answers = 0
        try:
            while came.told is None:
                frame = out.last(came.received) if self.ending.is_set() else out.frame(SIZE)
                try:
                    connection = await self._ask(connection, host, path, frame, came, tally)
                except Stale:
                    tally["stale"] += 1
                    connection = await self._ask(None, host, path, frame, came, tally)
                answers += 1
                if answers == FIRST:
                    runs()
                await asyncio.sleep(GAP)
            self._whole(tally, out, came)
        finally:
            tally["sent"] += out.sent
            tally["received"] += came.received
            if connection is not None:
                connection[1].close()

    async def _ask(
        self, kept: tuple[Reader, Writer] | None, host: str, path: str, frame: bytes, came: Incoming,
        tally: Counter[str],
    ) -> tuple[Reader, Writer] | None:  # fmt: skip
        """One request and its answer; the connection, if it is kept."""
        reader, writer = kept or await asyncio.open_connection(host, 80)
        try:
            writer.write(
                b"POST %b HTTP/1.1\r\nhost: streams\r\ncontent-length: %d\r\n\r\n%b"
                % (path.encode(), len(frame), frame)
            )
            try:
                first = await asyncio.wait_for(reader.read(1), PATIENCE)
            except ConnectionError as error:
                raise Stale if kept else error from error
            if not first:
                raise Stale if kept else Cut("closed without an answer")
            lines = (first + await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
            fields = dict(line.split(b": ", 1) for line in lines[1:] if b": " in line)
            body = await reader.readexactly(int(fields[b"content-length"]))
            if lines[0].split()[1] == b"409":
                raise Wrong(body.decode())
            if lines[0].split()[1] != b"200":
                raise Cut(f"{lines[0].decode()} {fields.get(b'x-meshbpf-reason', b'').decode()}")
            head = body[: HEAD.size]
            came.rest(head)
            came.take(head, body[HEAD.size :])
        except BaseException:
            writer.close()
            raise
        if fields.get(b"connection") == b"close":
            tally["told to close"] += 1
            writer.close()
            return None
        return reader, writer

    async def download(self, tally: Counter[str], host: str, runs: Callable[[], None]) -> None:
        out, before, path = Outgoing(number := next(self._numbers)), Incoming(), f"/{os.getpid()}-{number}"
        connection: tuple[Reader, Writer] | None = None
        for _ in range(FIRST):
            connection = await self._ask(connection, host, path, out.frame(SIZE), before, tally)
        assert connection is not None
        reader, writer = connection
        came = Incoming()
        over = asyncio.ensure_future(self.ending.wait())
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nhost: streams\r\n\r\n".encode())
            status = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n", 1)[0]
            if status.split()[1] != b"200":
                raise Cut(status.decode())
            while not self.ending.is_set():
                chunk = asyncio.ensure_future(self._chunk(reader, came))
                await asyncio.wait((chunk, over), timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
                if chunk.done():
                    chunk.result()
                    runs()
                else:
                    chunk.cancel()
                    await asyncio.gather(chunk, return_exceptions=True)
                    if not self.ending.is_set():
                        raise TimeoutError("no more came")
            tally["whole"] += 1
        finally:
            over.cancel()
            tally["received"] += came.received
            writer.close()

    async def _chunk(self, reader: Reader, came: Incoming) -> None:
        size = int((await reader.readuntil(b"\r\n")), 16)
        body = await reader.readexactly(size + 2)
        came.rest(body[: HEAD.size])
        came.take(body[: HEAD.size], body[HEAD.size : -2])


async def call(wanted: list[str]) -> None:
    callers = Callers(random.Random(len(wanted)))
    asyncio.get_running_loop().add_reader(0, callers.told)
    await callers.run(wanted)
    print(json.dumps(callers.tally), flush=True)


if __name__ == "__main__":
    # Not uvloop: it holds a pipe with both ends, and who does is never redirected.
    asyncio.run(call(sys.argv[1:]))
