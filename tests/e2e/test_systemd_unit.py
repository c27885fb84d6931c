"""deploy/systemd under a real systemd: it starts, it is confined, and no restart or crash costs a caller anything."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from loader import environment
from tests.support.booted import INIT, Booted
from tests.support.machine import ROOT, Load, policy, service, until

CAP_SYS_RESOURCE = 24
UNIT = ROOT / "deploy/systemd/meshbpf.service"
GOVERNED, DIRECT = "127.96.0.10", "127.96.0.11"


@pytest.fixture
def booted(tmp_path: Path) -> Iterator[Booted]:
    assert Path(INIT).exists() and shutil.which("nsenter"), "systemd is missing: vagrant/provision.sh test"
    with Booted(tmp_path) as made:
        port = made.endpoint("a")
        documents = [
            service("orders", GOVERNED, [port]),
            service("ledger", DIRECT, [port]),
            policy("orders", onProxyDown="direct"),
            policy("ledger", mode="direct"),
        ]
        made.write("/etc/meshbpf/mesh.yaml", yaml.safe_dump_all(documents))
        made.write("/etc/systemd/system/meshbpf.service", UNIT.read_text())
        made.run("systemctl", "daemon-reload", check=True)
        yield made


def log(booted: Booted) -> str:
    return booted.journal("-u", "meshbpf.service")


def begin(booted: Booted) -> int:
    """Start the unit; the agent's process."""
    done = booted.run("systemctl", "start", "meshbpf.service")
    assert done.returncode == 0, (done.stderr, booted.journal()[-4000:])
    return int(booted.unit("meshbpf.service")["MainPID"])


def verdicts(booted: Booted) -> dict[str, int]:
    """Of the connect hook, by reason."""
    return {row["reason"]: row["count"] for row in booted.show("reasons")["reasons"] if row["program"] == "connect"}


def loads(booted: Booted) -> dict[tuple[str, str], Load]:
    return {
        (name, kind): booted.load(address, new=kind == "new")
        for name, address in (("governed", GOVERNED), ("direct", DIRECT))
        for kind in ("new", "kept")
    }


def test_systemd_has_nothing_to_say_about_the_unit(booted: Booted) -> None:
    said = booted.run("systemd-analyze", "verify", "/etc/systemd/system/meshbpf.service")
    assert said.returncode == 0 and not said.stderr, said.stderr


def test_started_means_led_and_confined(booted: Booted) -> None:
    booted.run("systemctl", "start", "shop.slice", check=True)
    booted.write("/etc/default/meshbpf", "MESHBPF_RUN_CGROUP=mesh.slice:shop.slice\nMESHBPF_RUN_WORKERS=2\n")
    pid = begin(booted)
    led = [row["path"] for row in booted.show("status")["cgroups"]]
    assert led == ["/sys/fs/cgroup/mesh.slice", "/sys/fs/cgroup/shop.slice"]
    # Nothing was waited for: `systemctl start` came back, so callers are led and governed.
    done = booted.run("curl", "-sS", "-i", "--max-time", "5", f"http://{GOVERNED}/", slice_="mesh.slice")
    assert done.returncode == 0, (done.stderr, log(booted))
    assert verdicts(booted) == {"proxy": 1}
    assert "error" not in log(booted).lower()
    held = booted.run("grep", "-E", "CapEff|NoNewPrivs|Seccomp:", f"/proc/{pid}/status", check=True).stdout
    wanted = sum(1 << bit for bit in (*environment.CAPABILITIES, *environment.TO_SERVE, CAP_SYS_RESOURCE))
    fields = dict(line.split(":", 1) for line in held.splitlines())
    assert int(fields["CapEff"], 16) & ~wanted == 0
    assert fields["NoNewPrivs"].strip() == "1" and fields["Seccomp"].strip() == "2"
    until(lambda: "acceleration=" in log(booted), "the self-test under the unit's confinement")
    assert "acceleration=redirect why=self-test passed" in log(booted), log(booted)
    assert booted.run("systemctl", "reload", "meshbpf.service").returncode == 0


def test_restarts_cost_callers_nothing(booted: Booted) -> None:
    begin(booted)
    running = loads(booted)
    for _ in range(3):
        assert booted.run("systemctl", "restart", "meshbpf.service").returncode == 0, log(booted)
    for name, load in running.items():
        result = load.stop()
        print(name, result)
        assert result["ok"] > 200 and not result["failed"] and not result["failed_kept"], (name, result)


def test_a_stopped_unit_leaves_callers_led(booted: Booted) -> None:
    begin(booted)
    running = loads(booted)
    booted.run("systemctl", "stop", "meshbpf.service", check=True)
    assert booted.unit("meshbpf.service")["ActiveState"] == "inactive"
    assert booted.show("status")["cgroups"], "the state file went with the unit"
    after = [booted.load(address, new=True) for address in (GOVERNED, DIRECT)]
    for load in (*running.values(), *after):
        result = load.stop()
        assert not result["failed"] and not result["failed_kept"], result
    assert booted.meshbpf("detach").returncode == 0
    refused = booted.run("curl", "-sS", "--max-time", "5", f"http://{DIRECT}/", slice_="mesh.slice")
    assert refused.returncode == 7


def test_a_killed_agent_is_restarted_and_its_workers_bridge_the_gap(booted: Booted) -> None:
    before = begin(booted)
    running = loads(booted)
    booted.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "meshbpf.service", check=True)

    def again() -> bool:
        unit = booted.unit("meshbpf.service")
        return unit["ActiveState"] == "active" and int(unit["MainPID"]) not in (0, before)

    until(again, "the next agent", 30.0)
    for name, load in running.items():
        result = load.stop()
        print(name, result)
        assert not result["failed"] and not result["failed_kept"], (name, result)
    led = verdicts(booted).keys() - {"place_taken"}  # speed, not where to
    assert led == {"proxy", "direct"}, "governed ports were not governed all the time"


def test_a_bad_configuration_is_not_tried_for_ever(booted: Booted) -> None:
    booted.write("/etc/meshbpf/mesh.yaml", "kind: Nonsense\n")
    assert booted.run("systemctl", "start", "meshbpf.service").returncode != 0
    unit = booted.unit("meshbpf.service")
    assert (unit["ActiveState"], unit["ExecMainStatus"], unit["NRestarts"]) == ("failed", "65", "0")
    assert re.search(r"/etc/meshbpf/mesh.yaml:1:\d+", log(booted))
