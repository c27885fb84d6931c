"""What a soak measures: memory, descriptors and threads of our processes, table entries, sockets, namespaces, cgroups.

Rule: one sample is one moment, from /proc, the pins and the agent's own status; nothing is judged here. The series'
names are those of bench/leaks.py, which has a tolerance for each.
"""

from __future__ import annotations

import contextlib
import urllib.request
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from loader import abi, dataplane, libbpf
from loader.dataplane import SHAPES
from loader.instance import Instance
from meshbpf.cli import ask
from meshbpf.errors import DataplaneError

TIME_WAIT, LISTEN = "06", "0A"
# … of SHAPES hold what is attached to sockets, and have no keys to walk.
STORAGE = ("listeners",)


def memory(pid: int) -> dict[str, float]:
    """Bytes resident, and our share of them."""
    words = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return {name.lower(): float(words[name].split()[0]) * 1024 for name in ("Rss", "Pss")}


def threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def sockets(table: str, ports: Collection[int]) -> int:
    """Connections, in the text of /proc/net/tcp, that touch one of the ports; TIME_WAIT is the kernel's own."""
    count = 0
    for line in table.splitlines()[1:]:
        _number, local, remote, state, *_ = line.split()
        touched = {int(local.rsplit(":", 1)[1], 16), int(remote.rsplit(":", 1)[1], 16)}
        count += state not in (TIME_WAIT, LISTEN) and not touched.isdisjoint(ports)
    return count


class Gauges:
    """Of one running agent. `ports`: those whose connections are ours."""

    def __init__(self, instance: Instance, agent: int, admin: int, group: Path, ports: Collection[int]) -> None:
        self.instance, self.agent, self.group, self.ports = instance, agent, group, ports
        self._metrics = f"http://127.0.0.1:{admin}/metrics"
        self.elder = min(self.workers(), key=_started)  # the worker that is never killed
        opened = dataplane.open_pins(instance)
        assert opened is not None
        plane = self._plane = opened[0]
        self._maps = {name: plane.maps[name] for name in SHAPES if name not in STORAGE}
        for name, key, value in (("pairs", 8, len(bytes(abi.Pair()))), ("socks", 16, 8)):
            if (plane.maps_folder / name).exists():
                self._maps[name] = libbpf.Map(plane.maps_folder / name, key, value)

    def workers(self) -> list[int]:
        answer = ask.get(self.instance, "/v1/status")
        return list(answer["worker_pids"]) if answer is not None else []

    def sample(self) -> dict[str, float]:
        """Raises OSError or MeshError when the agent, or its elder worker, is gone: that is no leak but the end."""
        answer = ask.get(self.instance, "/v1/status")
        if answer is None:
            raise DataplaneError("the agent does not answer")
        found: dict[str, float] = {"namespaces": answer["namespaces"], "restarts": answer["restarts"]}
        for name, pid in (("agent", self.agent), ("worker", self.elder)):
            found |= {f"{kind}.{name}": value for kind, value in memory(pid).items()}
            found |= {f"fds.{name}": descriptors(pid), f"threads.{name}": threads(pid)}
        with contextlib.suppress(OSError):  # one that is being killed; the next sample has its successor
            found["fds.workers"] = sum(descriptors(pid) for pid in answer["worker_pids"])
        for name, table in self._maps.items():
            found[f"map.{name}"] = sum(1 for _ in table.keys())  # noqa: SIM118
        found["sockets.open"] = sum(
            sockets(Path(f"/proc/net/{name}").read_text(), self.ports) for name in ("tcp", "tcp6")
        )
        found["cgroups"] = sum(1 for path in self.group.rglob("*") if path.is_dir())
        return found

    def verdicts(self) -> dict[str, int]:
        """What the kernel programs decided, by reason."""
        found: Counter[str] = Counter()
        for (_program, reason), count in self._plane.counters().items():
            found[reason] += count
        return {reason: count for reason, count in found.items() if count}

    def series(self) -> int:
        """Lines of /metrics: shown, as those of what is gone end after ten minutes only."""
        with urllib.request.urlopen(self._metrics, timeout=5) as page:
            return sum(1 for line in page if not line.startswith(b"#"))


def _started(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
