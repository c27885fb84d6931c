"""Connections that have proven worth it are redirected from socket to socket; `acceleration: off` redirects none."""

from __future__ import annotations

import json

import pytest

from tests.support.machine import Machine, policy, service, until

KEEP_ALIVE = """
import http.client, json, sys
connection = http.client.HTTPConnection(sys.argv[1], 80, timeout=10)
connection.connect()
connection.sock.settimeout(10)
bodies = []
for count in range(int(sys.argv[2])):
    connection.request("POST", f"/{count}", body=b"x" * 100)
    answer = connection.getresponse()
    bodies.append(json.loads(answer.read())["path"])
print(json.dumps(bodies))
"""


def verdict(machine: Machine, reason: str) -> int:
    return sum(row["count"] for row in machine.show("reasons")["reasons"] if row["reason"] == reason)


def accelerated(machine: Machine) -> bool:
    return str(machine.show("status")["agent"]["acceleration"]).startswith("redirect")


@pytest.mark.parametrize("acceleration", ["auto", "off"])
def test_requests_of_a_kept_connection(machine: Machine, acceleration: str) -> None:
    port = machine.endpoint("a")
    machine.configure(service("orders", "127.96.0.10", [port]), policy("orders", acceleration=acceleration))
    machine.run_agent()
    until(lambda: accelerated(machine), "the self-test has passed")
    done = machine.client("python3", "-c", KEEP_ALIVE, "127.96.0.10", "40")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [f"/{count}" for count in range(40)]
    assert len(machine.records(40)) == 40
    redirected = verdict(machine, "redirected")
    if acceleration == "off":
        assert redirected == 0
    else:
        assert verdict(machine, "joined") == 1
        assert redirected > 40  # most of forty requests and forty answers


def test_wrk_sees_no_error(machine: Machine) -> None:
    port = machine.endpoint("a")
    machine.configure(service("orders", "127.96.0.10", [port]))
    machine.run_agent()
    until(lambda: accelerated(machine), "the self-test has passed")
    done = machine.client("wrk", "-t1", "-c8", "-d2s", "http://127.96.0.10/")
    assert done.returncode == 0
    assert "Socket errors" not in done.stdout, done.stdout
    assert "Non-2xx" not in done.stdout, done.stdout
    assert verdict(machine, "redirected") > 0
