"""Large bodies whose reader stops in the middle. Endpoint: `bulk.py serve`; client: `bulk.py ask ADDRESS WAY BYTES`.

The client keeps one connection: six small requests first, so that it may have joined the redirect table, then the large
one. Whoever reads stops after the first bytes, says `stopped` on stdout, and goes on when a line comes in on stdin.
"""

from __future__ import annotations

import hashlib
import socket
import sys
from typing import BinaryIO

CHUNK = bytes(range(256)) * 4096  # 1 MiB
SMALL_REQUESTS = 6


def pause() -> None:
    print("stopped", flush=True)
    sys.stdin.readline()


def head(stream: BinaryIO) -> tuple[str, int]:
    """(first line, Content-Length) of a message."""
    first = stream.readline().decode().strip()
    length = 0
    while (line := stream.readline()) not in (b"\r\n", b""):
        name, _colon, value = line.decode().partition(":")
        if name.lower() == "content-length":
            length = int(value)
    return first, length


def swallow(stream: BinaryIO, length: int, stop: bool) -> str:
    """Read `length` bytes, stopping once on the way; the digest of them."""
    digest, left, buffer = hashlib.blake2b(), length, memoryview(bytearray(1 << 20))
    while left:
        count = stream.readinto(buffer[: min(left, len(buffer))])  # type: ignore[attr-defined]
        if not count:
            return f"ended {left} bytes early"
        digest.update(buffer[:count])
        left -= count
        if stop:
            pause()
            stop = False
    return digest.hexdigest()


def expected(length: int) -> str:
    digest = hashlib.blake2b()
    for _ in range(length // len(CHUNK)):
        digest.update(CHUNK)
    return digest.hexdigest()


def serve() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    while True:
        connection, _address = listener.accept()
        stream = connection.makefile("rb", buffering=0)
        while True:
            first, length = head(stream)
            if not first:
                break
            method, path, _version = first.split()
            if method == "PUT":
                body = swallow(stream, length, stop=True).encode()
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
            elif path == "/":
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            else:
                size = int(path[1:])
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
                for _ in range(size // len(CHUNK)):
                    connection.sendall(CHUNK)
        stream.close()
        connection.close()


def ask(address: str, way: str, size: int) -> None:
    connection = socket.create_connection((address, 80))
    connection.settimeout(120)  # not for the time: it makes the socket non-blocking, so that it may be redirected
    stream = connection.makefile("rb", buffering=0)
    for _ in range(SMALL_REQUESTS):
        connection.sendall(b"GET / HTTP/1.1\r\nhost: bulk\r\n\r\n")
        swallow(stream, head(stream)[1], stop=False)
    if way == "download":
        connection.sendall(b"GET /%d HTTP/1.1\r\nhost: bulk\r\n\r\n" % size)
        seen = swallow(stream, head(stream)[1], stop=True)
    else:
        connection.sendall(b"PUT / HTTP/1.1\r\nhost: bulk\r\ncontent-length: %d\r\n\r\n" % size)
        for _ in range(size // len(CHUNK)):
            connection.sendall(CHUNK)
        _first, length = head(stream)
        seen = stream.read(length).decode()
    print("whole" if seen == expected(size) else f"broken: {seen}", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        ask(sys.argv[2], sys.argv[3], int(sys.argv[4]))
