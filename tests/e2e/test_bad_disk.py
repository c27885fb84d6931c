"""The registry's store on a disk that is full, read-only or broken: the agent starts, says so, and keeps serving."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
from pathlib import Path
from typing import Any

from tests.support.machine import Machine, until

# What is mounted is seen by the agent and its workers only, and goes with the last of them.
MOUNT = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
SMALL = [*MOUNT, 'mount -t tmpfs -o size=512k none "$0" && exec "$@"']
READ_ONLY = [*MOUNT, 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"']


def disk(machine: Machine) -> Path:
    """The store has a disk of its own."""
    folder = machine.folder / "disk"
    folder.mkdir()
    listen = f"127.0.0.1:{machine.registry_port}"
    machine.agent_spec["registries"] = [{"embedded": {"listen": listen, "store": str(folder / "registry.db")}}]
    machine.configure()
    return folder


def put(machine: Machine, name: str, port: int) -> dict[str, Any]:
    body = {"address": "127.0.0.1", "ports": {"http": {"port": port, "servicePort": 80}}, "ttl": "1h"}
    client = http.client.HTTPConnection("127.0.0.1", machine.registry_port, timeout=5)
    client.request("PUT", f"/v1/services/{name}/instances/{port}", json.dumps(body))
    answer: dict[str, Any] = json.loads(client.getresponse().read())
    client.close()
    return answer


def problem(machine: Machine) -> str:
    return str(next(s["error"] for s in machine.agent_says()["sources"] if s["name"] == "registry"))


def hosts(machine: Machine) -> dict[str, str]:
    """Address by name."""
    said = machine.meshbpf("services", "-o", "hosts", "--instance", machine.instance.name).stdout
    return {line.split()[1]: line.split()[0] for line in said.splitlines()}


def called(machine: Machine, name: str) -> Any:
    """Who answers when the service is called, once the mesh has it."""
    address = until(lambda: hosts(machine).get(name), f"{name} has an address")
    return machine.curl(f"http://{address}/")["endpoint"]


def test_a_read_only_disk(machine: Machine) -> None:
    folder = disk(machine)
    a, b = machine.quick("a"), machine.quick("b")
    machine.run_agent()
    assert put(machine, "orders", a)["durable"]
    assert called(machine, "orders") == "a"
    before = hosts(machine)
    machine.stop_agent(signal.SIGKILL)  # what it wrote last is beside the file, in SQLite's log
    machine.run_agent(through=[*READ_ONLY, str(folder)])
    assert (hosts(machine), called(machine, "orders")) == (before, "a"), "it knows what it knew"
    assert "memory only" in problem(machine) and str(folder) in problem(machine)
    assert "memory only" in machine.meshbpf("status", "--instance", machine.instance.name).stdout
    assert machine.readyz()[0] == 200
    assert put(machine, "carts", b)["durable"] is False
    assert called(machine, "carts") == "b"
    machine.stop_agent()
    machine.run_agent()
    assert (problem(machine), hosts(machine), called(machine, "orders")) == ("", before, "a"), "and nothing was broken"


def test_a_disk_that_fills_up_and_is_emptied(machine: Machine) -> None:
    folder = disk(machine)
    ports = [machine.quick(name) for name in "abc"]
    agent = machine.run_agent(through=[*SMALL, str(folder)])
    assert put(machine, "orders", ports[0])["durable"]
    filler = Path(f"/proc/{agent.pid}/root{folder}/filler")  # as the agent sees it
    filler.write_bytes(b"")
    done = subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=1k"], capture_output=True, check=False)
    assert b"No space left" in done.stderr
    assert put(machine, "carts", ports[1])["durable"] is False
    assert called(machine, "orders") == "a" and called(machine, "carts") == "b"
    assert "full" in until(lambda: problem(machine), "it says so")
    filler.unlink()
    assert put(machine, "users", ports[2])["durable"]
    until(lambda: not problem(machine), "nothing is wrong any more")
    assert "nothing is missing" in machine.log()
    assert called(machine, "users") == "c"


def test_a_disk_that_is_full_at_the_start(machine: Machine) -> None:
    folder = disk(machine)
    a, b = machine.quick("a"), machine.quick("b")
    machine.run_agent()
    assert put(machine, "orders", a)["durable"]
    before = called(machine, "orders"), hosts(machine)
    machine.stop_agent()
    fill = 'cp "$0/registry.db" /dev/shm/$$ && mount -t tmpfs -o size=512k none "$0" && mv /dev/shm/$$ "$0/registry.db"'
    full = f'{fill} && {{ dd if=/dev/zero of="$0/filler" bs=1k 2>/dev/null; exec "$@"; }}'
    machine.run_agent(through=[*MOUNT, full, str(folder)])
    assert (called(machine, "orders"), hosts(machine)) == before
    assert put(machine, "carts", b)["durable"] is False
    assert called(machine, "carts") == "b"
    assert str(folder) in until(lambda: problem(machine), "it says so")


def test_a_broken_store(machine: Machine) -> None:
    folder = disk(machine)
    a = machine.quick("a")
    garbage = b"SQLite format 3\0" + b"\xff" * 5000
    (folder / "registry.db").write_bytes(garbage)
    machine.run_agent()
    assert "memory only" in problem(machine)
    assert put(machine, "orders", a)["durable"] is False
    assert called(machine, "orders") == "a"
    machine.stop_agent()
    assert (folder / "registry.db").read_bytes() == garbage, "somebody may want to save what is in it"
