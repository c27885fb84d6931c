"""Workers that die or hang under load: what it costs callers, and how soon they are back."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.support.machine import Machine, policy, service, until

ADDRESS = "127.96.0.10"
URL = f"http://{ADDRESS}/"
RESTART_SECONDS = 5.0  # a worker is a Python process: about 0.4 s on an idle machine


def begin(machine: Machine, workers: int, **rules: object) -> list[int]:
    machine.configure(service("orders", ADDRESS, [machine.quick("a")]), policy("orders", **rules))
    machine.run_agent("--workers", str(workers))
    pids: list[int] = machine.agent_says()["worker_pids"]
    assert len(pids) == workers
    return pids


def again(machine: Machine, old: int, workers: int) -> bool:
    said = machine.agent_says()
    return old not in said["worker_pids"] and said["ready"] == workers


@pytest.mark.parametrize("workers", [1, 3])
def test_a_killed_worker_costs_only_its_connections(machine: Machine, workers: int) -> None:
    victim = begin(machine, workers)[0]
    fresh = machine.load(ADDRESS, connections=6, new=True, rate=300)
    kept = machine.load(ADDRESS, connections=6, rate=300)
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    until(lambda: again(machine, victim, workers), "the worker is back", RESTART_SECONDS)
    took = time.monotonic() - killed
    print(f"worker back after {took:.2f} s")
    assert machine.agent_says()["restarts"] == 1
    machine.records(500)
    first, second = fresh.stop(), kept.stop()
    assert first["ok"] > 100 and second["ok"] > 100, (first, second)
    # Whoever was inside the worker at that moment: at most one request per connection, all at once, and none
    # once the worker is back.
    for result in (first, second):
        lost = sum(result["failed"].values()) + sum(result["failed_kept"].values())
        assert lost <= 6, result
        assert not lost or result["last_failure"] - killed < max(0.5, took), result
    assert not second["failed"], second  # a new connection never fails: it waits in the listener for the next worker


def test_a_worker_that_keeps_dying_is_restarted_ever_more_slowly(machine: Machine) -> None:
    begin(machine, 1)
    for number in range(1, 4):
        (pid,) = until(lambda: machine.agent_says()["worker_pids"], "a worker")
        os.kill(pid, signal.SIGKILL)
        until(lambda pid=pid: again(machine, pid, 1), "the worker is back", RESTART_SECONDS)
        assert machine.agent_says()["restarts"] == number
    delays = [line.split("delay=")[1] for line in machine.log().splitlines() if "worker died" in line]
    assert delays == ["0.0s", "0.1s", "0.5s"]


@pytest.mark.parametrize(("down", "code"), [("direct", 0), ("refuse", 7)])
def test_a_hanging_proxy_is_bypassed_within_its_heartbeat(machine: Machine, down: str, code: int) -> None:
    (worker,) = begin(machine, 1, onProxyDown=down)
    assert machine.curl(URL)["endpoint"] == "a"
    os.kill(worker, signal.SIGSTOP)
    stopped = time.monotonic()

    def bypassed() -> bool:
        done = machine.client("curl", "-sS", "--max-time", "0.1", URL)
        return done.returncode == code

    until(bypassed, "onProxyDown", 5.0)
    took = time.monotonic() - stopped
    print(f"bypassed after {took:.2f} s")
    assert took < 1.6  # a heartbeat may be 1 s old, a try takes 0.1 s; the rest is for a busy machine
    counts = {(row["program"], row["reason"]): row["count"] for row in machine.show("reasons")["reasons"]}
    assert counts["connect", "proxy_hung"] > 0
    os.kill(worker, signal.SIGCONT)
    until(
        lambda: len(machine.records(1)) and machine.client("curl", "-sS", "--max-time", "5", URL).returncode == 0,
        "the proxy serves again",
    )


def test_a_worker_that_hangs_for_good_is_replaced(machine: Machine) -> None:
    stuck = begin(machine, 2)[0]
    os.kill(stuck, signal.SIGSTOP)
    until(lambda: again(machine, stuck, 2), "another worker", 20.0)
    assert "worker hangs" in machine.log()
    assert machine.curl(URL)["endpoint"] == "a"
