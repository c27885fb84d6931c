"""What `meshbpf check` looks at. It only gathers, and changes nothing; `findings` judges. A fact that cannot be had is
a fact too, with the words why. Foreign programs are read from bpftool, ours are known by their pins.
"""

from __future__ import annotations

import json
import os
import shutil
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
from meshbpf.errors import EnvironmentLack, MeshError
from meshbpf.model import OnProxyDown

# bpftool's words for the hooks that we use; newer ones say cgroup_inet4_connect
OUR_HOOKS = (
    "connect4", "connect6", "sendmsg4", "sendmsg6", "recvmsg4", "recvmsg6", "getpeername4", "getpeername6", "sock_ops",
)  # fmt: skip
LONG_NAMES = {
    "cgroup_inet4_connect": "connect4",
    "cgroup_inet6_connect": "connect6",
    "cgroup_udp4_sendmsg": "sendmsg4",
    "cgroup_udp6_sendmsg": "sendmsg6",
    "cgroup_udp4_recvmsg": "recvmsg4",
    "cgroup_udp6_recvmsg": "recvmsg6",
    "cgroup_inet4_getpeername": "getpeername4",
    "cgroup_inet6_getpeername": "getpeername6",
    "cgroup_sock_ops": "sock_ops",
}
TABLES = ("services", "policies", "slots", "endpoints", "flows")
TOOL_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class ForeignProgram:
    id: int
    name: str
    hook: str
    cgroup: str


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Programs of others: on our hooks, as sk_msg, and how many on hooks that do not meet ours."""

    hooks: tuple[ForeignProgram, ...] = ()
    sk_msg: tuple[str, ...] = ()
    elsewhere: int = 0


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


def machine() -> MachineFacts:
    try:
        top = str(environment.cgroup2())
    except EnvironmentLack:
        top = ""
    missing = tuple(environment.missing_capabilities())
    tool, around = neighbours(top) if top else ("cgroup2 is not mounted", None)
    tested, lack = _self_test(missing)
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
        missing_to_serve=tuple(environment.missing_to_serve()),
    )


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


def _self_test(missing: Sequence[str]) -> tuple[tuple[SelfTestRow, ...] | None, tuple[str, str]]:
    if missing:
        return None, ("not run: it needs the capabilities above", "run as root (sudo)")
    from loader import selftest  # late: no other command needs the trials

    try:
        checks = selftest.run()
    except EnvironmentLack as error:
        return None, (f"not run: {error.what}", error.remedy)
    except MeshError as error:
        return None, (f"not run: {str(error).splitlines()[0]}", "none needed: the proxy goes by plain TCP")
    return tuple(SelfTestRow(row.id, row.ok, row.detail, row.remedy) for row in checks), ("", "")


def neighbours(top: str) -> tuple[str, Neighbours | None]:
    """(bpftool's version, or why it cannot be used; what it found)."""
    if shutil.which("bpftool") is None:
        return "not installed", None
    try:
        version = str(_bpftool("version")["version"])
        links, programs = _bpftool("-f", "link"), _bpftool("-f", "prog")
        tree = _bpftool("cgroup", "tree", top)
    except MeshError as error:
        return str(error), None
    return version, others(links, programs, tree)


def _bpftool(*arguments: str) -> Any:
    done = subprocess.run(
        ["bpftool", "-j", *arguments], capture_output=True, text=True, check=False, timeout=TOOL_SECONDS
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]}
    if isinstance(answer, dict) and "error" in answer:
        raise MeshError(str(answer["error"]))
    return answer


def others(links: Any, programs: Any, tree: Any) -> Neighbours:
    """Who is not us, from bpftool's three lists. Pure."""
    prefix = f"{BPFFS}/meshbpf/"

    def pinned_by_us(entry: Mapping[str, Any]) -> bool:
        return any(str(path).startswith(prefix) for path in entry.get("pinned", ()))

    ours = {link["prog_id"] for link in links if "prog_id" in link and pinned_by_us(link)}
    ours |= {program["id"] for program in programs if pinned_by_us(program)}
    hooks, elsewhere = [], 0
    for group in tree:
        for program in group.get("programs", ()):
            hook = LONG_NAMES.get(program["attach_type"], program["attach_type"])
            if program["id"] in ours:
                continue
            if hook in OUR_HOOKS:
                hooks.append(ForeignProgram(program["id"], program.get("name", ""), hook, group["cgroup"]))
            else:
                elsewhere += 1
    sk_msg = [
        str(program.get("name") or program["id"])
        for program in programs
        if program.get("type") == "sk_msg" and program["id"] not in ours
    ]
    return Neighbours(tuple(hooks), tuple(sk_msg), elsewhere)


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
