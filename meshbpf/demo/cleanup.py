"""Take a demo away: this one, or one that was killed. What it removes is known by name alone, never by memory.

Order: the agent (it serves listeners inside the namespaces), then the processes by their cgroup, then cgroups,
namespaces and files.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import time
from pathlib import Path

from loader import dataplane, environment
from loader.instance import Instance
from meshbpf.demo import cast, network
from meshbpf.errors import Busy, MeshError
from meshbpf.runtime import stop

EMPTY_SECONDS = 5.0


def clean() -> list[str]:
    """What was there and is gone now, in words. Raises Busy when the instance `demo` is somebody else's."""
    removed = _instance()
    removed += _cgroups()
    removed += [f"namespace {name}" for name in network.remove()]
    if cast.WORK.is_dir():
        shutil.rmtree(cast.WORK)
        removed.append(str(cast.WORK))
    return removed


def _instance() -> list[str]:
    instance = Instance(cast.INSTANCE)
    if not (instance.run.is_dir() or instance.pins.is_dir()):
        return []
    foreign = [path for path in instance.read_state().get("cgroups", []) if not Path(path).name.startswith(cast.PREFIX)]
    if foreign:
        raise Busy(f"the instance {cast.INSTANCE} is not a demo's: it is attached to {', '.join(foreign)}")
    stop.stop_processes(instance)
    with instance.lock():
        dataplane.detach(instance, lose_unread=True)
    return [f"instance {cast.INSTANCE}"]


def _cgroups() -> list[str]:
    top = environment.cgroup2() / cast.CGROUP
    if not top.is_dir():
        return []
    kill(top)
    for folder in [*sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True), top]:
        folder.rmdir()
    return [f"cgroup {top}"]


def kill(cgroup: Path) -> None:
    """End every process in the cgroup and below, and wait until the kernel says that it is empty."""
    deadline = time.monotonic() + EMPTY_SECONDS
    with (cgroup / "cgroup.events").open("rb") as events:
        poll = select.poll()
        poll.register(events, select.POLLPRI | select.POLLERR)
        while True:
            events.seek(0)
            if b"populated 0" in events.read():
                return
            left = deadline - time.monotonic()
            if left <= 0:
                raise MeshError(f"processes in {cgroup} do not end; look at {cgroup}/cgroup.procs")
            # One by one: cgroup.kill is younger (5.14) than the oldest kernel we run on.
            for procs in cgroup.rglob("cgroup.procs"):
                for pid in procs.read_text().split():
                    _end(int(pid))
            poll.poll(min(left, 1.0) * 1000)


def _end(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it ended between the two
