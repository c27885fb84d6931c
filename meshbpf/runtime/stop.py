"""Ends an instance's processes for `detach`: its agent by SIGTERM, then workers that outlived one; both bounded."""

from __future__ import annotations

import asyncio
import os
import select
import signal
from pathlib import Path

from loader.instance import Instance, owner
from meshbpf.runtime import cgroup, orphans

AGENT_SECONDS = 15.0  # its own drain is bounded too; this is for one that hangs
WORKER_SECONDS = 5.0


def _wait_gone(pidfd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _stop_agent(pid: int) -> str | None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        if _wait_gone(pidfd, AGENT_SECONDS):
            return f"agent {pid}"
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        _wait_gone(pidfd, 5.0)
        return f"agent {pid} (killed: it did not drain in {AGENT_SECONDS:.0f} s)"
    except ProcessLookupError:
        return f"agent {pid}"
    finally:
        os.close(pidfd)


async def _stop_orphans(instance: Instance) -> list[str]:
    left = await orphans.greet(instance)
    await asyncio.gather(*(orphan.end(WORKER_SECONDS) for orphan in left))
    return [f"worker {orphan.pid}" for orphan in left]


def stop_processes(instance: Instance) -> list[str]:
    """What was stopped, in words. A process that merely reads the instance holds no lock and is left alone."""
    if not instance.run.is_dir():
        return []
    stopped: list[str] = []
    cgroups = [Path(path) for path in instance.read_state().get("cgroups", [])]
    pid = owner(instance)
    if pid and pid != os.getpid() and (line := _stop_agent(pid)):
        stopped.append(line)
    stopped += asyncio.run(_stop_orphans(instance))
    return stopped + [f"cgroup {path}" for path in cgroup.remove_exempt(cgroups, instance.name)]
