"""`connections`, `edges`, `reasons`, `maps` of a living mesh: with an agent, without one, across namespaces."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.support.machine import Machine, policy, service, until

GOVERNED, RAW = "127.96.0.10", "127.96.0.11"
# Connects to each ADDRESS:PORT, says so, and holds the connections until its input ends.
HOLD = """
import socket, sys
held = [socket.create_connection(tuple(target.split(":"))) for target in sys.argv[1:]]
print(*(s.getsockname()[1] for s in held), flush=True)
sys.stdin.read()
"""


def hold(machine: Machine, *targets: str, netns: str | None = None) -> tuple[subprocess.Popen[str], list[int]]:
    """A client that holds a connection to each; its process, and the ports of its ends."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = machine.start_client(sys.executable, "-c", HOLD, *targets, netns=netns, **pipes)
    return process, [int(word) for word in process.stdout.readline().split()]


def release(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=10)


def setting(machine: Machine) -> None:
    port = machine.quick("a")
    machine.configure(service("orders", GOVERNED, [port]), service("ledger", RAW, [port], protocol="tcp"))


def clients(machine: Machine, *arguments: str) -> list[dict[str, Any]]:
    answer = machine.show("connections", *arguments)
    assert answer["schemaVersion"] == 1 and answer["error"] == ""
    found: list[dict[str, Any]] = answer["clients"]
    return found


def test_who_holds_which_connection(machine: Machine) -> None:
    setting(machine)
    machine.run_agent()
    process, ports = hold(machine, f"{GOVERNED}:80", f"{RAW}:80", f"{RAW}:80")
    rows = {row["client"]: row for row in clients(machine)}
    assert set(rows) == {f"127.0.0.1:{port}" for port in ports}
    governed, direct = rows[f"127.0.0.1:{ports[0]}"], rows[f"127.0.0.1:{ports[1]}"]
    assert (governed["service"], governed["carrier"], governed["asked"]) == ("orders", "proxy", f"{GOVERNED}:80")
    assert (direct["service"], direct["carrier"], direct["asked"]) == ("ledger", "direct", f"{RAW}:80")
    assert governed["endpoint"] is None and direct["endpoint"].startswith("127.0.0.1:")
    for row in rows.values():
        assert (row["workload"], row["cgroup"]) == (f"/{machine.cgroup.name}",) * 2
        assert row["pid"] == process.pid or (row["carrier"] == "direct" and row["pid"] is None)
        assert row["cgroup_id"] == machine.cgroup.stat().st_ino
    held = {(row["service"], row["carrier"]): row["open"] for row in machine.show("connections")["connections"]}
    assert held == {("orders", "proxy"): 1, ("ledger", "direct"): 2}
    assert {row["service"] for row in clients(machine, "ledger")} == {"ledger"}
    release(process)
    until(lambda: not clients(machine), "all are closed")


def test_without_an_agent_and_in_another_namespace(machine: Machine) -> None:
    """No process of ours runs: the governed port follows onProxyDown, and is seen as what it is, direct."""
    inner = machine.netns(f"{machine.instance.name}-n")
    port = machine.quick("there", netns=inner)
    machine.configure(service("orders", GOVERNED, [port]), service("ledger", RAW, [port], protocol="tcp"))
    machine.attach()
    process, ports = hold(machine, f"{GOVERNED}:80", f"{RAW}:80", netns=inner)
    rows = {row["client"]: row for row in clients(machine)}
    assert {row["carrier"] for row in rows.values()} == {"direct"}
    assert {row["pid"] for row in rows.values()} <= {process.pid, None}
    assert {rows[f"127.0.0.1:{ports[0]}"]["service"], rows[f"127.0.0.1:{ports[1]}"]["service"]} == {"orders", "ledger"}
    edges = machine.show("edges")["edges"]
    me = f"/{machine.cgroup.name}"
    assert [(e["workload"], e["service"], e["carrier"], e["open"]) for e in edges] == [
        (me, "ledger", "direct", 1), (me, "orders", "direct", 1),
    ]  # fmt: skip
    assert {(e["connections"], e["requests"], e["success_percent"]) for e in edges} == {(None, None, None)}
    release(process)
    until(lambda: not machine.show("edges")["edges"], "no edge is left when nobody counts")


def test_edges_count_what_the_proxy_saw(machine: Machine) -> None:
    setting(machine)
    machine.run_agent()
    for _ in range(3):
        machine.curl(f"http://{GOVERNED}/")
    below = machine.cgroup / "shop.service"
    machine.meshbpf("exec", "--cgroup", str(below), "--", "curl", "-sS", "--max-time", "5", f"http://{GOVERNED}/")

    def seen() -> dict[str, dict[str, Any]]:
        return {edge["workload"]: edge for edge in machine.show("edges")["edges"]}

    until(lambda: sum(edge["requests"] or 0 for edge in seen().values()) == 4, "four requests are counted")
    mine = seen()[f"/{machine.cgroup.name}"]
    assert (mine["service"], mine["carrier"], mine["open"]) == ("orders", "proxy", 0)
    assert (mine["connections"], mine["requests"], mine["failed"], mine["success_percent"]) == (3, 3, 0, 100.0)
    assert len(seen()) == 2


def test_reasons_of_kernel_and_proxy(machine: Machine) -> None:
    port = machine.quick("a")
    machine.configure(service("orders", GOVERNED, [port]), service("gone", RAW, [1]), policy("gone", mode="proxy"))
    machine.run_agent()
    machine.curl(f"http://{GOVERNED}/")
    for _ in range(2):
        machine.client("curl", "-sS", "--max-time", "5", f"http://{RAW}/")

    def rows() -> dict[tuple[str, str], dict[str, Any]]:
        return {(row["program"], row["reason"]): row for row in machine.show("reasons")["reasons"]}

    until(lambda: ("proxy", "connect_failed") in rows(), "the proxy's verdict is counted")
    failed = rows()["proxy", "connect_failed"]
    assert (failed["services"], failed["count"]) == ({"gone": 2}, 2)
    assert failed["remedy"] == "is the program running, on this address and port?"
    assert (rows()["connect", "proxy"]["count"], rows()["connect", "proxy"]["remedy"]) == (3, "")


@pytest.mark.parametrize("agent", [True, False], ids=["agent", "pins"])
def test_maps_are_what_the_kernel_says(machine: Machine, agent: bool) -> None:
    setting(machine)
    machine.run_agent() if agent else machine.attach()
    rows = {row["name"]: row for row in machine.show("maps")["maps"]}
    assert {"services", "policies", "slots", "endpoints", "origins", "flows", "counters"} <= set(rows)
    assert (rows["services"]["entries"], rows["services"]["capacity"]) == (2, 16384)
    assert rows["services"]["full_percent"] == 0.1, "not nothing"
    assert rows["origins"]["entries"] is rows["origins"]["capacity"] is rows["counters"]["full_percent"] is None
    assert (rows["origins"]["kind"], rows["flows"]["kind"]) == ("sk_storage", "lru_hash")
    assert rows["services"]["memory_bytes"] > 16384 * 24
    assert all(row["key"] and row["value"] and row["writer"] for row in rows.values()), "each is in the catalogue"


def test_every_form_of_every_list(machine: Machine) -> None:
    setting(machine)
    machine.attach()
    for command in ("connections", "edges", "reasons", "maps", "status", "services", "endpoints"):
        for form in ("table", "wide", "json", "yaml"):
            done = machine.meshbpf(command, "--instance", machine.instance.name, "-o", form)
            assert (done.returncode, done.stderr) == (0, ""), (command, form, done)
            assert "\x1b" not in done.stdout, "nobody looks at a terminal"
            assert ("schemaVersion" in done.stdout) == (form in ("json", "yaml"))


def test_diff_says_what_applying_would_change(machine: Machine) -> None:
    port = machine.quick("a")
    ours = service("orders", GOVERNED, [port])
    machine.configure(ours)
    machine.run_agent()
    config = str(machine.folder / "config")

    def diff(*more: str) -> tuple[int, str, str]:
        done = machine.meshbpf("diff", config, "--instance", machine.instance.name, *more)
        return done.returncode, done.stdout, done.stderr

    assert diff() == (0, "nothing would change\n", "")
    other = machine.configure(service("ledger", RAW, [port], protocol="tcp"), name="other.yaml.not")
    code, out, _err = diff()
    assert code == 0, "no configuration file by its name"
    staged = machine.folder / "next"
    staged.mkdir()
    other.rename(staged / "other.yaml")
    config = str(staged)
    code, out, err = diff("-o", "json")
    answer = json.loads(out)
    assert (code, err, answer["schemaVersion"]) == (79, "", 1)
    assert {(row["change"], row["kind"], row["name"]) for row in answer["changes"]} == {
        ("added", "service", "ledger"), ("removed", "service", "orders"),
    }  # fmt: skip
    assert {row["map"]: (row["set"], row["deleted"]) for row in answer["writes"]}["services"] == (1, 1)
    assert machine.curl(f"http://{GOVERNED}/")["endpoint"] == "a", "nothing was changed"
    (staged / "bad.yaml").write_text("kind: X\n")
    code, out, err = diff()
    assert (code, out) == (65, "") and f"{staged}/bad.yaml:1:7" in err
    (staged / "bad.yaml").unlink()
    assert machine.stop_agent() == 0
    assert diff()[0] == 79, "from pins alone"
    done = machine.meshbpf("diff", config, "--instance", f"{machine.instance.name}-x")
    assert (done.returncode, done.stdout) == (1, "") and "is not attached" in done.stderr


def test_who_holds_a_connected_udp_socket(machine: Machine) -> None:
    machine.configure(service("dns", RAW, [5353], protocol="udp", port=53))
    machine.attach()
    code = (
        "import socket, sys; s = socket.socket(type=socket.SOCK_DGRAM); s.connect(('127.96.0.11', 53));"
        "print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = machine.start_client(sys.executable, "-c", code, **pipes)
    assert process.stdout.readline() == "held\n"
    (row,) = clients(machine)
    assert (row["service"], row["port"], row["carrier"], row["endpoint"]) == (
        "dns", "53/udp", "direct", "127.0.0.1:5353",
    )  # fmt: skip
    assert (row["pid"], row["workload"], row["client"]) == (process.pid, f"/{machine.cgroup.name}", None)
    assert [row["open"] for row in machine.show("connections")["connections"]] == [1]
    release(process)
    until(lambda: not clients(machine), "it is closed")
