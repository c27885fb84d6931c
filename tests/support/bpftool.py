"""The kernel's own word, through bpftool: what a table holds, which objects an instance has, which still live."""

from __future__ import annotations

import ctypes as ct
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loader import libbpf
from loader.instance import Instance
from tests.support.machine import until

KINDS = ("link", "prog", "map")


def ask(*arguments: str) -> Any:
    done = subprocess.run(["bpftool", "-j", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    return json.loads(done.stdout.strip() or "[]")


def _raw(text: list[str]) -> bytes:
    return bytes(int(byte, 16) for byte in text)


def dump(path: Path) -> dict[bytes, bytes]:
    """A pinned hash or array; a per-CPU value is the concatenation of every CPU's."""
    found = {}
    for entry in ask("map", "dump", "pinned", str(path)):
        value = entry["value"] if "value" in entry else [b for cpu in entry["values"] for b in cpu["value"]]
        found[_raw(entry["key"])] = _raw(value)
    return found


@dataclass(frozen=True)
class Objects:
    """Ids of kernel objects, by kind."""

    ids: dict[str, frozenset[int]]

    def alive(self) -> dict[str, set[int]]:
        """Those that the kernel still knows; empty when all are gone."""
        left = {kind: existing(kind) & self.ids[kind] for kind in KINDS}
        return {kind: ids for kind, ids in left.items() if ids}

    def gone(self) -> bool:
        """The kernel frees objects a moment after their last user: wait for it."""
        until(lambda: not self.alive(), "the kernel has freed every object of ours")
        return True


def existing(kind: str) -> set[int]:
    """Ids of every object of the kind, without opening one: a program array that is opened while it is being freed
    stays for ever (Linux 6.18), so a list made by bpftool, which opens all, would make the leak that it looks for.
    """
    following = getattr(libbpf.library(), f"bpf_{kind}_get_next_id")
    found: set[int] = set()
    number = ct.c_uint32(0)
    while following(number, ct.byref(number)) == 0:
        found.add(number.value)
    return found


def pinned(instance: Instance) -> Objects:
    """Everything that is pinned for the instance, and the tables that its programs use."""
    ids: dict[str, set[int]] = {kind: set() for kind in KINDS}
    for path in instance.pins.rglob("*"):
        if path.is_dir():
            continue
        kind = "link" if path.parent == instance.links or path.name == "redirect_link" else _kind(path)
        shown = ask(kind, "show", "pinned", str(path))
        ids[kind].add(shown["id"])
        ids["map"].update(shown.get("map_ids", ()))
    return Objects({kind: frozenset(found) for kind, found in ids.items()})


def _kind(path: Path) -> str:
    done = subprocess.run(["bpftool", "-j", "map", "show", "pinned", str(path)], capture_output=True, check=False)
    return "map" if done.returncode == 0 else "prog"


def on_cgroup(cgroup: Path) -> list[dict[str, Any]]:
    """Links on this very cgroup, by whoever made them."""
    inode = cgroup.stat().st_ino
    return [link for link in ask("link", "show") if link.get("cgroup_id") == inode]


def hooks_on(cgroup: Path) -> list[dict[str, Any]]:
    """Programs on the cgroup, by link or not."""
    found: list[dict[str, Any]] = ask("cgroup", "show", str(cgroup))
    return found
