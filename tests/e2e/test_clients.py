"""Common clients get through the mesh what they get without it, on governed and on plain ports."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from typing import Any

import pytest

from tests.support.machine import Machine, policy, service, which

ADDRESS, PLAIN = "127.96.0.10", "127.96.0.11"
MIB = 1 << 20
# What a proxy may change: our own additions, and the endpoint's own clock.
NOT_COMPARED = {"date", "connection", "keep-alive", "x-request-id", "traceparent", "transfer-encoding"}

CALLS = [
    # method, path, bytes to send
    ("GET", "/hello?a=%20b", 0), ("POST", "/things", MIB), ("PUT", "/things/1", 1), ("HEAD", "/hello", 0),
    ("GET", f"/bytes?n={MIB}", 0), ("GET", "/chunked?n=3", 0), ("DELETE", "/things/1", 0),
    ("GET", "/status?code=404", 0), ("GET", "/status?code=204", 0),
]  # fmt: skip
REQUESTS = """
import hashlib, json, sys, requests
session = requests.Session()
seen = []
for method, path, size in json.loads(sys.argv[2]):
    for data in [b"x" * size, (b"y" * 1000 for _ in range(size // 1000))] if size else [None]:
        answer = session.request(method, sys.argv[1] + path, data=data, timeout=10)
        fields = sorted((key.lower(), value) for key, value in answer.headers.items())
        seen.append([answer.status_code, fields, hashlib.sha256(answer.content).hexdigest(), len(answer.content)])
print(json.dumps(seen))
"""
NODE = """
const crypto = require("crypto");
(async () => {
  const seen = [];
  for (const [method, path, size] of JSON.parse(process.argv[2])) {
    const answer = await fetch(process.argv[1] + path, {method, body: size ? "x".repeat(size) : undefined});
    const body = Buffer.from(await answer.arrayBuffer());
    const digest = crypto.createHash("sha256").update(body).digest("hex");
    seen.push([answer.status, [...answer.headers].sort(), digest, body.length]);
  }
  console.log(JSON.stringify(seen));
})();
"""


@pytest.fixture
def shop(machine: Machine) -> tuple[Machine, str]:
    """orders: governed HTTP; plain: a TCP port, straight to the endpoint; relayed: a TCP port through the proxy. And
    where the endpoint is itself."""
    web = machine.start([sys.executable, "-m", "tests.support.plainweb"], stdout=subprocess.PIPE, text=True)
    port = web.stdout.readline()
    machine.configure(
        service("orders", ADDRESS, [int(port)]),
        service("plain", PLAIN, [int(port)], protocol="tcp"),
        service("relayed", "127.96.0.12", [int(port)], protocol="tcp"),
        policy("relayed", mode="proxy"),
    )
    machine.run_agent()
    return machine, f"http://127.0.0.1:{int(port)}"


def compared(answers: list[Any]) -> list[Any]:
    return [
        [status, [[k, v] for k, v in headers if k not in NOT_COMPARED], digest, size]
        for status, headers, digest, size in answers
    ]


@pytest.mark.parametrize("address", [ADDRESS, PLAIN, "127.96.0.12"])
@pytest.mark.parametrize("client", [[sys.executable, "-c", REQUESTS], ["node", "-e", NODE]], ids=["requests", "node"])
def test_libraries(shop: tuple[Machine, str], client: list[str], address: str) -> None:
    which(client[0])
    machine, endpoint = shop
    calls = json.dumps(CALLS)
    direct = subprocess.run([*client, endpoint, calls], capture_output=True, text=True, check=False, timeout=30)
    meshed = machine.client(*client, f"http://{address}", calls)
    assert (direct.returncode, meshed.returncode) == (0, 0), (direct.stderr, meshed.stderr)
    assert compared(json.loads(meshed.stdout)) == compared(json.loads(direct.stdout))


@pytest.mark.parametrize("address", [ADDRESS, PLAIN, "127.96.0.12"])
def test_curl(shop: tuple[Machine, str], address: str, tmp_path: Any) -> None:
    (tmp_path / "up").write_bytes(bytes(range(256)) * (MIB // 256))
    machine, endpoint = shop
    base = ["curl", "-sS", "-i", "--max-time", "10"]
    up = f"@{tmp_path}/up"
    for options, path in (
        ([], "/hello"),
        (["-I"], "/hello"),
        (["--http1.0"], "/hello"),
        (["--compressed"], "/hello"),
        ([], f"/bytes?n={MIB}"),
        ([], "/chunked?n=5"),
        ([], "/status?code=304"),
        (["-T", f"{tmp_path}/up"], "/things/1"),
        (["--data-binary", up], "/things"),
        (["-H", "Transfer-Encoding: chunked", "--data-binary", up], "/things"),
    ):
        direct = subprocess.run(
            [*base, *options, endpoint + path], capture_output=True, text=True, check=False, timeout=30
        )
        meshed = machine.client(*base, *options, f"http://{address}{path}")
        assert meshed.returncode == direct.returncode == 0, (options, path, meshed.stderr)
        assert parsed(meshed.stdout) == parsed(direct.stdout), (options, path)


def parsed(answer: str) -> tuple[str, list[tuple[str, str]], str]:
    """Status line, fields, body of the last answer; interim ones are the proxy's or the endpoint's own business."""
    while True:
        head, _, body = answer.partition("\n\n")
        status, *lines = head.splitlines()
        if " 100 " not in status:
            break
        answer = body
    fields = [(k.lower(), v.strip()) for k, _colon, v in (line.partition(":") for line in lines)]
    return (
        status,
        sorted(field for field in fields if field[0] not in NOT_COMPARED),
        hashlib.sha256(body.encode()).hexdigest(),
    )


@pytest.mark.parametrize("address", [ADDRESS, PLAIN, "127.96.0.12"])
def test_wrk_sees_no_error(shop: tuple[Machine, str], address: str) -> None:
    done = shop[0].client("wrk", "-t1", "-c16", "-d2s", f"http://{address}/hello")
    assert done.returncode == 0, done.stderr
    assert "Socket errors" not in done.stdout and "Non-2xx" not in done.stdout, done.stdout
    assert float(re.findall(r"Requests/sec: +([\d.]+)", done.stdout)[0]) > 50


def test_a_connection_is_kept_and_looks_like_the_service(shop: tuple[Machine, str]) -> None:
    program = """
import http.client, sys
client = http.client.HTTPConnection(sys.argv[1], 80, timeout=10)
for number in range(50):
    client.request("GET", f"/hello?{number}")
    assert client.getresponse().read()
    if not number:
        ours = client.sock.getsockname()
    assert client.sock.getsockname() == ours
    assert client.sock.getpeername() == (sys.argv[1], 80)
"""
    for address in (ADDRESS, PLAIN, "127.96.0.12"):
        done = shop[0].client(sys.executable, "-c", program, address)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("address", [ADDRESS, PLAIN, "127.96.0.12"])
def test_ipv6_mapped(shop: tuple[Machine, str], address: str) -> None:
    """An IPv6 socket that dials the IPv4 address, as Java and many others do."""
    program = """
import socket, sys
with socket.socket(socket.AF_INET6) as client:
    client.settimeout(10)
    client.connect(("::ffff:" + sys.argv[1], 80))
    assert client.getpeername()[:2] == ("::ffff:" + sys.argv[1], 80), client.getpeername()
    client.sendall(b"GET /hello HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
    answer = b""
    while part := client.recv(65536):
        answer += part
assert answer.startswith(b"HTTP/1.1 200"), answer
"""
    done = shop[0].client(sys.executable, "-c", program, address)
    assert done.returncode == 0, done.stderr
