"""Programs of others on the hooks that we use: who keeps us out, and whom we switch off.

The rule: cgroups are asked, nothing is opened by id, so that CAP_NET_ADMIN is enough; whose a program is says bpftool.
What follows from a mode is the kernel's: kernel/bpf/cgroup.c, hierarchy_allows_attach and compute_effective_progs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from loader import libbpf
from meshbpf.errors import Busy, DataplaneError


class Mode(IntEnum):
    """How the programs on one hook of one cgroup were attached."""

    EXCLUSIVE = 0  # nobody else there or below
    OVERRIDE = 1  # nobody else there; does not run for a cgroup below that has a program of its own
    MULTI = 2  # beside others, as every link is


@dataclass(frozen=True, slots=True)
class Others:
    cgroup: Path
    mode: Mode
    ids: tuple[int, ...]


def refusal(hook: str, attach_type: int, cgroup: Path, said: DataplaneError) -> DataplaneError:
    """The error of an attach that the kernel has refused; where another program is why, its id and a remedy."""
    place = f"{hook} on {cgroup}"
    other = _on(cgroup, attach_type)
    if other is not None and other.mode is Mode.OVERRIDE:
        return Busy(
            f"{place}: program {other.ids[0]} was attached there with BPF_F_ALLOW_OVERRIDE and is the only one\n"
            f"  remedy: name a cgroup below, for which it then no longer runs; whose it is: {_shown(other)}"
        )
    if other is None or other.mode is Mode.MULTI:
        other = _above(cgroup, attach_type)
    if other is None or other.mode is not Mode.EXCLUSIVE:
        return DataplaneError(f"{place}: {said}; what is there: bpftool cgroup show {cgroup} effective")
    return Busy(
        f"{place}: program {other.ids[0]} was attached exclusively to {other.cgroup}: no other there or below\n"
        f"  remedy: name a cgroup that is not below it, or have it attached with BPF_F_ALLOW_MULTI; whose it is:"
        f" {_shown(other)}"
    )


def switched_off(cgroups: Sequence[Path], hooks: Mapping[str, int]) -> Iterator[str]:
    """A line for each program above `cgroups` that does not run for them, now that they have programs of ours."""
    found: dict[Others, list[str]] = {}
    for cgroup in cgroups:
        for hook, attach_type in hooks.items():
            above = _above(cgroup, attach_type)
            if above is not None and above.mode is not Mode.MULTI:
                found.setdefault(above, []).append(f"{hook} of {cgroup}")
    for above, places in found.items():
        yield (
            f"program {above.ids[0]} on {above.cgroup} does not run for {', '.join(places)}: it was attached without"
            f" BPF_F_ALLOW_MULTI; whose it is: {_shown(above)}"
        )


def _shown(others: Others) -> str:
    return f"bpftool prog show id {others.ids[0]}"


def _above(cgroup: Path, attach_type: int) -> Others | None:
    """The programs of the nearest ancestor that has any: it alone decides."""
    for ancestor in cgroup.parents:
        if not (ancestor / "cgroup.procs").exists():
            return None
        if found := _on(ancestor, attach_type):
            return found
    return None


def _on(cgroup: Path, attach_type: int) -> Others | None:
    target = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flags, ids = libbpf.prog_query(target, attach_type)
    finally:
        os.close(target)
    return Others(cgroup, Mode(flags & 3), tuple(ids)) if ids else None
