"""The endpoint of long checksummed streams: `python -m bench.stream_server RAW HTTP` (ports).

Rule: it says in the last frame what really came, and nothing about why. Over TCP it sends until the caller's last
frame, both ways at once; over HTTP a stream is a name, whichever connections its requests come by.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable

import uvloop

from bench.course import HEAD, Incoming, Outgoing, Wrong

SIZE = 2048
GAP = 0.25  # seconds between two frames of one direction
Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter
BROKEN = (OSError, asyncio.IncompleteReadError)


async def take(reader: Reader, came: Incoming) -> None:
    """One frame."""
    head = await reader.readexactly(HEAD.size)
    came.take(head, await reader.readexactly(came.rest(head)))


async def send(writer: Writer, out: Outgoing, until: Callable[[], bool]) -> None:
    while not until():
        writer.write(out.frame(SIZE))
        await writer.drain()
        await asyncio.sleep(GAP)


async def answer_raw(reader: Reader, writer: Writer) -> None:
    """Send until the other side's last frame has come, then say what did."""
    out, came = Outgoing(0), Incoming()
    over = False
    sending = asyncio.ensure_future(send(writer, out, lambda: over))
    try:
        with contextlib.suppress(Wrong):  # the last frame says so
            while came.told is None:
                await take(reader, came)
        over = True
        await sending
        writer.write(out.last(came.received))
        await writer.drain()
    except BROKEN:
        sending.cancel()
    finally:
        writer.close()
        await asyncio.gather(sending, return_exceptions=True)


class Talk:
    """A stream of requests and answers, whichever connections they come by."""

    def __init__(self) -> None:
        self.out, self.came = Outgoing(0), Incoming()
        self.answered = b""

    def answer(self, body: bytes) -> bytes:
        head = body[: HEAD.size]
        if not self.came.again(head):  # else the last answer got lost on its way
            self.came.rest(head)
            self.came.take(head, body[HEAD.size :])
            over = self.came.told is not None
            self.answered = self.out.last(self.came.received) if over else self.out.frame(SIZE)
        return self.answered


async def answer_http(talks: dict[bytes, Talk], reader: Reader, writer: Writer) -> None:
    """POST /NAME takes a frame and gives one; GET gives them without end."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            verb, path, _version = head.split(b"\r\n", 1)[0].split()
            if verb == b"get":
                writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
                out = Outgoing(1)
                while True:
                    frame = out.frame(SIZE)
                    writer.write(b"%x\r\n%b\r\n" % (len(frame), frame))
                    await writer.drain()
                    await asyncio.sleep(GAP)
            length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
            body = await reader.readexactly(length)
            try:
                status, said = b"200 OK", talks.setdefault(path, Talk()).answer(body)
            except Wrong as error:
                status, said = b"409 Conflict", str(error).encode()
            writer.write(b"HTTP/1.1 %b\r\ncontent-length: %d\r\n\r\n%b" % (status, len(said), said))
            await writer.drain()
    except BROKEN:
        pass  # the caller is done
    finally:
        writer.close()


async def serve(raw: int, http: int) -> None:
    talks: dict[bytes, Talk] = {}
    servers = [
        await asyncio.start_server(answer_raw, "127.0.0.1", raw, backlog=1024),
        await asyncio.start_server(lambda r, w: answer_http(talks, r, w), "127.0.0.1", http, backlog=1024),
    ]
    print("listening", flush=True)
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    uvloop.run(serve(*map(int, sys.argv[1:])))
