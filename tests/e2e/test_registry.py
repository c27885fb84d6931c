"""Programs that register themselves: traffic follows them in and out, and the agent's restart changes nothing."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import time

from tests.support.machine import CLI, Machine, free_port, policy, service, until

ADDRESS = "127.96.0.10"
URL = f"http://{ADDRESS}/"


def register(machine: Machine, name: str, *options: str, command: list[str] | None = None) -> subprocess.Popen[str]:
    tail = ["--", *command] if command else []
    return machine.start([*CLI, "register", name, "--instance", machine.instance.name, *options, *tail], text=True)


def ready(machine: Machine, name: str = "orders") -> list[str]:
    return [row["endpoint"] for row in machine.show("endpoints")["endpoints"] if row["service"] == name]


def put(machine: Machine, path: str, body: dict[str, object]) -> int:
    client = http.client.HTTPConnection("127.0.0.1", machine.registry_port, timeout=5)
    client.request("PUT", f"/v1/services/{path}", json.dumps(body))
    status = client.getresponse().status
    client.close()
    return status


def test_a_program_is_in_after_its_check_and_out_before_it_stops(machine: Machine) -> None:
    # direct: nobody tries another endpoint for the caller
    machine.configure(service("orders", ADDRESS, [], endpoints=[]), policy("orders", mode="direct"))
    machine.run_agent()
    assert machine.client("curl", "-sS", "--max-time", "5", URL).returncode == 7
    port = free_port()
    program = [sys.executable, "-m", "tests.support.quick", "own", "127.0.0.1", str(port)]
    keeper = register(machine, "orders", "--port", f"main={port}", "--check", "http:/", command=program)
    until(lambda: ready(machine), "registered")
    load = machine.load(ADDRESS, connections=4, rate=200, new=True)
    second = machine.quick("second")
    helper = register(machine, "orders", "--port", f"main={second}")
    until(lambda: len(ready(machine)) == 2, "the second one")
    keeper.send_signal(signal.SIGTERM)
    keeper.wait(15)
    assert ready(machine) == [f"127.0.0.1:{second}"]
    result = load.stop()
    assert not result["failed"], result  # it was out, and callers knew, before it stopped
    assert set(result["endpoints"]) == {"own", "second"}
    helper.send_signal(signal.SIGTERM)
    assert helper.wait(15) in (0, 128 + 15)
    until(lambda: not ready(machine), "nobody is left")


def test_a_lease_that_ends_takes_the_endpoint_out(machine: Machine) -> None:
    live, dead = machine.quick("live"), machine.quick("dead")
    machine.configure(service("orders", ADDRESS, [live]))
    machine.run_agent()
    body = {"address": "127.0.0.1", "ports": {"main": {"port": dead, "protocol": "http"}}, "ttl": "3s"}
    begin = time.monotonic()
    assert put(machine, "orders/instances/x", body) == 201
    until(lambda: len(ready(machine)) == 2, "in", 2.9)  # each look is a command that starts
    until(lambda: len(ready(machine)) == 1, "out")
    assert 2.9 < time.monotonic() - begin < 6.0
    assert {machine.curl(URL)["endpoint"] for _ in range(6)} == {"live"}


def test_a_service_only_the_registry_knows_survives_a_restart(machine: Machine) -> None:
    port = machine.quick("a")
    machine.configure()
    machine.run_agent()
    body = {"address": "127.0.0.1", "ports": {"http": {"port": port, "servicePort": 80}}, "ttl": "60s"}
    assert put(machine, "shop/instances/x", body) == 201
    until(lambda: ready(machine, "shop"), "registered")

    def hosts() -> str:
        done = machine.meshbpf("services", "-o", "hosts", "--instance", machine.instance.name)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (line,) = hosts().splitlines()
    address, *names = line.split()
    assert names == ["shop", "shop.default"]
    assert address.startswith("127.96.")
    assert machine.curl(f"http://{address}/")["endpoint"] == "a"
    for number in (signal.SIGKILL, signal.SIGTERM):
        machine.stop_agent(number)
        assert hosts().split() == [address, *names], "also while no agent runs"
        assert machine.curl(f"http://{address}/")["endpoint"] == "a"
        machine.run_agent()
        assert hosts().split() == [address, *names]
        assert machine.curl(f"http://{address}/")["endpoint"] == "a"


def test_a_registered_program_outlives_the_agent(machine: Machine) -> None:
    port = machine.quick("a")
    machine.configure(service("orders", ADDRESS, [], endpoints=[]))
    machine.run_agent()
    keeper = register(machine, "orders", "--port", f"main={port}", "--ttl", "20s")  # longer than any restart
    until(lambda: ready(machine), "registered")
    machine.stop_agent()
    machine.run_agent()
    assert machine.curl(URL)["endpoint"] == "a"
    until(lambda: keeper.poll() is None and ready(machine), "it is kept alive")
    done = machine.meshbpf("deregister", "orders", "--instance", machine.instance.name)
    assert done.returncode == 0, done.stderr


def test_a_taken_registry_port_ends_the_start_with_nothing_changed(machine: Machine) -> None:
    machine.configure(service("orders", ADDRESS, [1]))
    with socket.create_server(("127.0.0.1", machine.registry_port)):
        done = machine.run_to_end()
    assert done.returncode == 1
    assert str(machine.registry_port) in done.stderr
    assert "Traceback" not in done.stderr
    assert not machine.instance.pins.exists()


def test_a_writer_that_fills_the_tables_stops_nobody_else(machine: Machine) -> None:
    port = machine.endpoint("a")
    machine.agent_spec["maps"] = {"slots": 4}
    machine.configure(service("orders", ADDRESS, [port]))
    machine.run_agent()
    for number in range(6):
        body = {"address": "127.0.0.1", "ports": {"main": {"port": 40000 + number, "protocol": "tcp"}}, "ttl": "60s"}
        assert put(machine, f"hog/instances/x{number}", body) == 201
    until(lambda: "hog" in machine.agent_says()["error"], "status names who is left out")
    other = machine.endpoint("b")
    machine.configure(service("orders", ADDRESS, [other]))
    until(lambda: machine.curl(URL)["endpoint"] == "b", "the files are followed")
