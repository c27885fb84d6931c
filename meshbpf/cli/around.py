"""Programs of others, as `meshbpf check` sees them: from bpftool's lists; ours are known by their pins."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loader.instance import BPFFS
from meshbpf.errors import MeshError

# bpftool's words for the hooks that we use; newer ones say cgroup_inet4_connect
OUR_HOOKS = (
    "connect4", "connect6", "sendmsg4", "sendmsg6", "recvmsg4", "recvmsg6", "getpeername4", "getpeername6", "sock_ops",
    "sock_release",
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
    "cgroup_inet_sock_release": "sock_release",
}
TOOL_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class ForeignProgram:
    """`mode`: `multi` beside others, `override` off where another one is below, empty when it lets nobody else in."""

    id: int
    name: str
    hook: str
    cgroup: str
    mode: str = "multi"

    def __str__(self) -> str:
        yields = ", off for cgroups below that we lead" if self.mode == "override" else ""
        return f"{self.name or self.id} ({self.hook} on {self.cgroup}{yields})"


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Programs of others: on our hooks, as sk_msg, and how many on hooks or cgroups that do not meet ours."""

    hooks: tuple[ForeignProgram, ...] = ()
    sk_msg: tuple[str, ...] = ()
    elsewhere: int = 0


def neighbours(top: str, led: Sequence[str] = ()) -> tuple[str, Neighbours | None]:
    """(bpftool's version, or why it cannot be used; what it found). `led` as in `others`."""
    if shutil.which("bpftool") is None:
        return "not installed", None
    try:
        version = str(_bpftool("version")["version"])
        links, programs = _bpftool("-f", "link"), _bpftool("-f", "prog")
        tree = _bpftool("cgroup", "tree", top)
    except MeshError as error:
        return str(error), None
    if not all(Path(cgroup).is_relative_to(top) for cgroup in led):
        led = ()  # named through another mount of cgroup2: the tree has other words for them
    return version, others(links, programs, tree, led)


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


def others(links: Any, programs: Any, tree: Any, led: Sequence[str] = ()) -> Neighbours:
    """Who is not us, from bpftool's three lists. Pure. With `led`, the cgroups of an instance, only programs on one of
    these, above or below it meet ours; without, any cgroup may be led yet.
    """
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
            if hook in OUR_HOOKS and _meets(group["cgroup"], led):
                mode = program.get("attach_flags", "multi")
                hooks.append(ForeignProgram(program["id"], program.get("name", ""), hook, group["cgroup"], mode))
            else:
                elsewhere += 1
    sk_msg = [
        str(program.get("name") or program["id"])
        for program in programs
        if program.get("type") == "sk_msg" and program["id"] not in ours
    ]
    return Neighbours(tuple(hooks), tuple(sk_msg), elsewhere)


def _meets(cgroup: str, led: Sequence[str]) -> bool:
    return not led or any(Path(cgroup).is_relative_to(one) or Path(one).is_relative_to(cgroup) for one in led)
