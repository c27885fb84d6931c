"""The demo's small services: `python -m meshbpf.demo.apps http|tcp NAME ADDRESS PORT`. They know nothing of a mesh.

`http` answers every request with its name; `tcp` answers every line with its name. Says `listening` when it does.
"""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio import StreamReader as Reader
from asyncio import StreamWriter as Writer


async def http(name: str, reader: Reader, writer: Writer) -> None:
    """GET only, keep-alive, one write per answer."""
    try:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            body = json.dumps({"from": name}).encode() + b"\n"
            lines = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            writer.write(lines.encode() + body)
            await writer.drain()
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
        writer.close()  # the caller is done


async def tcp(name: str, reader: Reader, writer: Writer) -> None:
    try:
        while line := await reader.readline():
            writer.write(f"{name}: ".encode() + line)
            await writer.drain()
    except ConnectionError:
        print(f"{name}: the caller went away", file=sys.stderr)
    writer.close()


async def serve(kind: str, name: str, address: str, port: int) -> None:
    talk = {"http": http, "tcp": tcp}[kind]
    server = await asyncio.start_server(lambda reader, writer: talk(name, reader, writer), address, port)
    print("listening", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
