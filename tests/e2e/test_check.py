"""`check` on a real machine: what it says before an attach, of a living instance, and of a cgroup that went away."""

from __future__ import annotations

import json
import os
from typing import Any

from tests.support.machine import Machine, free_port, service, until


def look(machine: Machine, *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit code, and each check by its id."""
    done = machine.meshbpf("check", "--instance", machine.instance.name, "-o", "json", *arguments)
    answer = json.loads(done.stdout)
    assert answer["schemaVersion"] == 1
    rows = {check["id"]: check for category in answer["categories"] for check in category["checks"]}
    assert answer["success"] == all(row["result"] != "error" for row in rows.values())
    return done.returncode, rows


def test_before_an_attach(machine: Machine) -> None:
    code, rows = look(machine, "--pre")
    assert code in (0, 79)
    assert "attached" not in rows
    assert rows["capabilities"]["result"] == rows["bcc"]["result"] == "ok"
    code, rows = look(machine)
    assert code == 1
    assert rows["attached"]["result"] == "error"
    assert "meshbpf attach" in rows["attached"]["remedy"]


def test_governed_ports_want_an_agent(machine: Machine) -> None:
    machine.configure(service("orders", "127.96.0.10", [machine.endpoint("a")]))
    machine.attach()
    code, rows = look(machine)
    assert (code, rows["agent"]["result"]) == (79, "warning"), [r for r in rows.values() if r["result"] == "error"]
    machine.run_agent()
    code, rows = look(machine, "--wait", "10s")
    assert code in (0, 79), [row for row in rows.values() if row["result"] == "error"]
    assert rows["proxy-ready"]["result"] == rows["attached-cgroup"]["result"] == "ok"


def test_an_endpoint_that_retries_hide_is_named_until_it_serves_again(machine: Machine) -> None:
    dead = free_port()
    machine.configure(service("orders", "127.96.0.10", [machine.quick("a"), dead]))
    machine.run_agent()
    assert look(machine)[1]["endpoints"]["result"] == "ok"

    def found() -> dict[str, Any]:
        assert machine.curl("http://127.96.0.10/")["endpoint"] in ("a", "b")
        return look(machine)[1]["endpoints"]

    row = until(lambda: (row := found())["result"] == "warning" and row, "the dead one is named")
    assert row["detail"].startswith(f"orders 127.0.0.1:{dead} connect_failed ")
    assert row["remedy"].startswith(f"meshbpf endpoints orders --instance {machine.instance.name}; ")
    machine.quick("b", port=dead)
    until(lambda: found()["result"] == "ok", "it serves again")


def test_a_cgroup_that_went_away_and_came_back(machine: Machine) -> None:
    machine.configure(service("raw", "127.96.0.10", [machine.endpoint("a")], protocol="tcp"))
    machine.attach()
    assert look(machine)[1]["agent"]["result"] == "ok"  # every port is direct: none needed
    machine.cgroup.rmdir()
    row = look(machine)[1]["attached-cgroup"]
    assert row["result"] == "error"
    assert f"mkdir {machine.cgroup}" in row["remedy"]
    machine.cgroup.mkdir()
    row = look(machine)[1]["attached-cgroup"]
    assert row["result"] == "error" and "made anew" in row["detail"]
    machine.attach()
    assert look(machine)[1]["attached-cgroup"]["result"] == "ok"


def test_somebody_without_rights_gets_69_and_still_sees_what_can_be_seen(machine: Machine) -> None:
    def drop() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)

    done = machine.meshbpf("check", "--pre", preexec_fn=drop)
    assert done.returncode == 69, done.stderr
    assert "capabilities" in done.stdout and "kernel-version" in done.stdout
