"""Apache (TCP_DEFER_ACCEPT), nginx and HAProxy (splice), in the mesh themselves, answer through it as without it.

A listener that defers accept (KERNEL.md B6-2) lets the caller be connected long before there is a socket on its side,
and for as long as the caller says nothing.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import daemons
from tests.support.machine import Machine, free_port
from tests.support.ways import ADDRESSES, REDIRECT, Ways

SIZES = (1, 4000, 70_000, 900_000, 8 << 20)
SERVERS = ("apache", "nginx", "haproxy")
# As many small requests as make a connection join, then all sizes, on one connection that does not block.
CALLS = """
import asyncio, hashlib, sys
async def main(host, port, sizes):
    reader, writer = await asyncio.open_connection(host, port)
    for size in [sizes[0]] * 12 + sizes + sizes[::-1]:
        for method in "GET", "HEAD":
            writer.write(f"{method} /{size} HTTP/1.1\\r\\nHost: web\\r\\n\\r\\n".encode())
            head = (await reader.readuntil(b"\\r\\n\\r\\n")).decode().splitlines()
            fields = {k.lower(): v for k, v in (line.split(": ", 1) for line in head[1:] if line)}
            body = await reader.readexactly(size) if method == "GET" else b""
            said = [head[0], *(fields[name] for name in ("content-length", "last-modified", "accept-ranges"))]
            print(method, size, *said, hashlib.sha256(body).hexdigest())
asyncio.run(main(sys.argv[1], int(sys.argv[2]), [int(size) for size in sys.argv[3:]]))
"""


@contextmanager
def server_of(kind: str, machine: Machine, root: Path) -> Iterator[int]:
    """It serves the files below `root`; HAProxy, which has none, passes on what an nginx outside the mesh serves."""
    if kind == "apache":
        with daemons.apache(machine, root, meshed=True) as port:
            yield port
        return
    port, behind = free_port(), free_port()
    files = f"root {root}; sendfile on;"
    if kind == "nginx":
        with daemons.nginx(machine, f"server {{ listen 127.0.0.1:{port}; {files} }}", port, meshed=True):
            yield port
        return
    sections = f"listen web\n  bind 127.0.0.1:{port}\n  server one 127.0.0.1:{behind}"
    with daemons.nginx(machine, f"server {{ listen 127.0.0.1:{behind}; {files} }}", behind):
        with daemons.haproxy(machine, sections, port, meshed=True):
            yield port


@pytest.fixture(scope="module", params=SERVERS)
def ways(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
    folder = tmp_path_factory.mktemp(request.param)
    with (
        daemons.folder_of(daemons.NOBODY) as root,
        Machine(folder, f"mt-{request.param}-{folder.parent.name[-8:]}") as machine,
    ):
        for size in SIZES:
            (root / str(size)).write_bytes((hashlib.sha512(b"%d" % size).digest() * (size // 64 + 1))[:size])
        with server_of(request.param, machine, root) as port, Ways(machine, port, port=80, protocol="http") as made:
            yield made


@pytest.mark.parametrize("way", ADDRESSES)
def test_files(ways: Ways, way: str) -> None:
    client = [sys.executable, "-c", CALLS]
    sizes = [str(size) for size in SIZES]
    command = [*client, "127.0.0.1", str(ways.server), *sizes]
    without = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    redirected = ways.verdicts("redirected")
    with ways.carrying(way, 1):
        meshed = ways.machine.client(*client, ADDRESSES[way], "80", *sizes)
    assert (meshed.returncode, meshed.stderr) == (0, "") == (without.returncode, without.stderr)
    assert meshed.stdout == without.stdout
    assert meshed.stdout.count("\n") == 2 * (12 + 2 * len(SIZES))
    assert (ways.verdicts("redirected") > redirected) == (way == REDIRECT and ways.redirects)


@pytest.mark.parametrize("way", ADDRESSES)
def test_load(ways: Ways, way: str) -> None:
    for more, size in (([], 4000), ([], 900_000), (["-H", "Connection: close"], 4000)):
        done = ways.machine.client("wrk", "-t1", "-c16", "-d1s", *more, f"http://{ADDRESSES[way]}/{size}")
        assert done.returncode == 0, done.stderr
        assert "Socket errors" not in done.stdout and "Non-2xx" not in done.stdout, done.stdout
        assert float(re.findall(r"Requests/sec: +([\d.]+)", done.stdout)[0]) > 20


LATE = """
import socket, sys
with socket.create_connection((sys.argv[1], 80), timeout=10) as client:
    print(client.getpeername()[0], flush=True)
    sys.stdin.readline()
    client.sendall(b"GET /1 HTTP/1.1\\r\\nHost: web\\r\\nConnection: close\\r\\n\\r\\n")
    answer = b""
    while part := client.recv(65536):
        answer += part
    print(answer.split(b"\\r\\n")[0].decode())
"""


@pytest.mark.parametrize("way", ADDRESSES)
def test_a_caller_that_is_connected_and_speaks_late(ways: Ways, way: str) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with ways.carrying(way, 1):
        client = ways.machine.start_client(sys.executable, "-c", LATE, ADDRESSES[way], **pipes)
        assert client.stdout.readline() == f"{ADDRESSES[way]}\n"
        if way == "direct" and "apache" in ways.machine.instance.name:
            # Apache knows nothing of it yet: else its listener does not defer, and this test shows nothing.
            begun = ["ss", "-Htn", "state", "syn-recv", "sport", "=", f":{ways.server}"]
            half = subprocess.run(begun, capture_output=True, text=True, check=True).stdout
            assert half.count("\n") == 1, half
        out, _err = client.communicate("\n", timeout=20)
    assert out == "HTTP/1.1 200 OK\n"
