"""Several network namespaces on one agent: callers are served where they live, and endpoints dialled from there."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections import Counter

import pytest

from tests.support.machine import Machine, policy, service, until

ADDRESS = "127.96.0.10"
URL = f"http://{ADDRESS}/"

# Twenty requests on one connection that comes from 127.0.0.1 and the given port.
BOUND = """
import http.client, socket, sys
client = http.client.HTTPConnection(sys.argv[1], 80, timeout=10, source_address=("127.0.0.1", int(sys.argv[2])))
for number in range(20):
    client.request("GET", f"/{number}")
    print(client.getresponse().read().decode())
"""


def served(machine: Machine) -> int:
    return int(machine.agent_says()["namespaces"])


def sockets(pid: int) -> Counter[str]:
    """How many sockets, and which namespaces, the process holds."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return Counter(re.sub("socket:.*", "socket", each) for each in found if each.startswith(("socket:", "net:")))


@pytest.mark.parametrize("mode", ["direct", "proxy"])
def test_caller_proxy_and_endpoint_in_three_namespaces(machine: Machine, mode: str) -> None:
    caller, there = machine.network(2)
    port = machine.quick("there", "198.18.0.2", netns=there)
    endpoints = [{"address": "198.18.0.2", "ports": {"main": port}}]
    machine.configure(service("orders", ADDRESS, [], endpoints=endpoints), policy("orders", mode=mode))
    keeper = machine.start_client("sleep", "60", netns=caller)  # so that the namespace is known at the start
    machine.run_agent()
    seen = machine.curl(URL, netns=caller)
    assert seen["endpoint"] == "there"
    assert seen["client"] == "198.18.0.1", "dialled from the caller's namespace"
    assert served(machine) == 2
    if mode == "proxy":
        (record,) = machine.records(1)
        assert record["carrier"] == "proxy"
    keeper.kill()


@pytest.mark.parametrize("down", ["direct", "refuse"])
def test_a_namespace_born_after_the_start_is_governed_soon(machine: Machine, down: str) -> None:
    port = machine.quick("here")
    machine.configure(service("orders", ADDRESS, [port]), policy("orders", onProxyDown=down))
    machine.run_agent()
    newcomer = machine.netns(f"{machine.instance.name}-n")
    inside = machine.quick("inside", port=port, netns=newcomer)  # the same 127.0.0.1:port as `here`, in the newcomer
    assert inside == port
    first = machine.client("curl", "-sS", "--max-time", "5", URL, netns=newcomer)
    assert (first.returncode, '"inside"' in first.stdout) == ((0, True) if down == "direct" else (7, False))
    machine.until_logged("serving namespace")
    assert machine.curl(URL, netns=newcomer)["endpoint"] == "inside"
    records = machine.records(1)
    assert [record["carrier"] for record in records] == ["proxy"]


def test_equal_tuples_in_two_namespaces_never_mix(machine: Machine) -> None:
    """Both callers bind 127.0.0.1 and the same port; both endpoints listen on the same 127.0.0.1 and port."""
    left, right = machine.netns(f"{machine.instance.name}-l"), machine.netns(f"{machine.instance.name}-r")
    port = machine.quick("left", netns=left)
    assert machine.quick("right", port=port, netns=right) == port
    machine.configure(service("orders", ADDRESS, [port]))
    keepers = [machine.start_client("sleep", "60", netns=name) for name in (left, right)]
    machine.run_agent()
    for turn in range(10):
        command = [sys.executable, "-c", BOUND, ADDRESS, str(40001 + turn)]
        clients = {
            name: machine.start_client(*command, netns=name, stdout=subprocess.PIPE, text=True)
            for name in (left, right)
        }
        for name, client in clients.items():
            out, _ = client.communicate(timeout=20)
            wanted = "left" if name == left else "right"
            assert out.count(f'"endpoint": "{wanted}"') == 20, out
            assert out.count("endpoint") == 20
    for keeper in keepers:
        keeper.kill()


def test_a_namespace_that_dies_under_load_is_let_go(machine: Machine) -> None:
    port = machine.quick("home")
    machine.configure(service("orders", ADDRESS, [port]))
    agent = machine.run_agent()
    assert machine.curl(URL)["endpoint"] == "home"
    (worker,) = machine.agent_says()["worker_pids"]
    before = {pid: sockets(pid) for pid in (agent.pid, worker)}

    mortal = machine.netns(f"{machine.instance.name}-m")
    assert machine.quick("mortal", port=port, netns=mortal) == port
    endpoint = machine.latest
    # Kept connections made before the listener is there would go direct for good, and never be logged.
    machine.client("curl", "-sS", "--max-time", "5", URL, netns=mortal)
    until(lambda: served(machine) == 2, "the newcomer is served")
    load = machine.load(ADDRESS, connections=8, netns=mortal)
    machine.records(100)
    logged = len(machine.log())
    load.process.kill()
    endpoint.kill()
    machine.remove_netns(mortal)
    machine.until_logged("namespace left", logged)
    assert served(machine) == 1
    for pid, held in before.items():
        until(lambda pid=pid, held=held: not sockets(pid) - held, f"more than {held}")
    assert machine.agent_says()["worker_pids"] == [worker]
    assert machine.log()[logged:].count("\n") < 10, machine.log()[logged:]
    assert machine.curl(URL)["endpoint"] == "home"


def test_a_caller_that_has_gone_again_still_gets_its_namespace_served(machine: Machine) -> None:
    """Refused callers end at once. While the agent is busy, here stopped, every one of them is gone before it looks."""
    machine.configure(service("orders", ADDRESS, [machine.quick("here")]), policy("orders", onProxyDown="refuse"))
    agent = machine.run_agent()
    newcomer = machine.netns(f"{machine.instance.name}-n")
    agent.send_signal(signal.SIGSTOP)
    assert machine.client("curl", "-sS", "--max-time", "5", URL, netns=newcomer).returncode == 7
    agent.send_signal(signal.SIGCONT)
    machine.until_logged("serving namespace")
    done = machine.client(
        "curl", "-sS", "--max-time", "5", "-o", "/dev/null", "-w", "%{http_code}", URL, netns=newcomer
    )
    assert done.stdout == "503"  # governed; nobody listens on 127.0.0.1 in there
