"""The agent dies, and the next one takes over: callers must not notice."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.machine import Machine, policy, service, until

ADDRESS = "127.96.0.10"
URL = f"http://{ADDRESS}/"


def failures(result: dict[str, object]) -> dict[str, object]:
    return {key: result[key] for key in ("failed", "failed_kept") if result[key]}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def kill_agent(machine: Machine) -> list[int]:
    """The workers it leaves behind."""
    pids: list[int] = machine.agent_says()["worker_pids"]
    machine.stop_agent(signal.SIGKILL)
    return pids


@pytest.mark.parametrize(
    ("mode", "workers", "sizes"),
    [("direct", 1, {}), ("proxy", 1, {}), ("proxy", 3, {}), ("proxy", 3, {"flows": 4096})],
)
def test_killed_under_load_and_replaced_with_no_failed_request(
    machine: Machine, mode: str, workers: int, sizes: dict[str, int]
) -> None:
    """Not with other tables either, which neither the earlier workers nor the earlier hooks know."""
    rules = policy("orders", mode=mode, onProxyDown="refuse")
    orders = service("orders", ADDRESS, [machine.quick("a"), machine.quick("b")])
    machine.configure(orders, rules)
    machine.run_agent("--workers", str(workers))
    loads = [machine.load(ADDRESS, connections=6, new=new, rate=300) for new in (True, False)]
    left = kill_agent(machine)
    assert all(alive(pid) for pid in left)
    assert machine.curl(URL)["endpoint"] in "ab"
    machine.agent_spec["maps"] = sizes
    machine.configure(orders, rules)
    machine.run_agent("--workers", str(workers))
    until(lambda: not any(alive(pid) for pid in left), "the workers of the killed agent have drained")
    assert machine.curl(URL)["endpoint"] in "ab"
    for load in loads:
        result = load.stop()
        assert not failures(result) and result["stale"] == 0, result
        assert result["ok"] > 300
        if mode == "proxy" or load is loads[0]:  # the few kept connections may all have been given to one
            assert set(result["endpoints"]) == {"a", "b"}
    if mode == "proxy":
        assert {record["carrier"] for record in machine.records(1)} == {"proxy"}, "never bypassed"
        counts = {row["reason"]: row["count"] for row in machine.show("reasons")["reasons"]}
        assert not {"proxy_absent", "proxy_hung", "proxy_not_in_netns"} & set(counts), counts


@pytest.mark.parametrize("sizes", [{}, {"flows": 4096}], ids=["same tables", "other tables"])
def test_a_new_agent_brings_a_new_service(machine: Machine, sizes: dict[str, int]) -> None:
    """The workers of the killed agent do not know it: nothing may be led to them that they cannot serve, from the first
    moment at which the kernel leads its callers. With the same tables that is while they still accept.
    """
    port, new = machine.quick("a"), "127.96.0.11"
    ours = policy("orders", mode="proxy"), policy("users", mode="proxy", onProxyDown="refuse")
    machine.configure(service("orders", ADDRESS, [port]), ours[0])
    machine.run_agent()
    load = machine.load(ADDRESS, connections=4, new=True, rate=300)
    kill_agent(machine)
    machine.agent_spec["maps"] = sizes
    machine.configure(service("orders", ADDRESS, [port]), service("users", new, [port]), *ours)
    asking = machine.start_client(
        "sh", "-c", f"while sleep 0.02; do curl -s -o /dev/null -w '%{{exitcode}} ' --max-time 5 http://{new}/; done",
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    machine.run_agent()
    assert machine.curl(f"http://{new}/")["endpoint"] == "a"
    asking.terminate()
    codes = asking.communicate(timeout=10)[0].split()
    result = load.stop()
    assert not failures(result), result
    # 7: nobody has that address yet. Never 52, an empty answer.
    known = codes.index("0")
    assert set(codes[:known]) <= {"7", "28"} and set(codes[known:]) == {"0"}, codes
    assert "does not take the new mesh" not in machine.log()
    assert "died" not in machine.log()


def test_attach_beside_orphans_gives_them_the_new_service(machine: Machine) -> None:
    port, new = machine.endpoint("a"), "127.96.0.11"
    machine.configure(service("orders", ADDRESS, [port]))
    machine.run_agent()
    left = kill_agent(machine)
    machine.configure(service("orders", ADDRESS, [port]), service("users", new, [port]))
    machine.attach()
    assert all(alive(pid) for pid in left)
    assert machine.curl(f"http://{new}/")["endpoint"] == "a"
    assert machine.records(1)[-1]["service"] == "users"


def test_a_hanging_orphan_does_not_keep_the_next_agent_away(machine: Machine) -> None:
    machine.configure(service("orders", ADDRESS, [machine.quick("a")]))
    machine.run_agent()
    (stuck,) = kill_agent(machine)
    os.kill(stuck, signal.SIGSTOP)
    machine.run_agent()
    assert "does not answer" in machine.log()
    assert not alive(stuck)
    assert machine.curl(URL)["endpoint"] == "a"


def test_detach_ends_a_running_agent(machine: Machine) -> None:
    machine.configure(service("orders", ADDRESS, [machine.quick("a")]))
    agent = machine.run_agent("--workers", "2")
    workers = machine.agent_says()["worker_pids"]
    done = machine.detach()
    assert done.returncode == 0, done.stderr
    assert f"removed agent {agent.pid}" in done.stdout
    assert agent.wait(5) == 0
    assert not any(alive(pid) for pid in workers)
    assert not machine.instance.pins.exists() and not machine.instance.run.exists()
    again = machine.detach()
    assert again.returncode == 0 and again.stdout.startswith(f"nothing attached as {machine.instance.name}\n")


def test_detach_ends_orphans_even_hanging_ones(machine: Machine) -> None:
    machine.configure(service("orders", ADDRESS, [machine.quick("a")]))
    machine.run_agent("--workers", "2")
    left = kill_agent(machine)
    os.kill(left[0], signal.SIGSTOP)
    done = machine.detach()
    assert done.returncode == 0, done.stderr
    assert f"removed worker {left[1]}" in done.stdout
    assert not any(alive(pid) for pid in left)
    assert not machine.instance.pins.exists() and not machine.instance.run.exists()


def test_an_orphan_ends_by_a_signal(machine: Machine) -> None:
    """Nobody else is there to tell it. Beside an agent it waits for the agent's word."""
    machine.configure(service("orders", ADDRESS, [machine.quick("a")]))
    machine.run_agent()
    (worker,) = machine.agent_says()["worker_pids"]
    os.kill(worker, signal.SIGTERM)
    assert machine.curl(URL)["endpoint"] == "a"
    assert machine.agent_says()["worker_pids"] == [worker]
    kill_agent(machine)
    os.kill(worker, signal.SIGTERM)
    until(lambda: not alive(worker), "the orphan has ended")
    assert machine.curl(URL)["endpoint"] == "a"  # onProxyDown: direct


def test_a_cgroup_that_is_made_anew_is_led_again(machine: Machine) -> None:
    """`systemctl restart` of an application removes its cgroup and makes another one of the same name."""
    machine.configure(service("orders", ADDRESS, [machine.endpoint("a")]))
    machine.run_agent()
    assert machine.curl(URL)["endpoint"] == "a"
    until(machine.removed_cgroup, "the cgroup is gone")
    until(lambda: machine.readyz() == (503, f"not ready: cgroup is gone: {machine.cgroup}\n"), "not ready")
    assert "cgroup is gone" in machine.agent_says()["error"]
    machine.cgroup.mkdir()
    machine.until_logged("leading it again")
    assert machine.curl(URL)["endpoint"] == "a"
    until(lambda: machine.readyz() == (200, "ready\n"), "ready again")
    assert not machine.agent_says()["error"]
    inode = machine.cgroup.stat().st_ino
    assert {pin.name.split("-")[0] for pin in machine.instance.links.iterdir()} == {str(inode)}
