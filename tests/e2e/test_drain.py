"""SIGTERM: what is under way is finished, what comes new goes by onProxyDown, and the exit code is 0."""

from __future__ import annotations

import signal
import subprocess
import time

import pytest

from tests.support.machine import Machine, policy, service, until

ADDRESS = "127.96.0.10"
URL = f"http://{ADDRESS}/"


def slow_request(machine: Machine, seconds: float) -> subprocess.Popen[str]:
    """A request that the endpoint answers after that time; returns when it is under way."""
    before = requests_in_flight(machine)
    client = machine.start_client(
        "curl", "-sS", "-w", "%{http_code}", "-o", "/dev/null", "--max-time", "20", f"{URL}slow?s={seconds}",
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    until(lambda: requests_in_flight(machine) > before, "the request is under way")
    return client


def requests_in_flight(machine: Machine) -> int:
    (row,) = machine.show("services")["services"]
    return int(row["open"])


@pytest.mark.parametrize("workers", [1, 3])
def test_a_slow_request_is_finished_and_the_exit_is_clean(machine: Machine, workers: int) -> None:
    machine.agent_spec["proxy"] = {"listen": f"127.0.0.1:{machine.proxy_port}", "drain": "10s", "workers": workers}
    machine.configure(service("orders", ADDRESS, [machine.quick("a")]))
    agent = machine.run_agent()
    client = slow_request(machine, 3.0)
    agent.send_signal(signal.SIGTERM)
    machine.until_logged("draining")
    assert machine.curl(URL)["endpoint"] == "a"  # onProxyDown: direct
    counts = {row["reason"]: row["count"] for row in machine.show("reasons")["reasons"]}
    assert counts["proxy_absent"] == 1 and "proxy_not_in_netns" not in counts, counts
    assert client.communicate(timeout=20)[0] == "200"
    answered = time.monotonic()
    assert agent.wait(20) == 0
    assert time.monotonic() - answered < 1.5, "it waited although it was idle"
    assert "killed after the drain" not in machine.log()


def test_an_idle_agent_ends_at_once(machine: Machine) -> None:
    machine.agent_spec["proxy"] = {"listen": f"127.0.0.1:{machine.proxy_port}", "drain": "10s"}
    machine.configure(service("orders", ADDRESS, [machine.quick("a")]))
    agent = machine.run_agent()
    machine.curl(URL)
    begin = time.monotonic()
    assert machine.stop_agent() == 0
    assert time.monotonic() - begin < 2.0
    assert not list(machine.instance.run.glob("*.sock")), agent.pid


def test_a_request_longer_than_the_drain_is_cut(machine: Machine) -> None:
    machine.agent_spec["proxy"] = {"listen": f"127.0.0.1:{machine.proxy_port}", "drain": "500ms"}
    machine.configure(service("orders", ADDRESS, [machine.quick("a")]))
    machine.run_agent()
    client = slow_request(machine, 15.0)
    begin = time.monotonic()
    assert machine.stop_agent() == 0
    assert time.monotonic() - begin < 4.0
    client.communicate(timeout=20)
    (record,) = machine.records(1)
    assert record["reason"] == "draining"


@pytest.mark.parametrize("workers", [1, 3])
def test_callers_notice_nothing(machine: Machine, workers: int) -> None:
    """Stop and start under load: governed, then straight to the endpoint, then governed again."""
    machine.configure(service("orders", ADDRESS, [machine.quick("a")]))
    machine.run_agent("--workers", str(workers))
    loads = [machine.load(ADDRESS, connections=6, new=new, rate=300) for new in (True, False)]
    for _ in range(3):
        assert machine.stop_agent() == 0
        machine.run_agent("--workers", str(workers))
    for load in loads:
        result = load.stop()
        assert not result["failed"] and not result["failed_kept"] and not result["stale"], result
        assert result["ok"] > 300


def test_refused_while_down_when_told_so(machine: Machine) -> None:
    machine.configure(service("orders", ADDRESS, [machine.quick("a")]), policy("orders", onProxyDown="refuse"))
    machine.run_agent()
    machine.curl(URL)
    assert machine.stop_agent() == 0
    assert machine.client("curl", "-sS", "--max-time", "5", URL).returncode == 7
    machine.run_agent()
    machine.curl(URL)
