"""A quick endpoint for load: HTTP/1.1 on one loop, thousands of requests a second. `quick.py NAME [ADDRESS [PORT]]`.

Prints its port once it listens. GET answers {"endpoint": NAME, "client": caller's address}; /slow?s=2 answers after
that many seconds, /bytes?n=1000 with so many bytes; a request's body is counted ("body").
"""

from __future__ import annotations

import asyncio
import json
import sys
from urllib.parse import parse_qs, urlsplit

import uvloop

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter


async def _serve(name: str, reader: Reader, writer: Writer) -> None:
    client = writer.get_extra_info("peername")[0]
    try:
        while True:
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            fields = {k.lower(): v.strip() for k, _colon, v in (line.partition(":") for line in lines[1:] if line)}
            size = int(fields.get("content-length", "0"))
            if size:
                await reader.readexactly(size)
            url = urlsplit(lines[0].split()[1])
            query = parse_qs(url.query)
            if url.path == "/slow":
                await asyncio.sleep(float(query["s"][0]))
            body = json.dumps({"endpoint": name, "client": client, "body": size}).encode()
            if url.path == "/bytes":
                body = b"x" * int(query["n"][0])
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
            if fields.get("connection", "").lower() == "close":
                break
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # the caller is done
    finally:
        writer.close()


async def _main(name: str, address: str, port: int) -> None:
    async def serve(reader: Reader, writer: Writer) -> None:
        await _serve(name, reader, writer)

    server = await asyncio.start_server(serve, address, port, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_main(sys.argv[1], (sys.argv[2:] or ["127.0.0.1"])[0], int((sys.argv[3:] or ["0"])[0])))
