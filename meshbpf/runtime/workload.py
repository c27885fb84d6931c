"""cgroup id → the name people know the caller by: systemd unit, container, pod, else the cgroup's path. Cached."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

CONTAINER = re.compile(r"(?:docker-|cri-containerd-|crio-|libpod-|/)([0-9a-f]{64})(?:\.scope)?$")
POD = re.compile(r"pod([0-9a-f]{8}[-_][0-9a-f_-]{27})")
UNIT = re.compile(r"/([^/]+\.(?:service|scope))(?:/|$)")


def name(path: str) -> str:
    """The workload behind a cgroup path (relative to the cgroup2 mount, with a leading slash). Pure."""
    if match := POD.search(path):
        return f"pod {match.group(1).replace('_', '-')}"
    if match := CONTAINER.search(path):
        return f"container {match.group(1)[:12]}"
    if match := UNIT.search(path):
        return match.group(1)
    return path or "/"


class Workloads:
    """Looks cgroup ids up below the attached cgroups; a new id costs one walk, a known one a dictionary read."""

    def __init__(self, top: Path, cgroups: Sequence[Path]) -> None:
        self._top = top
        self._cgroups = cgroups
        self._names: dict[int, str] = {}

    def __call__(self, cgroup_id: int) -> str:
        found = self._names.get(cgroup_id)
        if found is None:
            self._walk()
            # Gone already, or not below us: remembered, so that it does not cost a walk per connection.
            found = self._names.setdefault(cgroup_id, f"cgroup {cgroup_id}")
        return found

    def _walk(self) -> None:
        for cgroup in self._cgroups:
            for folder, _below, _files in os.walk(cgroup):
                try:
                    inode = os.stat(folder).st_ino
                except OSError:
                    continue
                self._names[inode] = name("/" + str(Path(folder).relative_to(self._top)))
