"""Callers with TCP Fast Open and with MPTCP, of every family: whole answers, straight and by the proxy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.machine import SECONDS, Machine, service

SIZE = 300_000  # bytes of a request: much more than goes with the first packet
# name → the services' IPv4 and IPv6 addresses, carrier
SERVICES = {"straight": ("127.96.0.30", "fd00:96::30", "direct"), "governed": ("127.96.0.31", "fd00:96::31", "proxy")}
EVERY_LISTENER = "1543"  # of net.ipv4.tcp_fastopen: 0x607, data with the first packet, cookie or not, to any listener
PROGRAM = """
import socket, sys
kind, address, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
family = socket.AF_INET6 if ":" in address else socket.AF_INET
head = b"POST / HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\nContent-Length: %d\\r\\n\\r\\n" % size
request = head + b"x" * size
with socket.socket(family, socket.SOCK_STREAM, 262 if kind.startswith("mptcp") else 0) as sock:
    if kind.endswith("sendto"):
        request = request[sock.sendto(request, socket.MSG_FASTOPEN, (address, 80)):]
    else:
        if kind.endswith("deferred"):
            sock.setsockopt(socket.IPPROTO_TCP, 30, 1)
        sock.connect((address, 80))
    sock.sendall(request)
    answer = b""
    while part := sock.recv(65536):
        answer += part
        assert sock.getpeername()[:2] == (address, 80), sock.getpeername()
head, _, body = answer.partition(b"\\r\\n\\r\\n")
assert head.startswith(b"HTTP/1.1 200"), head
print(body.decode())
"""


@pytest.fixture
def shop(machine: Machine) -> tuple[Machine, str]:
    """Both services in front of one endpoint, and a namespace with all of it and the callers."""
    name = machine.netns(f"{machine.instance.name}-kinds")
    allow = ["ip", "netns", "exec", name, "sh", "-c", f"echo {EVERY_LISTENER} > /proc/sys/net/ipv4/tcp_fastopen"]
    subprocess.run(allow, check=True, timeout=SECONDS)
    port = machine.endpoint("it", netns=name)
    machine.configure(
        *(
            service(each, four, [port], protocol="http" if carrier == "proxy" else "tcp", addresses=[four, six])
            for each, (four, six, carrier) in SERVICES.items()
        )
    )
    machine.start_client("sleep", "60", netns=name)  # so that the namespace is known at the start
    machine.run_agent()
    return machine, name


@pytest.mark.parametrize("kind", ["sendto", "deferred", "mptcp", "mptcp-sendto"])
def test_answers_are_whole(shop: tuple[Machine, str], kind: str) -> None:
    machine, name = shop
    if kind.startswith("mptcp") and not Path("/proc/sys/net/mptcp").is_dir():
        pytest.skip("this kernel has no MPTCP")
    calls = 0
    for four, six, carrier in SERVICES.values():
        for address in (four, six, f"::ffff:{four}"):
            for _ in range(2):
                done = machine.client(sys.executable, "-c", PROGRAM, kind, address, str(SIZE), netns=name)
                assert done.returncode == 0, (address, carrier, done.stderr)
                seen = json.loads(done.stdout)
                assert (seen["endpoint"], seen["body"]) == ("it", SIZE)
                calls += carrier == "proxy"
    records = machine.records(calls)
    assert {(r["service"], r["response_code"], r["bytes_received"], r["reason"]) for r in records} == {
        ("governed", 200, SIZE, None)
    }
    counted = {row["reason"]: row["count"] for row in machine.show("reasons")["reasons"] if row["program"] == "sockops"}
    assert counted["opened"] == 2 * calls
    assert counted.get("mptcp", 0) == (2 * calls if kind.startswith("mptcp") else 0)


def test_curl_with_fast_open(shop: tuple[Machine, str]) -> None:
    machine, name = shop
    for four, six, _ in SERVICES.values():
        for host in (four, f"[{six}]"):
            for _ in range(3):
                seen = machine.curl(f"http://{host}/", "--tcp-fastopen", "-d", "x" * 5000, netns=name)
                assert (seen["endpoint"], seen["body"]) == ("it", 5000)
