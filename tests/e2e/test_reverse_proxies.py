"""nginx and HAProxy inside the mesh, as reverse proxies whose upstream is a service: their callers notice nothing.

The traps: nginx asks by FIONREAD how much there is (KERNEL.md B6-7), HAProxy reads by splice (B6-8), both keep their
upstream connections, so those are worth a short cut from socket to socket.
"""

from __future__ import annotations

import hashlib
import http.client
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from tests.support import daemons
from tests.support.machine import Machine, free_port
from tests.support.ways import ADDRESSES, REDIRECT, Ways

MIB = 1 << 20
SIZES = (1, 300, 4000, 5000, 20_000, 70_000, 300_000, 900_000, 3 * MIB)
FRONTS = ("nginx", "haproxy")


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
    folder = tmp_path_factory.mktemp("reverse")
    with Machine(folder, f"mt-reverse-{folder.parent.name[-8:]}") as machine:
        web = machine.start([sys.executable, "-m", "tests.support.plainweb"], stdout=subprocess.PIPE, text=True)
        with Ways(machine, int(web.stdout.readline()), port=80, protocol="http") as made:
            yield made


class Front:
    """A reverse proxy inside the mesh: /direct/x is x on the service `direct`, /plain/x is x without the mesh."""

    def __init__(self, port: int, daemon: daemons.HAProxy | None = None) -> None:
        self.port, self.haproxy = port, daemon

    def ask(self, client: http.client.HTTPConnection, path: str, body: bytes = b"") -> tuple[int, str, int]:
        """Status, digest and length of the answer."""
        client.request("POST" if body else "GET", path, body or None)
        answer = client.getresponse()
        data = answer.read()
        return answer.status, hashlib.sha256(data).hexdigest(), len(data)

    def talk(self, way: str, small: str) -> list[tuple[int, str, int]]:
        """What it answers, on one kept connection: first `small`, more often than it takes to join; then all sizes."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=15)) as client:
            answers = [self.ask(client, f"/{way}{small}") for _ in range(12)]
            for size in (*SIZES, *reversed(SIZES)):
                answers.append(self.ask(client, f"/{way}/bytes?n={size}"))
                answers.append(self.ask(client, f"/{way}/things", b"y" * size))
            return [*answers, self.ask(client, f"/{way}/chunked?n=500"), self.ask(client, f"/{way}/status?code=404")]


@contextmanager
def front_of(kind: str, ways: Ways) -> Iterator[Front]:
    port = free_port()
    upstreams = {"plain": f"127.0.0.1:{ways.server}", **{way: f"{address}:80" for way, address in ADDRESSES.items()}}
    if kind == "nginx":
        blocks = [f"upstream {name} {{ server {where}; keepalive 16; }}" for name, where in upstreams.items()]
        places = [f"location /{name}/ {{ proxy_pass http://{name}/; }}" for name in upstreams]
        options = 'proxy_http_version 1.1; proxy_set_header Connection ""; proxy_request_buffering off;'
        server = f"server {{ listen 127.0.0.1:{port}; {options} {' '.join(places)} }}"
        with daemons.nginx(ways.machine, "\n".join([*blocks, server]), port, meshed=True):
            yield Front(port)
    else:
        sections = [
            f"frontend front\n  bind 127.0.0.1:{port}\n  use_backend %[path,field(2,/)]",
            *(
                f"backend {name}\n  http-request replace-path /[^/]+(/.*) \\1\n  server one {where}"
                for name, where in upstreams.items()
            ),
        ]
        with daemons.haproxy(ways.machine, "\n".join(sections), port, meshed=True) as haproxy:
            yield Front(port, haproxy)


@pytest.mark.parametrize("small", ["/hello", "/status?code=204"])
@pytest.mark.parametrize("way", ADDRESSES)
@pytest.mark.parametrize("kind", FRONTS)
def test_answers(ways: Ways, kind: str, way: str, small: str) -> None:
    """Answers without a body say nothing about how HAProxy will read: it makes its first pipe when it needs one."""
    with front_of(kind, ways) as front:
        redirected = ways.verdicts("redirected")
        with ways.carrying(way):
            meshed = front.talk(way, small)
        assert meshed == front.talk("plain", small)
        assert [length for _status, _digest, length in meshed[12:-2:2]] == [*SIZES, *reversed(SIZES)]
        if front.haproxy is None:
            assert (ways.verdicts("redirected") > redirected) == (way == REDIRECT and ways.redirects)
        else:
            info = front.haproxy.info()
            assert int(info["PipesUsed"]) + int(info["PipesFree"]) > 0, "it never spliced, so this shows nothing"


@pytest.mark.parametrize("way", ADDRESSES)
@pytest.mark.parametrize("kind", FRONTS)
def test_load(ways: Ways, kind: str, way: str) -> None:
    """Many connections at once, each of them a mixture of sizes that were sent before."""
    with front_of(kind, ways) as front:
        for size in (200, 60_000):
            done = ways.machine.client(
                "wrk", "-t1", "-c16", "-d2s", f"http://127.0.0.1:{front.port}/{way}/bytes?n={size}"
            )
            assert done.returncode == 0 and "Requests/sec" in done.stdout, done.stderr
            assert "Socket errors" not in done.stdout and "Non-2xx" not in done.stdout, done.stdout
