"""curl over TLS to a `tcp` port: certificate, protocol, HTTP/2 and bytes are those of the call without the mesh."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import daemons
from tests.support.machine import Done, Machine, free_port, which
from tests.support.ways import ADDRESSES, DIRECT, PROXY, Ways

NAME, PORT = "shop.example", 443
MIB = 1 << 20
SERVER = """
  server {{
    listen 127.0.0.1:{port} ssl http2;
    ssl_certificate {folder}/cert.pem; ssl_certificate_key {folder}/key.pem;
    ssl_protocols TLSv1.2 TLSv1.3; ssl_session_cache shared:s:1m;
    location / {{ root {folder}; }}
    location = /hello {{ return 200 "$request_method $host $ssl_protocol $ssl_server_name\\n"; }}
    location = /put {{ proxy_pass http://127.0.0.1:{inner}; }}
  }}
  server {{ listen 127.0.0.1:{inner}; return 200 "$request_method $content_length\n"; }}
"""


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
    folder = tmp_path_factory.mktemp("tls")
    (folder / "large").write_bytes(bytes(range(256)) * (8 * MIB // 256))
    made = subprocess.run(
        [
            which("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-days", "2", "-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}",
            "-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem"),
        ],
        capture_output=True, text=True, check=False, timeout=20,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    port = free_port()
    with Machine(folder, f"mt-tls-{folder.parent.name[-8:]}") as machine:
        http = SERVER.format(folder=folder, port=port, inner=free_port())
        with daemons.nginx(machine, http, port), Ways(machine, port, port=PORT, protocol="tcp") as ways:
            yield ways


def curl(ways: Ways, way: str | None, out: Path, *more: str) -> tuple[Done, str]:
    """What curl says, and the digest of what it got; None: without the mesh."""
    port, where = (PORT, f"{ADDRESSES[way]}:{PORT}") if way else (ways.server, f"127.0.0.1:{ways.server}")
    *options, path = more
    told = "%{http_version} %{http_code} %{ssl_verify_result} %{num_connects} %{size_upload} %{size_download}"
    command = [
        which("curl"), "-sS", "--max-time", "20", "--cacert", str(ways.machine.folder / "cert.pem"),
        "--connect-to", f"{NAME}:{port}:{where}", "-w", told, "-o", str(out), *options, f"https://{NAME}:{port}{path}",
    ]  # fmt: skip
    out.unlink(missing_ok=True)
    if way:
        done = ways.machine.client(*command)
    else:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done, hashlib.sha256(out.read_bytes()).hexdigest() if out.exists() else ""


@pytest.mark.parametrize("way", [DIRECT, PROXY])
@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
@pytest.mark.parametrize("tls", ["1.2", "1.3"])
def test_calls(ways: Ways, way: str, version: str, tls: str, tmp_path: Path) -> None:
    up = tmp_path / "up"
    up.write_bytes(b"up" * MIB)
    # The server reads the whole PUT before it answers: curl 7.88 spins when an answer over HTTP/2 comes earlier.
    for options in (["/hello"], ["/large"], ["-T", str(up), "/put"], ["-r", "5-2000000", "/large"], ["/nothing"]):
        exact = [version, f"--tlsv{tls}", "--tls-max", tls, *options]
        without, got = curl(ways, None, tmp_path / "out", *exact)
        with ways.carrying(way, 1):
            meshed, got_meshed = curl(ways, way, tmp_path / "out", *exact)
        assert (meshed.returncode, meshed.stdout, meshed.stderr) == (0, without.stdout, without.stderr)
        assert got_meshed == got != ""


@pytest.mark.parametrize("way", [DIRECT, PROXY])
def test_a_wrong_name_is_noticed_by_the_caller(ways: Ways, way: str, tmp_path: Path) -> None:
    """The certificate is the server's own: nobody has opened the connection in between."""
    where = f"wrong.example:{PORT}:{ADDRESSES[way]}:{PORT}"
    command = ["curl", "-sS", "--cacert", str(ways.machine.folder / "cert.pem"), "--connect-to", where]
    done = ways.machine.client(*command, f"https://wrong.example:{PORT}/hello")
    assert done.returncode == 60 and "no alternative certificate subject name matches" in done.stderr, done.stderr
