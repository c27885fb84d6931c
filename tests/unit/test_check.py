"""`check` judges facts: each lack has its id, its result and a remedy, and the exit code follows from the worst."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from meshbpf.cli import around, check, findings, layout
from meshbpf.cli.around import ForeignProgram, Neighbours
from meshbpf.cli.facts import CgroupFacts, InstanceFacts, MachineFacts, SelfTestRow
from meshbpf.cli.findings import Finding, Result
from meshbpf.cli.layout import Screen

GOOD = MachineFacts(
    release="6.1.0-18-amd64", btf=True, cgroup2="/sys/fs/cgroup", bpffs=True, missing_capabilities=(),
    netns_cookies=True, bcc="", libbpf="", bpftool="7.1.0", neighbours=Neighbours(),
    self_test=(SelfTestRow("order", True, "in order", ""),),
)  # fmt: skip
AGENT: dict[str, Any] = {"pid": 7, "ready": 1, "workers": 1, "error": "", "sources": [{"name": "file", "error": ""}]}
LIVING = InstanceFacts(
    "default", True, (CgroupFacts("/sys/fs/cgroup/apps", True, True),), 3, 1, (("slots", 10, 100),), AGENT
)
FAILING: dict[str, Any] = {
    "service": "orders", "endpoint": "127.0.0.1:8082", "state": "ready", "weight": 100, "ok": 2, "failed": 45,
    "last_error": "connect_failed", "last_error_seconds": 3.2,
}  # fmt: skip
FOREIGN = ForeignProgram(9, "cil_sock4_connect", "connect4", "/sys/fs/cgroup")
ALONE_ON_TOP = replace(FOREIGN, mode="")
ALONE = replace(ALONE_ON_TOP, cgroup="/sys/fs/cgroup/theirs")


def worst(found: list[Finding]) -> dict[str, Result]:
    return {finding.id: finding.result for finding in found if finding.result is not Result.OK}


def test_a_good_machine_has_nothing_to_say() -> None:
    assert worst(findings.machine(GOOD)) == {}
    assert worst(findings.instance(LIVING)) == {}
    assert findings.exit_code(findings.machine(GOOD), True) == 0


@pytest.mark.parametrize(
    ("changes", "id", "result"),
    [
        ({"missing_capabilities": ("CAP_BPF",)}, "capabilities", Result.ERROR),
        ({"missing_to_serve": ("CAP_SYS_ADMIN",)}, "capabilities", Result.WARNING),
        ({"release": "5.4.0"}, "kernel-version", Result.ERROR),
        ({"release": "strange"}, "kernel-version", Result.ERROR),
        ({"btf": False}, "btf", Result.WARNING),
        ({"cgroup2": ""}, "cgroup2", Result.ERROR),
        ({"namespaced": True}, "cgroup2", Result.WARNING),
        ({"bpffs": False}, "bpffs", Result.ERROR),
        ({"netns_cookies": False}, "netns-cookies", Result.WARNING),
        ({"bcc": "No module named 'bcc'"}, "bcc", Result.ERROR),
        ({"libbpf": "libbpf is missing"}, "libbpf", Result.ERROR),
        ({"neighbours": None, "bpftool": "not installed"}, "bpftool", Result.WARNING),
        ({"neighbours": Neighbours(hooks=(FOREIGN,))}, "foreign-programs", Result.WARNING),
        ({"neighbours": Neighbours(hooks=(replace(FOREIGN, mode="override"),))}, "foreign-programs", Result.WARNING),
        ({"neighbours": Neighbours(hooks=(ALONE,))}, "exclusive-hook", Result.WARNING),
        ({"neighbours": Neighbours(hooks=(ALONE_ON_TOP,))}, "exclusive-hook", Result.ERROR),
        ({"neighbours": Neighbours(hooks=(ALONE_ON_TOP,)), "led": True}, "exclusive-hook", Result.WARNING),
        ({"bpf_refused": "bpf() is refused with EPERM"}, "capabilities", Result.ERROR),
        ({"neighbours": Neighbours(sk_msg=("theirs",))}, "foreign-sk-msg", Result.WARNING),
        ({"self_test": None, "self_test_lack": ("not run", "do it")}, "self-test", Result.WARNING),
        ({"self_test": (SelfTestRow("order", False, "out of order", "off"),)}, "redirect-order", Result.WARNING),
    ],
)
def test_each_lack_of_a_machine_is_named_with_its_remedy(changes: dict[str, Any], id: str, result: Result) -> None:
    found = findings.machine(replace(GOOD, **changes))
    assert worst(found) == {id: result}
    (bad,) = [finding for finding in found if finding.id == id]
    assert bad.detail and bad.remedy
    assert findings.exit_code(found, True) == (1 if result is Result.ERROR else 79)


@pytest.mark.parametrize(
    ("changes", "id", "result"),
    [
        ({"attached": False}, "attached", Result.ERROR),
        ({"cgroups": (CgroupFacts("/sys/fs/cgroup/apps", False, False),)}, "attached-cgroup", Result.ERROR),
        ({"cgroups": (CgroupFacts("/sys/fs/cgroup/apps", True, False),)}, "attached-cgroup", Result.ERROR),
        ({"fills": (("slots", 80, 100),)}, "map-fill", Result.WARNING),
        ({"agent": None}, "agent", Result.WARNING),
        ({"agent": None, "refused": 1}, "agent", Result.ERROR),
        ({"agent": None, "refused": 1, "proxy_serves": True}, "agent", Result.WARNING),
        ({"agent": None, "agent_error": "no answer"}, "agent", Result.ERROR),
        ({"agent": {**AGENT, "ready": 0}}, "proxy-ready", Result.ERROR),
        ({"agent": {**AGENT, "error": "map slots is full"}}, "mesh-applied", Result.ERROR),
        ({"agent": {**AGENT, "sources": [{"name": "f", "error": "bad"}]}}, "sources", Result.WARNING),
        ({"failing": (FAILING,)}, "endpoints", Result.WARNING),
    ],
)
def test_each_trouble_of_an_instance_is_named_with_its_remedy(changes: dict[str, Any], id: str, result: Result) -> None:
    found = findings.instance(replace(LIVING, **changes))
    assert worst(found) == {id: result}
    (bad,) = [finding for finding in found if finding.id == id]
    assert bad.detail and bad.remedy


def test_a_failing_endpoint_is_named_with_its_service_and_what_to_look_at() -> None:
    other = {**FAILING, "service": "users", "last_error": "upstream_reset"}
    (found,) = [row for row in findings.instance(replace(LIVING, failing=(FAILING, other))) if row.id == "endpoints"]
    assert found.detail == (
        "orders 127.0.0.1:8082 connect_failed 3s ago (45 of 47 attempts failed),"
        " users 127.0.0.1:8082 upstream_reset 3s ago (45 of 47 attempts failed)"
    )
    assert found.remedy == (
        "meshbpf endpoints orders; connect_failed: is the program running, on this address and port?;"
        " upstream_reset: the endpoint's own log"
    )


@pytest.mark.parametrize("change", [{"state": "draining"}, {"weight": 0}, {"last_error_seconds": 601.0}])
def test_an_endpoint_that_is_called_no_more_deserves_no_warning(change: dict[str, Any]) -> None:
    assert worst(findings.instance(replace(LIVING, failing=({**FAILING, **change},)))) == {}


def test_no_agent_is_well_when_every_port_is_direct() -> None:
    assert worst(findings.instance(replace(LIVING, agent=None, governed=0))) == {}


def test_a_look_that_is_not_allowed_exits_69() -> None:
    assert findings.exit_code([], may_look=False) == 69


def test_programs_behind_our_pins_are_not_foreign() -> None:
    links = [{"id": 1, "prog_id": 11, "pinned": ["/sys/fs/bpf/meshbpf/default/links/42-connect4"]}, {"id": 2}]
    programs = [
        {"id": 12, "type": "sk_msg", "name": "stub", "pinned": ["/sys/fs/bpf/meshbpf/default/maps-1/redirect"]},
        {"id": 21, "type": "sk_msg", "name": "theirs"},
    ]
    tree = [
        {"cgroup": "/a", "programs": [{"id": 11, "attach_type": "connect4", "name": "connect4"}]},
        {"cgroup": "/b", "programs": [{"id": 31, "attach_type": "cgroup_inet4_connect", "name": "other"}]},
        {
            "cgroup": "/b",
            "programs": [{"id": 33, "attach_type": "cgroup_udp6_sendmsg", "name": "mine", "attach_flags": ""}],
        },
        {"cgroup": "/c", "programs": [{"id": 32, "attach_type": "device"}]},
        {"cgroup": "/c", "programs": [{"id": 34, "attach_type": "cgroup_inet_sock_release"}]},
    ]
    around_us = around.others(links, programs, tree)
    other, mine = ForeignProgram(31, "other", "connect4", "/b"), ForeignProgram(33, "mine", "sendmsg6", "/b", mode="")
    assert around_us == Neighbours((other, mine, ForeignProgram(34, "", "sock_release", "/c")), ("theirs",), 1)
    assert (str(mine), str(replace(mine, name=""))) == ("mine (sendmsg6 on /b)", "33 (sendmsg6 on /b)")


@pytest.mark.parametrize(
    ("led", "meets"),
    [([], True), (["/a/b"], True), (["/a"], True), (["/a/b/c"], True), (["/a/c"], False), (["/a/bc", "/a/b/d"], True)],
)
def test_programs_above_and_below_what_is_led_are_neighbours(led: list[str], meets: bool) -> None:
    tree = [{"cgroup": "/a/b", "programs": [{"id": 31, "attach_type": "connect4", "name": "other"}]}]
    found = around.others([], [], tree, led)
    assert (len(found.hooks), found.elsewhere) == ((1, 0) if meets else (0, 1))


def test_each_fault_of_a_file_is_a_line() -> None:
    error = "/etc/mesh.yaml:3:1: unknown kind\n/etc/mesh.yaml:9:1: \x1b[2J"
    found = findings.instance(replace(LIVING, agent={**AGENT, "sources": [{"name": "files", "error": error}]}))
    lines = [line.strip() for line in check.text(found, Screen()).splitlines()]
    at = next(n for n, line in enumerate(lines) if line.endswith("/etc/mesh.yaml:3:1: unknown kind"))
    assert lines[at + 1] == r"/etc/mesh.yaml:9:1: \x1b[2J" and lines[at + 2].startswith("remedy: ")
    fact = layout.facts([("ERROR", error)], Screen())
    assert fact.splitlines() == ["ERROR  /etc/mesh.yaml:3:1: unknown kind", r"       /etc/mesh.yaml:9:1: \x1b[2J"]
