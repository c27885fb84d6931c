"""What `attach`, `run` and `check` say of neighbours and of a confinement: who keeps us out, whom we switch off, and
what a container must be given. docs/coexistence.md tells users.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.test_check import look
from tests.support import bpftool, foreign
from tests.support.machine import CLI, ROOT, Done, Machine, service

ADDRESS = "127.96.0.10"
MAP_CREATE, PROG_LOAD, LINK_CREATE = 0, 5, 28  # commands of bpf(2)
CONNECT = (foreign.CGROUP_SOCK_ADDR, foreign.INET4_CONNECT)


@pytest.fixture
def apps(machine: Machine) -> Path:
    """A cgroup to lead: below the machine's own, to which neighbours attach."""
    machine.configure(service("orders", ADDRESS, [machine.quick("a")], protocol="tcp"))
    folder = machine.cgroup / "apps"
    folder.mkdir()
    return folder


def attach(machine: Machine, cgroup: Path, before: tuple[str, ...] = ()) -> Done:
    command = [*before, *CLI, "attach", "--cgroup", str(cgroup), "-c", str(machine.folder / "config")]
    return subprocess.run(
        [*command, "--instance", machine.instance.name],
        capture_output=True, text=True, check=False, timeout=60, cwd=ROOT,
    )  # fmt: skip


def curl(machine: Machine, cgroup: Path, *before: str) -> Done:
    command = machine._joined([*before, "curl", "-sS", "--max-time", "5", f"http://{ADDRESS}/"], cgroup)
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)


def test_a_neighbour_that_keeps_us_out(machine: Machine, apps: Path) -> None:
    with foreign.attached(machine.cgroup, foreign.EXCLUSIVE, *CONNECT) as number:
        done = attach(machine, apps)
        assert (done.returncode, done.stdout) == (1, "")
        said, remedy = done.stderr.splitlines()
        assert said.startswith(f"meshbpf: connect4 on {apps}: program {number} was attached exclusively")
        assert said.endswith(f" to {machine.cgroup}: no other there or below")
        assert remedy.startswith("  remedy: name a cgroup that is not below it")
        assert f"bpftool prog show id {number}" in remedy
        assert bpftool.hooks_on(apps) == []
        row = look(machine, "--pre")[1]["exclusive-hook"]
        assert row["result"] == "warning"
        assert f"neighbour (connect4 on {machine.cgroup})" in row["detail"]
    assert attach(machine, apps).returncode == 0


def test_a_neighbour_that_we_switch_off(machine: Machine, apps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with foreign.attached(machine.cgroup, foreign.OVERRIDE, *CONNECT) as number:
        done = attach(machine, apps)
        assert done.returncode == 0, done.stderr
        told = f"program {number} on {machine.cgroup} does not run for connect4 of {apps}"
        assert done.stderr.startswith(f"warning: {told}: it was attached without BPF_F_ALLOW_MULTI")
        row = look(machine)[1]["foreign-programs"]
        assert row["result"] == "warning"
        assert f"neighbour (connect4 on {machine.cgroup}, off for cgroups below that we lead)" in row["detail"]
        with monkeypatch.context() as instead:
            instead.setattr(machine, "cgroup", apps)
            machine.run_agent()
            assert f"neighbour switched off: {told}" in machine.log()
            machine.stop_agent()
        assert machine.detach().returncode == 0
        # Led itself, its cgroup refuses us: nobody else may be there.
        done = machine.run_to_end()
        assert done.returncode == 1
        assert f"program {number} was attached there with BPF_F_ALLOW_OVERRIDE" in done.stderr


def test_only_neighbours_of_what_is_led_are_told_of(machine: Machine, apps: Path) -> None:
    beside = machine.cgroup / "beside"
    beside.mkdir()
    assert attach(machine, apps).returncode == 0
    with foreign.attached(beside, None, *CONNECT):
        assert look(machine)[1]["foreign-programs"]["result"] == "ok"
        assert f"neighbour (connect4 on {beside})" in look(machine, "--pre")[1]["foreign-programs"]["detail"]
    with foreign.attached(apps, None, foreign.SOCK_OPS, foreign.CGROUP_SOCK_OPS):
        row = look(machine)[1]["foreign-programs"]
        assert row["result"] == "warning"
        assert f"neighbour (sock_ops on {apps})" in row["detail"]


# --- what confines us ------------------------------------------------------------------------------------------------


def filtered(command: int | str) -> tuple[str, ...]:
    return (sys.executable, "-m", "tests.support.seccomp", str(command))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("all", "bpf() is refused with EPERM although the capabilities are there"),
        (MAP_CREATE, "compile: Failed to compile BPF module <text>: the kernel says EPERM"),
        (PROG_LOAD, "load getpeername4: Need super-user privileges to run: the kernel says EPERM"),
    ],
)
def test_bpf_that_is_refused(machine: Machine, apps: Path, command: int | str, said: str) -> None:
    """By a container's seccomp profile, or by a security module, to somebody who has every capability."""
    done = attach(machine, apps, filtered(command))
    assert done.returncode == 69, done.stderr
    first, remedy = done.stderr.splitlines()
    assert first == f"meshbpf: {said}: this process runs under a seccomp filter"
    assert remedy.startswith("  remedy: allow bpf() in the seccomp profile")
    assert not machine.instance.pins.exists() and bpftool.hooks_on(apps) == []


def test_links_that_are_refused(machine: Machine, apps: Path) -> None:
    """Nobody is on the hook, so nobody is blamed."""
    done = attach(machine, apps, filtered(LINK_CREATE))
    assert done.returncode == 1
    assert f"on {apps}: attach by link: Operation not permitted (EPERM); what is there: bpftool" in done.stderr
    assert not machine.instance.pins.exists() and bpftool.hooks_on(apps) == []


def test_a_check_that_may_not_use_bpf(machine: Machine) -> None:
    done = subprocess.run(
        [*filtered("all"), *CLI, "check", "--instance", machine.instance.name],
        capture_output=True, text=True, check=False, timeout=60, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 69, done.stderr
    assert "this process runs under a seccomp filter" in done.stdout
    assert "foreign-programs" not in done.stdout  # it could not look, so it does not say that there are none


CONTAINER = (
    "unshare", "--cgroup", "--mount", "--propagation", "private", "sh", "-c",
    'umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && exec "$@"', "sh",
)  # fmt: skip


def test_a_caller_in_a_cgroup_namespace_of_its_own_is_led(machine: Machine, apps: Path) -> None:
    """docker's --cgroupns=private: it changes what a container sees, not where it is."""
    assert attach(machine, apps).returncode == 0
    container = apps / "docker-0123"
    container.mkdir()
    done = curl(machine, container, *CONTAINER)
    assert '"endpoint": "a"' in done.stdout, done


def test_an_agent_in_a_cgroup_namespace_of_its_own(machine: Machine, apps: Path) -> None:
    """It sees its own container only; its top is no root cgroup, and what it lacks is named."""
    inside = tuple(machine._joined([*CONTAINER], apps))
    for cgroup, said in (
        ("/sys/fs/cgroup", "is the top of a container's cgroup namespace: nobody outside of it can be led"),
        ("/sys/fs/cgroup/mesh.slice", "does not exist"),
    ):
        done = attach(machine, Path(cgroup), inside)
        assert done.returncode == 69, done.stderr
        first, remedy = done.stderr.splitlines()
        assert said in first
        assert "--cgroupns=host -v /sys/fs/cgroup:/sys/fs/cgroup" in remedy
    look_inside = [*inside, *CLI, "check", "--pre"]
    done = subprocess.run(look_inside, capture_output=True, text=True, check=False, timeout=60, cwd=ROOT)
    row = next(line for line in done.stdout.splitlines() if " cgroup2 " in line)
    assert row.split()[0] == "warning" and "the top of a container's" in row
