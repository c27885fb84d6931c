"""A cgroup's path → the name people know the caller by: pod, container, systemd unit, else the path. For logs only:
whoever may make cgroups may call them anything.

What wins: a pod, wherever it is (a node may itself be a container); then the outermost container (what it starts inside
of itself is its own affair); then the unit, found as systemd does: slices are passed over, and below `user@UID.service`
the user's own unit counts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

HEX = "[0-9a-f]"
# docker, containerd and nerdctl, CRI-O and podman under the systemd driver; the id alone under cgroupfs. Their monitors
# (crio-conmon-, libpod-conmon-) are processes of the runtime, not of the container, and have a scope of their own.
CONTAINER = re.compile(
    rf"(?:docker-|nerdctl-|containerd-|cri-containerd-|crio-|libpod-|.*:cri-containerd:)?({HEX}{{64}})(?:\.scope)?"
)
# A pod's uid, its dashes written _ in a slice's name; pods of files on the node have a hash for a uid.
UID = rf"{HEX}{{8}}(?:[-_]{HEX}{{4}}){{3}}[-_]{HEX}{{12}}|{HEX}{{32}}"
POD = re.compile(rf"(?:.*kubepods(?:-(?P<slice_qos>burstable|besteffort))?-)?pod(?P<uid>{UID})(?:\.slice(?::.*)?)?")
QOS = re.compile(r"(?:.*-)?kubepods-(burstable|besteffort)\.slice|(burstable|besteffort)")
UNIT = re.compile(r"[^/]+\.(?:service|scope|socket|mount|swap)")
MANAGER = re.compile(r"user@\d+\.service")
SHORT = 12  # of a container's id, as the tools show it


class Kind(StrEnum):
    POD = "pod"
    CONTAINER = "container"
    UNIT = "unit"
    CGROUP = "cgroup"


@dataclass(frozen=True, slots=True)
class Identity:
    """`name` is the pod's uid, the container's id, the unit or the path; `container` is the one inside a pod, where its
    cgroup says so; `qos` the pod's class.
    """

    kind: Kind
    name: str
    container: str = ""
    qos: str = ""

    @property
    def label(self) -> str:
        """How logs, metrics and tables write it."""
        if self.kind is Kind.POD:
            return f"pod {self.name}"
        return f"container {self.name[:SHORT]}" if self.kind is Kind.CONTAINER else self.name


def identify(path: str) -> Identity:
    """Who is in the cgroup of this path (relative to the cgroup2 mount, with a leading slash). Pure."""
    parts = [part for part in path.split("/") if part]
    for place, part in enumerate(parts):
        if (pod := POD.fullmatch(part)) and any("kubepods" in before for before in parts[: place + 1]):
            inside = _containers([part, *parts[place + 1 :]])
            return Identity(Kind.POD, pod["uid"].replace("_", "-"), next(inside, ""), _qos(pod, parts[:place]))
    for container in _containers(parts):
        return Identity(Kind.CONTAINER, container)
    if unit := _unit(parts):
        return Identity(Kind.UNIT, unit)
    return Identity(Kind.CGROUP, path or "/")


def _containers(parts: Sequence[str]) -> Iterator[str]:
    return (match[1] for match in map(CONTAINER.fullmatch, parts) if match)


def _qos(pod: re.Match[str], above: Sequence[str]) -> str:
    """Kubernetes writes no class into the cgroups of guaranteed pods."""
    if pod["slice_qos"]:
        return pod["slice_qos"]
    match = QOS.fullmatch(above[-1]) if above else None
    return (match[1] or match[2]) if match else "guaranteed"


def _unit(parts: Sequence[str]) -> str:
    found = ""
    for part in parts:
        if part.endswith(".slice"):
            continue
        if not UNIT.fullmatch(part):
            break
        found = part
        if not MANAGER.fullmatch(part):
            break
    return found


class Workloads:
    """Looks cgroup ids up below the attached cgroups; a new id costs one walk, a known one a dictionary read."""

    def __init__(self, top: Path, cgroups: Sequence[Path]) -> None:
        self._top = top
        self._cgroups = cgroups
        self._paths: dict[int, str] = {}
        self._labels: dict[int, str] = {}

    def __call__(self, cgroup_id: int) -> str:
        found = self._labels.get(cgroup_id)
        if found is None:
            path = self.path(cgroup_id)
            found = self._labels[cgroup_id] = identify(path).label if path else f"cgroup {cgroup_id}"
        return found

    def path(self, cgroup_id: int) -> str:
        """The cgroup's path; empty when it is gone already, or not below ours."""
        if cgroup_id not in self._paths:
            self._walk()
        # Remembered, so that it does not cost a walk per connection.
        return self._paths.setdefault(cgroup_id, "")

    def _walk(self) -> None:
        for cgroup in self._cgroups:
            for folder, _below, _files in os.walk(cgroup):
                try:
                    inode = os.stat(folder).st_ino
                except OSError:
                    continue
                self._paths[inode] = "/" + str(Path(folder).relative_to(self._top))
