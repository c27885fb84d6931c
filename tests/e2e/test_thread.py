"""One call the whole way: curl, connect hook, proxy, endpoint, log line; and nothing left after detach."""

from __future__ import annotations

from tests.support.machine import Machine, policy, service


def test_governed_call(machine: Machine) -> None:
    port = machine.endpoint("a")
    machine.configure(service("orders", "127.96.0.10", [port]))
    machine.run_agent()
    seen = machine.curl("http://127.96.0.10/hello")
    assert seen["endpoint"] == "a"
    assert seen["headers"]["Host"] == "127.96.0.10"
    (record,) = machine.records(1)
    assert record["service"] == "orders"
    assert record["response_code"] == 200
    assert record["upstream_host"] == f"127.0.0.1:{port}"
    assert record["workload"] == f"/{machine.cgroup.name}"
    assert record["carrier"] == "proxy"
    assert machine.stop_agent() == 0


def test_direct_call_with_no_process(machine: Machine) -> None:
    port = machine.endpoint("a")
    machine.configure(service("orders", "127.96.0.10", [port]), policy("orders", mode="direct"))
    machine.attach()
    assert machine.curl("http://127.96.0.10/")["endpoint"] == "a"
    done = machine.detach()
    assert "removed link" in done.stdout
    assert machine.client("curl", "-sS", "--max-time", "5", "http://127.96.0.10/").returncode == 7  # refused
    assert not machine.instance.pins.exists()
