"""Which cgroup this process is in, and leaving an attached one: the agent's own traffic is exempt by its cgroup."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from loader.environment import cgroup2
from meshbpf.errors import DataplaneError


def own() -> Path:
    """The cgroup2 directory this process is in."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return Path(str(cgroup2()) + line[3:])
    return cgroup2()


def join(cgroup: Path) -> None:
    """Move this process into `cgroup`. Raises OSError as the kernel gives it."""
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))


def exempt(cgroups: Sequence[Path], instance: str) -> int:
    """The cgroup id whose connections the connect hook leaves alone, 0 when we are outside of all attached ones.

    Inside, we move to a child of our own first: everybody else who shares our cgroup stays in the mesh.
    """
    mine = own()
    if not any(mine.is_relative_to(cgroup) for cgroup in cgroups):
        return 0
    leaf = mine if mine.name == _leaf(instance) else mine / _leaf(instance)
    try:
        leaf.mkdir(exist_ok=True)
        join(leaf)
    except OSError as error:
        raise DataplaneError(
            f"cannot move the agent from {mine}, which it leads, to {leaf}: {error.strerror}; start it elsewhere"
        ) from error
    return leaf.stat().st_ino


def remove_exempt(cgroups: Sequence[Path], instance: str) -> list[Path]:
    """Remove the cgroups that `exempt` made and whose processes have ended; returns them."""
    removed = []
    for cgroup in cgroups:
        for leaf in sorted(cgroup.rglob(_leaf(instance))):
            try:
                leaf.rmdir()
            except OSError:
                continue  # somebody lives in it
            removed.append(leaf)
    return removed


def _leaf(instance: str) -> str:
    return f"meshbpf-agent-{instance}"
