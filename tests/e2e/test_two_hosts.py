"""Two agents on two hosts (network namespaces): what registers at one is called from the other, on every bad day."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.machine import CLI, Machine, policy, service, until

ADDRESS = "127.96.0.10"
URL = f"http://{ADDRESS}/"


def enter(netns: str) -> list[str]:
    """Not `ip netns exec`, which mounts another /sys: one without bpffs and cgroups."""
    return ["nsenter", f"--net=/run/netns/{netns}", "--"]


class Hosts:
    """198.18.0.1 is `a`, whose registry `b` at 198.18.0.2 follows; servers may also be at 198.18.0.3."""

    def __init__(self, a: Machine, b: Machine, folder: Path) -> None:
        self.a, self.b = a, b
        self.here, self.there, self.elsewhere = a.network(3)
        self.url = f"http://198.18.0.1:{a.registry_port}"
        token = folder / "token"
        token.write_text("a secret of these two\n")
        listen, store = f"198.18.0.1:{a.registry_port}", str(a.folder / "registry.db")
        a.agent_spec["registries"] = [{"embedded": {"listen": listen, "store": store, "tokenFile": str(token)}}]
        b.agent_spec["registries"] = [
            {"http": {"url": self.url, "tokenFile": str(token)}},
            {"embedded": {"listen": "127.0.0.1:15010", "store": str(b.folder / "registry.db")}},
        ]
        a.configure()

    def run_a(self) -> None:
        self.a.run_agent(through=enter(self.here))

    def run_b(self, mode: str = "auto") -> None:
        self.b.configure(service("orders", ADDRESS, [], endpoints=[]), policy("orders", mode=mode))
        self.b.run_agent(through=enter(self.there))

    def register(self, name: str, port: int, address: str = "198.18.0.1") -> subprocess.Popen[Any]:
        """Keep it registered at `a`."""
        options = [
            "--port",
            f"main={port}/http",
            "--address",
            address,
            "--ttl",
            "2s",
            "--instance",
            self.a.instance.name,
        ]
        return self.a.start([*CLI, "register", name, *options])

    def known(self, name: str = "orders") -> list[str]:
        """The endpoints that `b` would call."""
        return [row["endpoint"] for row in self.b.show("endpoints")["endpoints"] if row["service"] == name]

    def source(self) -> dict[str, Any]:
        found: dict[str, Any] = next(s for s in self.b.agent_says()["sources"] if s["name"] == self.url)
        return found

    def call(self, url: str = URL) -> dict[str, Any]:
        return self.b.curl(url, netns=self.there)

    def link(self, state: str) -> None:
        """Of `a`, without which nobody tells anybody anything."""
        hub = f"{self.a.instance.name}-hub"
        subprocess.run(["ip", "-n", hub, "link", "set", "port0", state], check=True)


@pytest.fixture
def hosts(machine: Machine, tmp_path: Path) -> Iterator[Hosts]:
    folder = tmp_path / "b"
    folder.mkdir()
    with Machine(folder, f"{machine.instance.name}-b") as b:
        yield Hosts(machine, b, tmp_path)


@pytest.mark.parametrize("mode", ["direct", "proxy"])
def test_a_server_registered_at_one_host_is_called_from_the_other(hosts: Hosts, mode: str) -> None:
    hosts.run_a()
    hosts.run_b(mode)
    port = hosts.a.quick("at a", "198.18.0.1", netns=hosts.here)
    keeper = hosts.register("orders", port)
    until(hosts.known, "b knows it")
    assert hosts.known() == [f"198.18.0.1:{port}"]
    assert hosts.call() == {"endpoint": "at a", "client": "198.18.0.2", "body": 0}
    rows = hosts.b.show("endpoints")["endpoints"]
    assert [row["source"] for row in rows] == [hosts.url]
    hosts.register("carts", port)  # no file names it: ports and address come with it
    (row,) = until(
        lambda: [row for row in hosts.b.show("services")["services"] if row["service"] == "carts"], "b knows carts"
    )
    assert (row["port"], row["address"].startswith("127.96.")) == ("80/http", True)
    assert hosts.call(f"http://{row['address']}/")["endpoint"] == "at a"
    keeper.send_signal(signal.SIGTERM)
    keeper.wait(10)
    until(lambda: not hosts.known(), "b knows that it left")
    assert hosts.b.client("curl", "-sS", "--max-time", "5", URL, netns=hosts.there).returncode != 0 or mode == "proxy"


def test_an_agent_starts_without_its_registry_and_says_so(hosts: Hosts) -> None:
    hosts.run_b()
    assert "Connection refused" in hosts.source()["error"]
    status = hosts.b.meshbpf("status", "--instance", hosts.b.instance.name).stdout
    assert re.search(rf"SOURCE +{hosts.url}, .*no good answer for \d+s, last error: cannot reach the registry", status)
    checked = hosts.b.meshbpf("check", "--instance", hosts.b.instance.name)
    assert checked.returncode == 79 and "Connection refused" in checked.stdout
    port = hosts.a.quick("at a", "198.18.0.1", netns=hosts.here)
    hosts.run_a()
    until(lambda: not hosts.source()["error"], "b has found it", 5.0)
    hosts.register("orders", port)
    until(hosts.known, "b knows the server")
    assert hosts.call()["endpoint"] == "at a"


@pytest.mark.parametrize(("how", "mode"), [("killed", "proxy"), ("cut off", "direct")])
def test_calls_go_on_while_the_registry_is_gone(hosts: Hosts, how: str, mode: str) -> None:
    hosts.run_a()
    hosts.run_b(mode)
    port = hosts.a.quick("server", "198.18.0.3", netns=hosts.elsewhere)
    hosts.register("orders", port, "198.18.0.3")
    until(hosts.known, "b knows it")
    load = hosts.b.load(ADDRESS, connections=4, rate=200, new=True, netns=hosts.there)
    begun = time.monotonic()
    if how == "killed":
        hosts.a.stop_agent(signal.SIGKILL)
    else:
        hosts.link("down")
    until(lambda: hosts.source()["stale_seconds"] > 3, "b says for how long it has not heard of it", 15.0)
    print(f"noticed after {time.monotonic() - begun - hosts.source()['stale_seconds']:.1f} s")
    assert "cannot reach the registry" in hosts.source()["error"]
    assert hosts.known() == [f"198.18.0.3:{port}"], (
        "although for longer than its lease nobody has renewed it that we could hear"
    )
    if how == "killed":
        hosts.run_a()
    else:
        hosts.link("up")
    begun = time.monotonic()
    until(lambda: not hosts.source()["error"], "b hears of it again", 5.0)
    print(f"back after {time.monotonic() - begun:.1f} s")
    assert hosts.source()["stale_seconds"] == 0.0
    second = hosts.a.quick("second", "198.18.0.3", netns=hosts.elsewhere)
    hosts.register("orders", second, "198.18.0.3")
    until(lambda: len(hosts.known()) == 2, "news is followed again")
    until(lambda: hosts.call()["endpoint"] == "second", "and called")
    result = load.stop()
    assert not result["failed"], result
    assert set(result["endpoints"]) == {"server", "second"}


def test_an_agent_that_restarts_while_the_registry_is_gone_knows_what_it_knew(hosts: Hosts) -> None:
    hosts.run_a()
    hosts.run_b("direct")
    port = hosts.a.quick("at a", "198.18.0.1", netns=hosts.here)
    hosts.register("orders", port)
    until(hosts.known, "b knows it")
    kept = hosts.b.folder / f"registry.db.198.18.0.1-{hosts.a.registry_port}.json"
    until(lambda: f'"port":{port}' in kept.read_text(), "and keeps it", 10.0)
    hosts.a.stop_agent(signal.SIGKILL)
    load = hosts.b.load(ADDRESS, connections=4, rate=100, new=True, netns=hosts.there)
    for number in (signal.SIGTERM, signal.SIGKILL):
        hosts.b.stop_agent(number)
        hosts.b.run_agent(through=enter(hosts.there))
        assert "Connection refused" in hosts.source()["error"]
        assert hosts.known() == [f"198.18.0.1:{port}"]
    result = load.stop()
    assert not result["failed"], result
    hosts.run_a()
    until(lambda: not hosts.source()["error"], "b hears of it again", 5.0)
