"""What killed self-tests leave: pins and a cgroup named `selftest-PID`. The next one, attach and detach sweep it.

A self-test holds its instance's lock as long as it runs, and the kernel takes the lock from whoever dies: so whoever
gets the lock knows that nobody needs the rest, also when the number belongs to another process by now.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from loader import dataplane, environment, instance
from loader.instance import Instance
from meshbpf.errors import MeshError

NAME = re.compile(r"selftest-([0-9]+)")


def sweep() -> list[str]:
    """Remove what dead self-tests left; returns their names. Whatever cannot go yet is left for the next time."""
    folders = [instance.BPFFS / "meshbpf", instance.RUN, environment.cgroup2()]
    names = {path.name for folder in folders if folder.is_dir() for path in folder.iterdir()}
    return [name for name in sorted(names) if (match := NAME.fullmatch(name)) and _swept(name, match[1])]


def _swept(name: str, pid: str) -> bool:
    cgroup, left = environment.cgroup2() / name, Instance(name)
    if _is_meshbpf(pid):  # an older version, which held no lock
        return False
    with contextlib.suppress(FileNotFoundError):
        if (cgroup / "cgroup.procs").read_text():
            return False  # its trials outlived it; they end by themselves
    try:
        with left.lock():
            dataplane.detach(left, lose_unread=True)
            with contextlib.suppress(FileNotFoundError):
                cgroup.rmdir()
    except (MeshError, OSError):  # it lives, is being swept by somebody else, or is not ours
        return False
    return True


def _is_meshbpf(pid: str) -> bool:
    try:
        return b"meshbpf" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
