"""What `meshbpf check` looks at. It only gathers, and changes nothing; `findings` judges. A fact that cannot be had is
a fact too, with the words why.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from loader import dataplane, environment, libbpf
from loader.instance import BPFFS, Instance
from meshbpf.carrier import Carrier, choose
from meshbpf.cli import ask, view
from meshbpf.cli.around import Neighbours, neighbours
from meshbpf.errors import EnvironmentLack, MeshError
from meshbpf.model import OnProxyDown

TABLES = ("services", "policies", "slots", "endpoints", "flows")


@dataclass(frozen=True, slots=True)
class SelfTestRow:
    id: str
    ok: bool
    detail: str
    remedy: str


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """`bcc` and `libbpf` are why they cannot be used, empty when they can; `cgroup2` is empty when not mounted."""

    release: str
    btf: bool
    cgroup2: str
    bpffs: bool
    missing_capabilities: tuple[str, ...]
    netns_cookies: bool
    bcc: str
    libbpf: str
    bpftool: str
    neighbours: Neighbours | None
    self_test: tuple[SelfTestRow, ...] | None
    self_test_lack: tuple[str, str] = ("", "")
    namespaced: bool = False  # cgroup2 shows a container's cgroups, not the machine's
    bpf_refused: str = ""  # why bpf() is refused although the capabilities are there
    led: bool = False  # the instance that is asked about is attached
    missing_to_serve: tuple[str, ...] = ()  # what `run` lacks for callers in other network namespaces


@dataclass(frozen=True, slots=True)
class CgroupFacts:
    path: str
    exists: bool
    linked: bool  # our links hold the directory that is there now, not an earlier one of the same name


@dataclass(frozen=True, slots=True)
class InstanceFacts:
    name: str
    attached: bool
    cgroups: tuple[CgroupFacts, ...] = ()
    services: int = 0
    governed: int = 0
    fills: tuple[tuple[str, int, int], ...] = ()
    agent: Mapping[str, Any] | None = None
    agent_error: str = ""
    refused: int = 0  # of the governed ports, those that no call gets through without a proxy
    proxy_serves: bool = False  # also without its agent: workers outlive it
    failing: tuple[Mapping[str, Any], ...] = ()  # rows of `meshbpf endpoints`: failed when the proxy called them last


def machine(instance: str = "") -> MachineFacts:
    """`instance`: only neighbours of what it leads matter, once it leads anything."""
    try:
        top = str(environment.cgroup2())
    except EnvironmentLack:
        top = ""
    missing = tuple(environment.missing_capabilities())
    refused = "" if missing else environment.bpf_refused()
    led = _led(instance)
    if refused or not top:
        tool, around = ("bpf() is refused" if refused else "cgroup2 is not mounted"), None
    else:
        tool, around = neighbours(top, led)
    tested, lack = _self_test(missing, refused)
    return MachineFacts(
        release=os.uname().release,
        btf=Path("/sys/kernel/btf/vmlinux").exists(),
        cgroup2=top,
        bpffs=(str(BPFFS), "bpf") in environment.mounts(),
        missing_capabilities=missing,
        netns_cookies=environment.has_netns_cookies(),
        bcc=_bcc(),
        libbpf=_libbpf(),
        bpftool=tool,
        neighbours=around,
        self_test=tested,
        self_test_lack=lack,
        namespaced=bool(top) and environment.is_namespaced(Path(top)),
        bpf_refused=refused,
        led=bool(led),
        missing_to_serve=tuple(environment.missing_to_serve()),
    )


def _led(instance: str) -> Sequence[str]:
    try:
        led: Sequence[str] = Instance(instance).read_state().get("cgroups", ()) if instance else ()
    except PermissionError:  # somebody else's
        return ()
    return led


@cache
def _bcc() -> str:
    """In a child: importing it here would cost us its memory for good."""
    child = subprocess.run([sys.executable, "-P", "-c", "import bcc"], capture_output=True, text=True, check=False)
    return "" if child.returncode == 0 else (child.stderr.strip().splitlines() or ["import bcc fails"])[-1]


def _libbpf() -> str:
    try:
        libbpf.library()
    except EnvironmentLack as error:
        return error.what
    return ""


def _self_test(missing: Sequence[str], refused: str) -> tuple[tuple[SelfTestRow, ...] | None, tuple[str, str]]:
    if missing or refused:
        remedy = environment.LET_BPF if refused else "run as root (sudo)"
        return None, ("not run: it needs the capabilities above", remedy)
    from loader import selftest  # late: no other command needs the trials

    try:
        checks = selftest.run()
    except EnvironmentLack as error:
        return None, (f"not run: {error.what}", error.remedy)
    except MeshError as error:
        return None, (f"not run: {str(error).splitlines()[0]}", "none needed: the proxy goes by plain TCP")
    return tuple(SelfTestRow(row.id, row.ok, row.detail, row.remedy) for row in checks), ("", "")


def instance(name: str) -> InstanceFacts:
    target = Instance(name)
    found = dataplane.open_pins(target)
    if found is None:
        return InstanceFacts(name, False)
    plane, mesh = found
    agent, trouble = None, ""
    try:
        agent = ask.get(target, "/v1/status")
    except MeshError as error:
        trouble = str(error)
    seen = {name: one for name, one in (agent or {}).get("endpoints", {}).items() if one.get("failing")}
    try:
        failing = tuple(row for row in view.endpoints(plane, mesh, None, seen) if row["failing"]) if seen else ()
        fills = tuple(
            (table, len(list(plane.maps[table].keys())), int(getattr(mesh.agent.maps, table))) for table in TABLES
        )
        serves = plane.proxy_serves(time.monotonic_ns())
    finally:
        plane.close()
    down = [
        policy.on_proxy_down
        for service in mesh.services
        for policy in [mesh.policy_for(service)]
        for port in service.ports
        if choose(port, policy).carrier is not Carrier.DIRECT
    ]
    linked = {pin.name.split("-")[0] for pin in target.links.iterdir()} if target.links.is_dir() else set()
    return InstanceFacts(
        name=name,
        attached=True,
        cgroups=tuple(_cgroup(path, linked) for path in target.read_state()["cgroups"]),
        services=len(mesh.services),
        governed=len(down),
        refused=down.count(OnProxyDown.REFUSE),
        fills=fills,
        agent=agent,
        agent_error=trouble,
        proxy_serves=serves,
        failing=failing,
    )


def _cgroup(path: str, linked: set[str]) -> CgroupFacts:
    try:
        return CgroupFacts(path, True, str(os.stat(path).st_ino) in linked)
    except FileNotFoundError:
        return CgroupFacts(path, False, False)
