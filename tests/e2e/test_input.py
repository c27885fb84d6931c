"""Bad input through the real command line: the contract's exit code, what is wrong, the remedy, never a traceback."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from loader import environment
from tests.support.machine import CLI, ROOT, Done, Machine, policy, service, which

GOOD = service("orders", "127.96.0.10", [8081])


def told(done: Done, code: int, *words: str) -> None:
    assert done.returncode == code, done
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    if code:
        assert done.stderr.strip(), "no word about it"


def text(*documents: dict[str, Any]) -> str:
    return yaml.safe_dump_all(documents)


def changed(change: Callable[[dict[str, Any]], object]) -> str:
    document = deepcopy(GOOD)
    change(document["spec"])
    return text(document)


BAD = {
    "unknown key": (changed(lambda spec: spec.update(endpoint=[])), "endpoint"),
    "wrong type": (changed(lambda spec: spec.update(addresses=7)), "addresses"),
    "bad port": (changed(lambda spec: spec["ports"][0].update(port=70000)), "port"),
    "bad address": (changed(lambda spec: spec.update(addresses=["orders"])), "addresses"),
    "duplicate service": (text(GOOD, service("orders", "127.96.0.11", [8081])), "orders"),
    "two services on one address": (text(GOOD, service("users", "127.96.0.10", [8081])), "127.96.0.10"),
    "a service as its own endpoint": (
        changed(lambda spec: spec.update(endpoints=[{"address": "127.96.0.10", "ports": {"main": 80}}])),
        "127.96.0.10",
    ),
    "our port as endpoint": (changed(lambda spec: spec["endpoints"][0].update(ports={"main": 15001})), "15001"),
    "metadata as endpoint": (changed(lambda spec: spec["endpoints"][0].update(address="169.254.169.254")), "169.254"),
    "policy without service": (text(GOOD, policy("users")), "users"),
    "unknown kind": (text({"apiVersion": "meshbpf.io/v1", "kind": "Servise", "metadata": {"name": "a"}}), "Servise"),
    "half written": ("apiVersion: meshbpf.io/v1\nkind: Service\nmetadata: {name: orders", "mesh.yaml"),
    "no yaml": ("\x00\x01", "mesh.yaml"),
    "duplicate key": ("apiVersion: meshbpf.io/v1\nkind: Service\nkind: Service\n", "kind"),
}


@pytest.mark.parametrize(
    ("command", "case"),
    [("validate", case) for case in BAD] + [(verb, case) for verb in ("attach", "run") for case in list(BAD)[:4]],
)
def test_a_bad_configuration(machine: Machine, command: str, case: str) -> None:
    content, word = BAD[case]
    path = machine.folder / "config" / "mesh.yaml"
    path.parent.mkdir()
    path.write_text(content)
    if command == "validate":
        done = machine.meshbpf("validate", str(path))
    else:
        done = machine.meshbpf(
            command, "--cgroup", str(machine.cgroup), "-c", str(path), "--instance", machine.instance.name
        )
    told(done, 65, f"{path}:", word)
    assert not machine.instance.pins.exists()


def test_a_path_that_is_not_there(machine: Machine) -> None:
    told(machine.meshbpf("validate", "/nonexistent/mesh.yaml"), 65, "/nonexistent/mesh.yaml")
    instance = ["--instance", machine.instance.name]
    for command in ("attach", "run"):
        done = machine.meshbpf(command, "--cgroup", str(machine.cgroup), "-c", "/nonexistent", *instance)
        told(done, 65, "/nonexistent")


def test_cgroups_that_cannot_be_led(machine: Machine, tmp_path: Path) -> None:
    machine.configure(GOOD)
    top = environment.cgroup2()
    for command in ("attach", "run"):
        for path, words in (
            ("/nonexistent", ("does not exist", "mkdir", "slice")),
            (str(top / "no-such-group"), ("does not exist", f"mkdir {top}/no-such-group")),
            ("no-such-group", ("does not exist", f"mkdir {top}/no-such-group")),
            (str(tmp_path), ("is not a cgroup2 directory",)),
            (str(top), ("root cgroup", "--allow-root-cgroup")),
            (f"{machine.cgroup}/..", ("root cgroup",)),
        ):
            config = ["-c", str(machine.folder / "config"), "--instance", machine.instance.name]
            told(machine.meshbpf(command, "--cgroup", path, *config), 69, "remedy: ", *words)
    told(
        machine.meshbpf("exec", "--cgroup", str(tmp_path / "x"), "--", "true"),
        69,
        "is not a cgroup2 directory",
        str(top),
    )
    assert not machine.instance.pins.exists() and not (tmp_path / "x").exists()


def test_an_instance_that_is_not_attached(machine: Machine) -> None:
    instance = ["--instance", machine.instance.name]
    for command in ("status", "services", "endpoints", "endpoints orders", "explain orders", "reasons"):
        told(machine.meshbpf(*command.split(), *instance), 1, "is not attached", "remedy: meshbpf attach")
    told(machine.meshbpf("exec", *instance, "--", "true"), 1, "is not attached", "remedy: ")
    told(machine.meshbpf("deregister", "orders", *instance), 1)
    done = machine.meshbpf("detach", *instance)
    told(done, 0)
    assert done.stdout.startswith(f"nothing attached as {machine.instance.name}\n")


def test_reading_while_no_agent_runs(machine: Machine) -> None:
    machine.configure(GOOD, policy("orders", mode="direct"))
    machine.attach()
    instance = ["--instance", machine.instance.name]
    for command in ("status", "services", "endpoints", "reasons"):
        for form in ("table", "wide", "json", "yaml"):
            done = machine.meshbpf(command, *instance, "-o", form)
            told(done, 0)
            assert command == "reasons" or "orders" in done.stdout or command == "status"
    assert "not running" in machine.meshbpf("status", *instance).stdout
    assert machine.show("services")["schemaVersion"] == 1
    told(machine.meshbpf("status", "--brief", *instance), 0)
    told(machine.meshbpf("services", "-o", "hosts", *instance), 0)
    told(machine.meshbpf("explain", "orders", *instance), 0)


def test_a_service_nobody_knows(machine: Machine) -> None:
    machine.configure(GOOD)
    machine.attach()
    instance = ["--instance", machine.instance.name]
    told(machine.meshbpf("endpoints", "users", *instance), 1, "users", "orders")
    told(machine.meshbpf("explain", "users", *instance), 1, "users")
    told(machine.meshbpf("explain", "127.96.0.99:80", *instance), 1, "127.96.0.99")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"], ["attach"], ["run", "--workers", "0", "--cgroup", "x"], ["run", "--workers", "many"],
        ["status", "-o", "xml"], ["status", "--nonsense"], ["exec"], ["validate"], ["register"],
        ["register", "orders", "--port", "http"], ["register", "orders", "--port", "0"],
        ["register", "orders", "--port", "80", "--ttl", "soon"], ["check", "--wait", "soon"],
        ["run", "--cgroup", "x", "--log-level", "loud"], ["run", "--cgroup", "x", "--log-format", "xml"],
    ],
)  # fmt: skip
def test_usage(machine: Machine, arguments: list[str]) -> None:
    told(machine.meshbpf(*arguments), 2)


@pytest.mark.parametrize("name", ["", "A", "../x", "a" * 41, "-"])
def test_a_bad_instance_name(machine: Machine, name: str) -> None:
    for command in ("status", "detach"):
        done = machine.meshbpf(command, "--instance", name)
        told(done, 2, "instance")


@pytest.mark.parametrize(
    "arguments",
    [
        "attach --cgroup CGROUP -c CONFIG", "run --cgroup CGROUP -c CONFIG", "detach", "status", "services",
        "endpoints", "reasons", "explain orders", "exec --cgroup CGROUP -- true", "exec -- true",
    ],
)  # fmt: skip
def test_not_root(machine: Machine, arguments: str) -> None:
    machine.configure(GOOD)
    machine.attach()
    said = arguments.replace("CGROUP", str(machine.cgroup)).replace("CONFIG", str(machine.folder / "config"))
    verb, *more = said.split()
    nobody = [which("setpriv"), "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    command = [*nobody, *CLI, verb, "--instance", machine.instance.name, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30, cwd=ROOT)
    told(done, 69, "remedy: ", "sudo")
