"""A real DNS client and real DNS servers through a UDP service: dig gets what it gets without the mesh."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.support.machine import CLI, Done, Machine, free_port, service, until, which

ADDRESS, SIX = "127.96.0.53", "fd00:96::53"
LONG = [f"--txt-record=long.test,{number}{'x' * 200}" for number in range(10)]  # more than a datagram may carry

# Connects once, says so, and then how its next call ended.
CONNECTED = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.connect((sys.argv[1], 53))
    print("connected", flush=True)
    try:
        sock.recv(100)
    except OSError as error:
        print(error.__class__.__name__, flush=True)
"""


def dnsmasq(name: str, address: str, port: int) -> list[str]:
    """A server that knows who.test (its own name), orders.test and long.test."""
    return [
        which("dnsmasq"), "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--no-poll",
        "--user=root", "--pid-file=", "--log-facility=-", f"--port={port}", f"--listen-address={address}",
        "--bind-interfaces", "--local=/test/", "--address=/orders.test/192.0.2.7", f"--txt-record=who.test,{name}",
        *LONG,
    ]  # fmt: skip


def dig(server: str, *question: str, port: int = 53) -> list[str]:
    return ["dig", f"@{server}", "-p", str(port), "+time=1", "+tries=3", *question]


def serve(machine: Machine, name: str, address: str, netns: str | None = None) -> int:
    """Start a server outside of the mesh and wait until it answers; its port."""
    port = free_port()
    prefix = ["ip", "netns", "exec", netns] if netns else []
    server = machine.start([*prefix, *dnsmasq(name, address, port)], stderr=subprocess.DEVNULL)

    def answers() -> bool:
        assert server.poll() is None
        command = [*prefix, *dig(address, "who.test", "TXT", "+short", port=port)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout == f'"{name}"\n'

    until(answers, f"dnsmasq {name} answers")
    return port


def dns(*endpoints: tuple[str, int], addresses: tuple[str, ...] = (ADDRESS,)) -> dict[str, Any]:
    """A service on port 53 of both protocols, as DNS wants it."""
    document = service("dns", ADDRESS, [])
    document["spec"] = {
        "addresses": list(addresses),
        "ports": [{"name": "dns", "port": 53, "protocol": "udp"}, {"name": "tcp", "port": 53, "protocol": "tcp"}],
        "endpoints": [{"address": address, "ports": {"dns": port, "tcp": port}} for address, port in endpoints],
    }
    return document


def executed(machine: Machine, *command: str) -> Done:
    """Through `meshbpf exec`, as a person would."""
    done = machine.meshbpf("exec", "--instance", machine.instance.name, "--", *command)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done


def who(done: Done) -> str:
    return done.stdout.strip().strip('"')


@pytest.fixture
def two(machine: Machine) -> Machine:
    """Attached, with the servers a and b behind the service, and no agent."""
    machine.configure(dns(*((address, serve(machine, name, address)) for name, address in
                            (("a", "127.0.0.1"), ("b", "127.0.0.2")))))  # fmt: skip
    machine.attach()
    return machine


def test_dig(two: Machine) -> None:
    said = executed(two, *dig(ADDRESS, "orders.test", "+noall", "+answer", "+stats", "+comments")).stdout
    assert "status: NOERROR" in said
    assert f";; SERVER: {ADDRESS}#53({ADDRESS}) (UDP)" in said
    assert [line.split()[-1] for line in said.splitlines() if line.startswith("orders.test.")] == ["192.0.2.7"]
    assert {who(executed(two, *dig(ADDRESS, "who.test", "TXT", "+short"))) for _ in range(4)} == {"a", "b"}
    rows = {row["port"]: row for row in two.show("services")["services"]}
    assert (rows["53/udp"]["carrier"], rows["53/udp"]["why"], rows["53/udp"]["endpoints"]) == (
        "direct", "protocol_udp", "2/2",
    )  # fmt: skip
    assert rows["53/udp"]["connections"] >= 5
    assert rows["53/udp"]["open"] == 0


def test_a_long_answer_comes_by_tcp(two: Machine) -> None:
    said = executed(two, *dig(ADDRESS, "long.test", "TXT", "+bufsize=512")).stdout
    assert "Truncated, retrying in TCP mode" in said
    assert f";; SERVER: {ADDRESS}#53({ADDRESS}) (TCP)" in said
    assert sum(line.startswith("long.test.") and "TXT" in line for line in said.splitlines()) == len(LONG)


def test_a_client_that_retries_gets_past_a_server_that_hangs(two: Machine) -> None:
    two.latest.send_signal(signal.SIGSTOP)
    try:
        found = [who(executed(two, *dig(ADDRESS, "who.test", "TXT", "+short"))).splitlines()[-1] for _ in range(3)]
    finally:
        two.latest.send_signal(signal.SIGCONT)
    assert [line.strip('"') for line in found] == ["a"] * 3


def test_ipv6_in_a_namespace(machine: Machine) -> None:
    space = machine.netns(f"{machine.instance.name}-six")
    machine.configure(dns(("::1", serve(machine, "six", "::1", space)), addresses=(SIX,)))
    machine.attach()
    said = machine.client(*dig(SIX, "who.test", "TXT"), netns=space).stdout
    assert f";; SERVER: {SIX}#53({SIX}) (UDP)" in said
    assert '"six"' in said


def test_the_agent_ends_sockets_in_every_namespace_when_a_server_goes(machine: Machine) -> None:
    space = machine.netns(f"{machine.instance.name}-other")
    a, b = free_port(), free_port()
    machine.configure(dns(("127.0.0.1", a)))
    machine.run_agent()
    clients = [
        machine.start_client(sys.executable, "-c", CONNECTED, ADDRESS, netns=where, stdout=subprocess.PIPE, text=True)
        for where in (None, space)
    ]
    for one in clients:
        assert one.stdout is not None
        assert one.stdout.readline() == "connected\n"
    machine.configure(dns(("127.0.0.1", a), ("127.0.0.1", b)))
    until(lambda: len(machine.show("endpoints", "dns")["endpoints"]) == 4, "the second server is known")
    assert [one.poll() for one in clients] == [None, None]
    machine.configure(dns(("127.0.0.1", b)))
    assert [one.communicate(timeout=20)[0] for one in clients] == ["ConnectionAbortedError\n"] * 2


def test_a_registered_server(machine: Machine) -> None:
    machine.configure()
    machine.run_agent()
    port = free_port()
    machine.start([
        *CLI, "register", "names", "--port", f"dns={port}/udp", "--service-port", "53", "--address", "127.0.0.3",
        "--instance", machine.instance.name, "--", *dnsmasq("c", "127.0.0.3", port),
    ], stderr=subprocess.DEVNULL)  # fmt: skip

    def address() -> str:
        rows = machine.show("services")["services"]
        return rows[0]["address"] if rows and rows[0]["why"] == "protocol_udp" else ""

    given = until(address, "the service is there")
    assert who(executed(machine, *dig(given, "who.test", "TXT", "+short"))).splitlines()[-1].strip('"') == "c"
    machine.latest.terminate()
    until(lambda: not machine.show("services")["services"], "the service is gone")
