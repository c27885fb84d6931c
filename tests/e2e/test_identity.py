"""Who may talk to the proxy, who is exempt, and what happens when a name, a port or an instance is taken."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.machine import CLI, Machine, policy, service, until

ADDRESS = "127.96.0.10"
URL = f"http://{ADDRESS}/"


def reasons(machine: Machine) -> dict[str, int]:
    return {row["reason"]: row["count"] for row in machine.show("reasons")["reasons"]}


@pytest.mark.parametrize("inside", [True, False])
def test_the_proxy_port_dialled_directly_is_closed_and_counted(machine: Machine, inside: bool) -> None:
    machine.configure(service("orders", ADDRESS, [machine.quick("a")]))
    machine.run_agent()
    dial = f"http://127.0.0.1:{machine.proxy_port}/"
    curl = ["curl", "-sS", "--max-time", "5", "-H", f"Host: {ADDRESS}", dial]
    done = machine.client(*curl) if inside else subprocess.run(curl, capture_output=True, text=True, check=False)
    assert done.returncode in (52, 56), done  # closed or reset, without an answer

    def page() -> str:
        metrics = ["curl", "-sS", "--max-time", "5", f"http://127.0.0.1:{machine.admin_port}/metrics"]
        return subprocess.run(metrics, capture_output=True, text=True, check=True).stdout

    until(lambda: "no_origin" in page(), "it is counted")
    line = next(line for line in page().splitlines() if "no_origin" in line)
    assert line.endswith(" 1.0"), line
    assert machine.curl(URL)["endpoint"] == "a"


def test_an_agent_inside_the_attached_cgroup_is_exempt_and_its_neighbours_are_not(machine: Machine) -> None:
    machine.configure(service("orders", ADDRESS, [machine.quick("a")]))
    machine.run_agent(cgroup=machine.cgroup)
    leaf = machine.cgroup / f"meshbpf-agent-{machine.instance.name}"
    said = machine.agent_says()
    inside = {int(line) for line in (leaf / "cgroup.procs").read_text().split()}
    assert {said["pid"], *said["worker_pids"]} <= inside
    dial = ["curl", "-sS", "--max-time", "5", URL]
    as_agent = machine._joined(dial, leaf)
    done = subprocess.run(as_agent, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done  # left alone: nobody listens on the service's address itself
    assert reasons(machine)["agent_exempt"] == 1
    assert machine.curl(URL)["endpoint"] == "a"
    assert machine.stop_agent() == 0
    assert f"removed cgroup {leaf}" in machine.detach().stdout
    assert not leaf.exists()


def test_a_strangers_listener_on_the_proxy_port_is_named_and_nothing_is_changed(machine: Machine) -> None:
    machine.configure(service("orders", ADDRESS, [1]))
    with socket.create_server(("127.0.0.1", machine.proxy_port)):
        done = machine.run_to_end()
    assert done.returncode == 1
    assert f"port {machine.proxy_port} is taken by process {os.getpid()}" in done.stderr, done.stderr
    assert done.stderr.rstrip().endswith("change Agent.spec.proxy.listen")
    assert "Traceback" not in done.stderr
    assert not machine.instance.pins.exists() and not machine.instance.run.exists()


def test_a_strangers_listener_in_another_namespace_costs_the_mesh_only_there(machine: Machine) -> None:
    port = machine.quick("a")
    other = machine.netns(f"{machine.instance.name}-o")
    machine.quick("stranger", port=machine.proxy_port, netns=other)
    stranger = machine.latest
    machine.quick("there", port=port, netns=other)
    machine.configure(service("orders", ADDRESS, [port]))
    machine.run_agent()
    assert machine.curl(URL, netns=other)["endpoint"] == "there"  # onProxyDown: direct, never the stranger
    machine.until_logged("namespace not served")
    assert f"process {stranger.pid}" in machine.log()
    for _ in range(20):
        assert machine.curl(URL, netns=other)["endpoint"] == "there"
    assert machine.log().count("namespace not served") == 1
    assert reasons(machine)["proxy_not_in_netns"] == 21
    stranger.kill()
    stranger.wait()
    until(lambda: machine.curl(URL, netns=other) and "serving namespace" in machine.log(), "served once it is free")


def test_an_instance_has_one_agent(machine: Machine) -> None:
    machine.configure(service("orders", ADDRESS, [machine.quick("a")]))
    agent = machine.run_agent()
    for command in ("run", "attach"):
        done = machine.meshbpf(
            command, "--cgroup", str(machine.cgroup), "-c", str(machine.folder / "config"),
            "--instance", machine.instance.name,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (1, ""), done
        first, remedy = done.stderr.splitlines()
        assert first == f"meshbpf: instance {machine.instance.name} is in use by process {agent.pid}"
        assert remedy.startswith("  remedy: change its configuration")
    assert machine.curl(URL)["endpoint"] == "a"


def test_only_root_reaches_the_agent_and_the_pins(machine: Machine) -> None:
    machine.configure(service("orders", ADDRESS, [machine.quick("a")]))
    machine.run_agent()

    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    run, pins = machine.instance.run, machine.instance.pins
    assert mode(run) == 0o700
    assert {mode(path) for path in run.glob("*.sock")} == {0o600}
    assert len(list(run.glob("*.sock"))) == 2  # the agent's and the worker's
    assert mode(run / "state.json") == 0o600
    assert mode(pins) == 0o700
    assert {mode(path) for path in pins.rglob("*") if path.is_file()} == {0o600}


def test_exec_enters_the_mesh(machine: Machine) -> None:
    machine.configure(service("orders", ADDRESS, [machine.quick("a")]))
    machine.run_agent()
    done = machine.meshbpf("exec", "--instance", machine.instance.name, "--", "curl", "-sS", "--max-time", "5", URL)
    assert '"endpoint": "a"' in done.stdout, done
    below = machine.cgroup / "made" / "here"
    done = machine.meshbpf("exec", "--cgroup", str(below), "--", "curl", "-sS", "--max-time", "5", URL)
    assert '"endpoint": "a"' in done.stdout, done
    assert [record["workload"] for record in machine.records(2)] == [
        f"/{machine.cgroup.name}", f"/{machine.cgroup.name}/made/here",
    ]  # fmt: skip
    done = machine.meshbpf(
        "exec", "--instance", machine.instance.name, "--", sys.executable, "-c", "raise SystemExit(7)"
    )
    assert done.returncode == 7
    done = machine.meshbpf("exec", "--instance", machine.instance.name, "--", "no-such-program")
    assert (done.returncode, done.stderr) == (127, "meshbpf: cannot run no-such-program: No such file or directory\n")


def test_a_stopped_start_leaves_no_process(machine: Machine) -> None:
    """SIGTERM while the agent still starts."""
    machine.configure(service("orders", ADDRESS, [machine.quick("a")]), policy("orders"))
    command = ["run", "--cgroup", str(machine.cgroup), "-c", str(machine.folder / "config")]
    for _ in range(3):
        agent = machine.start([*CLI, *command, "--instance", machine.instance.name], stderr=subprocess.DEVNULL)
        until(lambda: list(machine.instance.run.glob("worker-*.sock")), "a worker starts")
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(20) == 0
        assert not list(machine.instance.run.glob("*.sock"))
